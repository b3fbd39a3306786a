"""Small messages between the processes of a job, and which of them are still alive: what `mccl` and `hccl` build on.

Rank 0 runs a hub, a thread with one TCP connection to every rank (its own included). A rank sends its payload; the
hub counts equal ones together, and when it has heard from all it answers with what differs: that all is well, or that
all digests are equal, costs each rank 32 bytes, however many ranks there are. Payloads whose sum would be too much for
one process to send are gathered over the backend (`gather`), and the hub only says so. Why not always a collective:

* A collective does not say who is missing, and waits long: MCCL 30 s (fixed, and it counts a rank that is merely slow
  as dead), HCCL 1836 s unless HCCL_EXEC_TIMEOUT says otherwise. MindSpore's own heartbeat ends survivors with SIGTERM
  after about 30 s, without an exception in Python. A connection, in contrast, closes the moment its process dies, so
  here every survivor raises PeerError with the rank's number within a second.
* A message need not queue behind bulk data on the communicator's stream: 0.2 ms for 4 ranks on one host, where an
  MCCL all-gather takes 6 to 10 ms.

A host that vanishes without closing its connections (power, cable) is noticed by its silence, within 30 s, whether or
not something was being sent to it; a process that is stopped, within a minute and a little more for each rank, since
the listening thread gives signs of life while the others compute or read. A process that is alive but does not come,
or does not read, is noticed and named by the hub after `timeout`; a hub that is silent, by each rank itself. Where
rank 0 is, only a collective can say: the ranks of a host first make sure that all of them are there (`gate`), and
wait for others by `guard`.

Blocking calls of the backend run in a thread of their own (`guard`), so this process hears of a dead rank while it
waits. Such a call cannot be cancelled: the survivor raises PeerError at once, but its process may linger at exit
until the backend gives up or the launcher kills it (msrun does, a second after the first rank failed).

While a process exits, MindSpore destroys its globals, which a thread that ends or wakes meanwhile may still use.
So threads of blocking calls wait for the next one rather than end (see `_Caller`), and `close` waits for listening
threads. A call that was given up, or a line never closed, may still wake at that time.

The connections carry no secrets and are not encrypted; a random token keeps others out, see `rendezvous.greeting`.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable, ClassVar, Generic, Optional, TypeVar

import numpy as np

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.base import Bytes
from ms_ckpt_ext.transport.hub.frames import LENGTH
from ms_ckpt_ext.transport.hub.limits import DEFAULT, ControlLimits
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES
from ms_ckpt_ext.transport.rendezvous.meeting import come_to_hub

_T = TypeVar("_T")

FIRST_MEETING = "the first meeting of all ranks over the backend, to which some of another host may not have come"
_POLL_SECONDS = 0.25


class _Call(Generic[_T]):
    """A blocking call, made in one thread and waited for in another."""

    def __init__(self, blocking: Callable[[], _T]) -> None:
        self._blocking: Optional[Callable[[], _T]] = blocking
        self._results: list[_T] = []
        self._error: Optional[BaseException] = None
        self.done = threading.Event()

    def make(self) -> None:
        """Make the call, then drop it: the waiting thread, if there still is one, frees what it refers to."""
        assert self._blocking is not None
        try:
            self._results.append(self._blocking())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            self._error = error
        self._blocking = None
        del self  # else an error would keep itself alive, and the call's buffers, by the frame in its traceback

    def result(self) -> _T:
        """What the call returned or raised, once; `done` must be set."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._results[0]
        finally:
            del error


class _Caller:
    """A thread that makes blocking calls one after another, and waits for the next one until the process ends.

    If it ended with its call, it would destroy MindSpore's thread-local objects, possibly while the process exits.
    """

    _idle: ClassVar[list[_Caller]] = []

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call[Any]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="ms_ckpt_ext caller", daemon=True).start()

    @classmethod
    def run(cls, call: _Call[Any]) -> None:
        """Have a thread make the call: one that is idle, else a new one. Returns at once."""
        try:
            caller = cls._idle.pop()
        except IndexError:
            caller = cls()
        caller._calls.put(call)

    def _work(self) -> None:
        while True:
            self._one(self._calls.get())

    def _one(self, call: _Call[Any]) -> None:
        call.make()
        done = call.done
        del call  # the waiting thread has the last reference
        self._idle.append(self)
        done.set()


class ControlPlane(Line):
    """One rank's connection to the hub, which rank 0 runs. Call `enter` before anything else.

    Args:
        timeout: seconds that one `share`, or one guarded call, may last while all ranks are alive.
        gather: how `share` exchanges payloads that are too large for a hub, over the backend.
        limits: see there; all ranks have the same.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        timeout: float,
        gather: Optional[Callable[[bytes], list[bytes]]] = None,
        limits: ControlLimits = DEFAULT,
    ) -> None:
        super().__init__(rank, size, timeout, limits)
        self._over_backend = gather
        self._hub: Optional[Hub] = None

    def enter(self, announce: Callable[[bytes], list[bytes]]) -> None:
        """Connect to rank 0, see `rendezvous.meeting`.

        Args:
            announce: all-gathers at most `CELL_ROOM` bytes per rank over the backend, under `guard`.

        Raises:
            TransportError: on all ranks, when any of them cannot connect to rank 0, or does not come.
        """
        try:
            self.attach(come_to_hub(announce, self.rank, self.size, self._open_hub, self.limits.connect_seconds))
        except BaseException:
            self._abandon()
            raise

    def _open_hub(self, server: socket.socket, token: str) -> None:
        self._hub = Hub(self.size, self.timeout, server, token, limits=self.limits)

    def guard(self, blocking: Callable[[], _T], doing: str) -> _T:
        """Run `blocking()` in a thread; stop waiting for it when a rank has died, or after `timeout` seconds.

        The backend's own error becomes a TransportError, or a PeerError when it is known which rank died. `blocking`
        keeps what it refers to alive, also when nothing waits any more: the backend may still write there.
        """
        call = _Call(blocking)
        _Caller.run(call)
        deadline = time.monotonic() + self.timeout
        while not call.done.wait(_POLL_SECONDS):
            self.check(doing)
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {self.rank} waited {self.timeout:g} s in {doing} though no rank is known to have died; "
                    "are all ranks at the same call? If the network is that slow, give a longer timeout"
                )
        with self.explaining(doing):
            return call.result()

    @contextlib.contextmanager
    def explaining(self, doing: str) -> Iterator[None]:
        """Turn a RuntimeError of the backend into what it means: PeerError if a rank has died, else TransportError."""
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            deadline = (
                time.monotonic() + self.limits.grace_seconds
            )  # for news of who died, so that the error can name the rank
            while self._failure is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS / 5)
            self.check(doing)
            raise TransportError(
                f"rank {self.rank}: {doing} failed: {_first_lines(error)}; another rank may have failed, or made "
                "another call: look at the other ranks' logs"
            ) from error

    def close(self) -> None:
        """Leave; a rank that waits for this one in `share` is told.

        Rank 0 waits until the others have left as well, but 2 s at most, and not when the job is known to be broken.
        """
        broken = self._failure is not None  # before the listener's end counts as a failure, too
        if not self._closed:
            super().close()
            if self._hub is not None and not broken:
                self._hub.join(self.limits.grace_seconds)

    def _gather(self, payload: bytes) -> list[bytes]:
        return super()._gather(payload) if self._over_backend is None else self._over_backend(payload)

    def _abandon(self) -> None:
        """End what was begun: the ranks did not meet."""
        super().close()
        if self._hub is not None:
            self._hub.stop()


def pack_cell(payload: bytes) -> Bytes:
    """`payload` as CELL_BYTES bytes, for a backend that gathers equal sizes only."""
    return np.frombuffer((LENGTH.pack(len(payload)) + payload).ljust(CELL_BYTES, b"\0"), np.uint8).copy()


def unpack_cell(cell: Bytes) -> bytes:
    """What `pack_cell` was given."""
    (length,) = LENGTH.unpack_from(cell.tobytes())
    return cell.tobytes()[LENGTH.size : LENGTH.size + length]


def _first_lines(error: BaseException) -> str:
    """What failed, and what the driver says about it: the start of MindSpore's errors, which go on for pages."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("-")]
    return f"{type(error).__name__}: {' / '.join(told[:3])}"
