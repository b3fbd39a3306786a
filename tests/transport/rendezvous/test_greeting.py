"""Addresses, messages in cells, and the greeting: values in, values out."""

from __future__ import annotations

import socket
from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.transport.local import LocalWorld
from ms_ckpt_ext.transport.rendezvous import greeting
from ms_ckpt_ext.transport.rendezvous.addresses import Address, Invitation, parse_address
from ms_ckpt_ext.transport.rendezvous.cells import CELL_ROOM, gather_messages
from ms_ckpt_ext.transport.rendezvous.greeting import Door, Guest, Unwelcome, new_token
from ms_ckpt_ext.transport.rendezvous.interfaces import network_identity, own_addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:80", Address("10.0.0.1", 80)),
        (" node-3.svc.cluster.local:65535 ", Address("node-3.svc.cluster.local", 65535)),
        ("[fd00::1]:1", Address("fd00::1", 1)),
        (":8118", Address("", 8118)),
    ],
)
def test_an_address_is_read(text: str, address: Address) -> None:
    assert parse_address(text) == address == parse_address(str(address))


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:0", "host:65536", "host:-1", "fd00::1:80", "a b:80", "h:x", "h:٣"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no address: write host:port"):
        parse_address(text)


def test_an_invitation_travels() -> None:
    invitation = Invitation((Address("10.0.0.1", 80), Address("fd00::1", 81), Address("name", 82)), new_token())
    assert Invitation.decode(invitation.encode()) == invitation
    assert len(bytes.fromhex(invitation.token)) == 16


@given(lengths=st.lists(st.sampled_from([0, 1, CELL_ROOM - 4, CELL_ROOM - 3, CELL_ROOM, 1000]), min_size=1, max_size=4))
def test_messages_of_any_length(lengths: list[int]) -> None:
    messages = [bytes([rank]) * length for rank, length in enumerate(lengths)]
    calls: list[int] = []

    def work(t: object) -> list[bytes]:
        def cells(part: bytes) -> list[bytes]:
            assert len(part) <= CELL_ROOM
            calls.append(len(part))
            return t.share(part)  # type: ignore[attr-defined, no-any-return]

        return gather_messages(cells, messages[t.rank])  # type: ignore[attr-defined]

    assert LocalWorld(len(lengths)).run(work) == [messages] * len(lengths)
    assert len(calls) == len(lengths) * max(1, -(-(max(lengths) + 4) // CELL_ROOM))


def talk(door: Door, guest: Guest, present: bool = False, step: Optional[int] = None) -> Optional[bool]:
    """Whether the rank is let in, with the bytes of either side in pieces of `step`."""
    to_guest, to_door, let_in = bytearray(), bytearray(), None
    pieces = bytearray(door.hail)
    while pieces:
        to_guest += pieces[:step]
        pieces = pieces[len(pieces[:step]) :]
        to_door += guest.hear(to_guest)
    for at in range(0, len(to_door), step or len(to_door)):
        received = bytearray(to_door[: at + (step or len(to_door))])
        if door.ask(received) is not None:
            answer, let_in = door.answer(present)
            to_guest += answer
            guest.hear(to_guest)
    return let_in


@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_rank_of_the_job_is_let_in(step: Optional[int]) -> None:
    token = new_token()
    guest = Guest(token, 3, 4)
    assert talk(Door(token, 2, 4), guest, step=step)
    assert guest.keeper == 2


@pytest.mark.parametrize(
    ("rank", "size", "present", "why"),
    [
        (3, 5, False, "of a job of another size"),
        (4, 4, False, "none of the job's"),
        (1, 4, True, "another process with its number is there already"),
    ],
)
def test_who_is_not_let_in_hears_why(rank: int, size: int, present: bool, why: str) -> None:
    with pytest.raises(Unwelcome, match=f"rank {rank} is not let in: .*{why}"):
        talk(Door("t", 0, 4), Guest("t", rank, size), present)


def test_neither_side_takes_a_stranger() -> None:
    with pytest.raises(Unwelcome, match="does not have the job's token"):
        talk(Door("this", 0, 4), Guest("that", 1, 4))
    with pytest.raises(Unwelcome, match="another program listens there"):
        Guest("t", 0, 4).hear(bytearray(b"SSH-2.0"))
    with pytest.raises(Unwelcome, match="does not speak as a rank does"):
        Door("t", 0, 4).ask(bytearray(b"GE"))
    guest = Guest("t", 0, 4)
    guest.hear(bytearray(Door("other", 0, 4).hail))
    with pytest.raises(Unwelcome, match="who listens there does not have the job's token"):
        guest.hear(bytearray(b"mcw1" + bytes(36)))


def test_what_was_recorded_is_of_no_use_and_the_token_never_travels() -> None:
    token = new_token()
    first, guest = Door(token, 0, 4), Guest(token, 1, 4)
    asked = guest.hear(bytearray(first.hail))
    assert len(asked) == 60 and token.encode() not in asked and bytes.fromhex(token) not in asked
    assert first.ask(bytearray(asked)) == 1
    with pytest.raises(Unwelcome):
        Door(token, 0, 4).ask(bytearray(asked))


def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bytes, bytes]] = []
    compare = greeting.hmac.compare_digest
    monkeypatch.setattr(greeting.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or compare(a, b))
    assert talk(Door("t", 0, 2), Guest("t", 1, 2))
    assert [len(proof) for pair in seen for proof in pair] == [32] * 4


def test_this_host() -> None:
    assert network_identity() == network_identity()
    for address in own_addresses():
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            pass
