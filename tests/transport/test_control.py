"""The control plane over real sockets; ranks are threads, and a rank dies by losing its connection."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.control import FIRST_MEETING, ControlPlane, pack_cell, unpack_cell
from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from ms_ckpt_ext.transport.rendezvous import meeting
from ms_ckpt_ext.transport.rendezvous.addresses import Address
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES, CELL_ROOM
from ms_ckpt_ext.transport.rendezvous.greeting import Guest, Unwelcome
from ms_ckpt_ext.transport.rendezvous.search import arrive
from tests.support.control import die, forever, job
from tests.support.waiting import SOON, comes


def listening() -> list[threading.Thread]:
    """Threads that a control plane has to itself."""
    return [t for t in threading.enumerate() if t.name in ("ms_ckpt_ext control", "ms_ckpt_ext hub")]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_share_gives_every_payload_to_every_rank_in_order(size: int) -> None:
    def work(plane: ControlPlane) -> list[list[bytes]]:
        return [plane.share(bytes([plane.rank]) * length * plane.rank) for length in (0, 1, 70_000, 3)]

    want = [[bytes([r]) * length * r for r in range(size)] for length in (0, 1, 70_000, 3)]
    assert job(size, work) == [want] * size


@pytest.mark.parametrize("where", ["share", "guard"])
def test_a_death_is_heard_by_all_others_wherever_they_are(where: str) -> None:
    """For rank 0, which takes the hub with it, see test_job_transports.py."""

    def work(plane: ControlPlane) -> Any:
        plane.share(b"")
        if plane.rank == 2:
            return die(plane)
        return plane.share(b"") if where == "share" else plane.guard(forever, "guard")

    for error in (error for rank, error in enumerate(job(4, work)) if rank != 2):
        assert isinstance(error, PeerError) and error.rank == 2
        assert "rank 2 is gone" in str(error) and f"in {where}" in str(error)


def test_an_answer_that_came_before_the_death_is_still_given() -> None:
    """A rank that reports its error and ends must be heard with that, not as a mere death."""

    def work(plane: ControlPlane) -> Any:
        for _ in range(20):
            plane.share(b"")
        answer = plane.share(b"my error" if plane.rank == 1 else b"")
        if plane.rank == 1:
            die(plane)
        return answer

    assert job(3, work) == [[b"", b"my error", b""]] * 3


def test_a_rank_that_left_is_not_waited_for() -> None:
    def work(plane: ControlPlane) -> Any:
        return plane.close() if plane.rank == 1 else plane.share(b"")

    _, gone, error = results = job(3, work)
    assert gone is None and all(isinstance(results[r], PeerError) for r in (0, 2))
    assert error.rank == 1 and "has left" in str(error)


def test_a_rank_that_does_not_come_is_named_after_the_timeout() -> None:
    def work(plane: ControlPlane) -> Any:
        if plane.rank in (1, 2):
            time.sleep(3.5)
        return plane.share(b"")

    for error in job(4, work, timeout=1.0):
        assert isinstance(error, TransportError) and not isinstance(error, PeerError)
        assert "ranks 1, 2 did not come within 1 s" in str(error)


def test_rank_0_does_not_wait_for_the_living_when_it_knows_of_a_death() -> None:
    def work(plane: ControlPlane) -> float:
        if plane.rank == 2:
            die(plane)
        if plane.rank == 1:
            time.sleep(1.5)  # busy with files
        if plane.rank == 0:
            with pytest.raises(PeerError):
                plane.share(b"")
        began = time.monotonic()
        plane.close()
        return time.monotonic() - began

    assert job(3, work)[0] < 1.0


def test_nobody_listens_after_close() -> None:
    assert job(3, lambda plane: bool(listening())) == [True] * 3
    assert not listening()


def test_strangers_are_turned_away() -> None:
    def work(plane: ControlPlane) -> Any:
        plane.share(b"")
        if plane.rank == 1:
            host, port = plane._socket.getpeername()
            for greeting in (b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, b"\0" * 60, b"short"):
                with socket.create_connection((host, port), 5) as stranger:
                    stranger.sendall(greeting)
                    while stranger.recv(100):  # what the hub says by itself
                        pass
            for token, rank in (("0" * 32, 0), ("", 9)):
                with socket.create_connection((host, port), 5) as stranger, pytest.raises(Unwelcome):
                    arrive(stranger, Guest(token, rank, 2))
        return plane.share(b"fine")

    assert job(2, work) == [[b"fine", b"fine"]] * 2


def test_a_hub_that_ends_closes_connections_that_have_not_said_who_they_are() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    hub = Hub(2, 60.0, server, "token")
    with socket.create_connection(address, SOON) as stranger:
        stranger.sendall(b"he")
        hub.stop()
        hub.join(SOON)
        try:
            while stranger.recv(100):  # what the hub says by itself
                pass
        except ConnectionResetError:  # closed before it was accepted, or before what it said was read
            pass
    assert not listening()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_first_meeting_that_not_all_come_to_ends_after_the_timeout(rank: int) -> None:
    """Where ranks of another host are missing; those of this one have met before, see `gate`."""
    plane = ControlPlane(rank, 2, 0.3)
    with pytest.raises(TransportError, match="waited 0.3 s in the first meeting"):
        plane.enter(lambda _: plane.guard(forever, FIRST_MEETING))
    plane.close()
    assert comes(lambda: not listening())


def test_a_first_meeting_that_the_backend_refuses_is_explained() -> None:
    def refuse() -> list[bytes]:
        raise RuntimeError("Connect to rank 1 timed out")

    plane = ControlPlane(0, 2, 60.0)
    with pytest.raises(TransportError, match="the first meeting .* failed: RuntimeError: Connect to rank 1 timed out"):
        plane.enter(lambda _: plane.guard(refuse, FIRST_MEETING))
    assert comes(lambda: not listening())


def test_ranks_may_wait_as_long_as_they_like() -> None:
    assert job(2, lambda plane: plane.share(b"x"), timeout=1e7) == [[b"x", b"x"]] * 2


def test_a_hub_that_is_silent_is_given_up() -> None:
    """Its process was stopped, say; here it waits longer than the ranks do."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        hub = Hub(2, 60.0, server, "token")
        line = Line(1, 2, 0.2, ControlLimits(slack_seconds=0.1))
        line.attach(arrive(socket.create_connection(address, SOON), Guest("token", 1, 2)))
        with pytest.raises(TransportError, match="rank 0, which hears the others .* was silent for 0.2 s") as caught:
            line.share(b"")
        assert type(caught.value) is TransportError
        line.close()
        hub.stop()
        hub.join(SOON)


def test_a_hub_that_cannot_be_opened_is_an_error_on_all_ranks() -> None:
    """No files are left, say; see test_control_descriptors.py."""

    def refuse(server: socket.socket, token: str) -> None:
        server.close()
        raise TransportError("no room for 3 ranks")

    def work(t: LocalTransport) -> Any:
        try:
            return meeting.come_to_hub(t.share, t.rank, 3, refuse, SOON)
        except TransportError as error:
            return error

    for error in LocalWorld(3).run(work):
        assert isinstance(error, TransportError) and re.search(r"rank 0 \(on .*\): no room for 3 ranks", str(error))


def test_a_hub_out_of_reach_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks may have reached it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        wrong = Address("127.0.0.1", unused.getsockname()[1])
        real, asked = socket.getaddrinfo, []

        def astray(host: str, port: int, *more: Any, **named: Any) -> Any:
            if threading.current_thread().name != "rank 1":
                return real(host, port, *more, **named)
            asked.append(Address(host, port))
            return real(*wrong, *more, **named)

        monkeypatch.setattr(socket, "getaddrinfo", astray)

        def work(t: LocalTransport) -> Any:
            try:
                return ControlPlane(t.rank, 3, 60.0).enter(t.share)
            except TransportError as error:
                return error

        for error in LocalWorld(3).run(work):
            assert isinstance(error, TransportError) and "rank 1 " in str(error) and "cannot reach rank 0" in str(error)
            assert asked and all(str(address) in str(error) for address in asked)
            assert str(error).count("Connection refused") == len(asked)
    assert comes(lambda: not listening()), "the hub goes on though the job never began"


@pytest.mark.parametrize("length", [0, 1, CELL_ROOM])
def test_cells(length: int) -> None:
    cell = pack_cell(b"\xff" * length)
    assert cell.nbytes == CELL_BYTES and unpack_cell(cell) == b"\xff" * length
