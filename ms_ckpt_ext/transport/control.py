"""Small messages between the processes of a job, and who of them is still alive: what `mccl` and `hccl` build on.

Rank 0 keeps a hub, a thread with one TCP connection to every rank (its own included). A rank sends its payload; when
the hub has one of everybody it sends all of them back. Why not a collective of the backend:

* A collective does not say who is missing, and waits long: MCCL 30 s (fixed, and it counts a rank that is merely slow
  as dead), HCCL 1836 s unless HCCL_EXEC_TIMEOUT says otherwise. MindSpore's own heartbeat ends survivors with SIGTERM
  after about 30 s, without a word to Python. A connection, in contrast, closes in the moment its process dies, so
  here every survivor raises PeerError with the rank's number within a second.
* A message need not queue behind bulk data on the communicator's stream: 0.2 ms for 4 ranks on one host, where an
  MCCL all-gather takes 6 to 10 ms.

A host that vanishes without closing its connections (power, cable) is noticed by TCP keep-alive after about 30 s; a
process that lives but never comes, by the hub after `timeout`, which then names it.

Blocking calls of the backend run in a thread of their own (`guard`), so this process hears of a dead rank while it
waits. Such a call cannot be taken back: the survivor raises PeerError at once, but its process may linger at exit
until the backend gives up or the launcher kills it (msrun does, a second after the first rank failed).

While a process exits MindSpore takes its globals down, and a thread that ends or wakes meanwhile does so amid ruins.
So threads of blocking calls wait for the next one rather than end (see `_Caller`), and `close` waits for those that
listen. What was given up, or never closed, may still come back at that time.

The connections carry no secrets and are not encrypted; a random token keeps other jobs out.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, Callable, ClassVar, Generic, Optional, TypeVar

import numpy as np

from ms_ckpt_ext.errors import PeerError, TransportError, name_ranks
from ms_ckpt_ext.transport.base import Bytes
from ms_ckpt_ext.transport.hub import BYE, DATA, FRAME, GONE, HELLO, LENGTH, Hub, take_frames, tune

T = TypeVar("T")

CELL_BYTES = 128
"""What `announce` all-gathers: 8 bytes of length, the rest of contents."""

_CONNECT_SECONDS = 20.0
_POLL_SECONDS = 0.25
_GRACE_SECONDS = 2.0
"""How long to wait, after the backend failed, for news of who died, so that the error can name the rank; and, in
`close`, for threads that are about to end."""


class _Call(Generic[T]):
    """A blocking call, made in one thread and waited for in another."""

    def __init__(self, blocking: Callable[[], T]) -> None:
        self._blocking: Optional[Callable[[], T]] = blocking
        self._results: list[T] = []
        self._error: Optional[BaseException] = None
        self.done = threading.Event()

    def make(self) -> None:
        """Make the call, and let go of it: what it refers to is freed by who waits, if anybody still does."""
        assert self._blocking is not None
        try:
            self._results.append(self._blocking())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            self._error = error
        self._blocking = None
        del self  # else an error would keep itself alive, and the call's buffers, by the frame in its traceback

    def result(self) -> T:
        """What the call returned or raised, once; `done` must be set."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._results[0]
        finally:
            del error


class _Caller:
    """A thread that makes blocking calls one after another, and waits for the next one to the end of the process.

    Were it to end with its call, it would destroy MindSpore's thread-local objects, possibly while the process exits.
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
        del call  # who waits has the last reference
        self._idle.append(self)
        done.set()


class ControlPlane:
    """One rank's connection to the hub.

    Args:
        announce: all-gathers at most `CELL_BYTES - 8` bytes per rank over the backend; used twice, here.
        timeout: seconds that one `share`, or one guarded call, may last while all ranks are alive.
        host: address of this process that the other ranks can connect to; only rank 0's is used.

    Raises:
        TransportError: on all ranks, when any of them cannot connect to rank 0.
    """

    def __init__(
        self, rank: int, size: int, announce: Callable[[bytes], list[bytes]], timeout: float, host: str
    ) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self._failure: Optional[TransportError] = None
        self._answers: queue.Queue[Optional[bytes]] = queue.Queue()
        self._closed = False
        self._hub = Hub(size, timeout, host) if rank == 0 else None
        try:
            self._enter(announce)
        except BaseException:
            if self._hub is not None:
                self._hub.stop()
            raise
        self._listener = threading.Thread(target=self._listen, name="ms_ckpt_ext control", daemon=True)
        self._listener.start()

    def share(self, payload: bytes, doing: str = "share") -> list[bytes]:
        """Every rank's payload in rank order. Raises PeerError or TransportError; `doing` is for their messages."""
        self.check(doing)
        with contextlib.suppress(OSError):  # the hub is gone: the listener knows, or will in a moment
            self._socket.sendall(FRAME.pack(DATA, self.rank, len(payload)) + payload)
        answer = self._answers.get()  # an answer that came before bad news is still an answer
        if answer is None:
            self.check(doing)
        assert answer is not None
        return _split(answer, self.size)

    def guard(self, blocking: Callable[[], T], doing: str) -> T:
        """Run `blocking()` in a thread; stop waiting for it when a rank has died, or after `timeout` seconds.

        The backend's own error becomes a TransportError, or a PeerError when it is known who died. `blocking` keeps
        whatever it refers to alive, also after nobody waits any more: the backend may still write there.
        """
        call = _Call(blocking)
        _Caller.run(call)
        deadline = time.monotonic() + self.timeout
        while not call.done.wait(_POLL_SECONDS):
            self.check(doing)
            if time.monotonic() > deadline:
                raise TransportError(
                    f"rank {self.rank} waited {self.timeout:g} s in {doing} though no rank has died; "
                    "are all ranks at the same call? If the network is that slow, give a longer timeout"
                )
        with self.explaining(doing):
            return call.result()

    def check(self, doing: str) -> None:
        """Raise if the job is known to be broken."""
        if self._failure is not None:
            message = f"rank {self.rank}, in {doing}: {self._failure}"
            if isinstance(self._failure, PeerError):
                raise PeerError(message, self._failure.rank)
            raise TransportError(message)

    @contextlib.contextmanager
    def explaining(self, doing: str) -> Iterator[None]:
        """Turn a RuntimeError of the backend into what it means: PeerError if a rank has died, else TransportError."""
        try:
            yield
        except TransportError:
            raise
        except RuntimeError as error:
            deadline = time.monotonic() + _GRACE_SECONDS
            while self._failure is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS / 5)
            self.check(doing)
            raise TransportError(
                f"rank {self.rank}: {doing} failed: {_first_lines(error)}; another rank may have failed, or made "
                "another call: look at the other ranks' logs"
            ) from error

    def close(self) -> None:
        """Leave; a rank that waits for this one in `share` is told so.

        Rank 0 waits until the others have left as well, but 2 s at most, and not when the job is known to be broken.
        """
        if self._closed:
            return
        self._closed, broken = True, self._failure is not None  # before the listener's end counts as a failure, too
        with contextlib.suppress(OSError):  # the hub is gone already
            self._socket.sendall(FRAME.pack(BYE, self.rank, 0))
            self._socket.shutdown(socket.SHUT_WR)
        self._listener.join(_GRACE_SECONDS)
        if self._hub is not None and not broken:
            self._hub.join(_GRACE_SECONDS)

    def _enter(self, announce: Callable[[bytes], list[bytes]]) -> None:
        """Connect to rank 0, whose address goes around; all ranks raise when any of them cannot."""
        address = announce(self._hub.address.encode() if self._hub else b"")[0].decode()
        problem = self._connect(address)
        problems = announce(problem.encode()[: CELL_BYTES - 8])
        failed = [peer for peer, text in enumerate(problems) if text]
        if failed:
            if not problem:
                self._socket.close()
            raise TransportError(
                f"{name_ranks(failed)} cannot connect to rank 0: {problems[failed[0]].decode(errors='replace')}; "
                "allow TCP connections between the hosts of the job"
            )

    def _connect(self, address: str) -> str:
        """Why it failed, or nothing."""
        host, port, token = address.rsplit(" ", 2)
        try:
            self._socket = socket.create_connection((host, int(port)), _CONNECT_SECONDS)
            self._socket.settimeout(None)
            tune(self._socket)
            self._socket.sendall(FRAME.pack(HELLO, self.rank, len(token)) + token.encode())
        except OSError as error:
            return f"{host}:{port}: {error}"
        return ""

    def _listen(self) -> None:
        """Thread: receive what the hub sends until it or this rank leaves."""
        received = bytearray()
        while True:
            try:
                chunk = self._socket.recv(1 << 16)
            except OSError:
                chunk = b""
            if not chunk:
                break
            received += chunk
            for kind, rank, body in take_frames(received):
                if kind == DATA:
                    self._answers.put(body)
                else:
                    self._break(kind, rank, body.decode(errors="replace"))
        self._break(GONE, 0, "rank 0 is gone: its process ended or was killed; look at its log for the cause")
        self._socket.close()

    def _break(self, kind: bytes, rank: int, message: str) -> None:
        if self._failure is None:
            self._failure = PeerError(message, rank) if kind == GONE else TransportError(message)
        self._answers.put(None)


def pack_cell(payload: bytes) -> Bytes:
    """`payload` as CELL_BYTES bytes, for a backend that gathers equal sizes only."""
    return np.frombuffer((LENGTH.pack(len(payload)) + payload).ljust(CELL_BYTES, b"\0"), np.uint8).copy()


def unpack_cell(cell: Bytes) -> bytes:
    """What `pack_cell` was given."""
    (length,) = LENGTH.unpack_from(cell.tobytes())
    return cell.tobytes()[LENGTH.size : LENGTH.size + length]


def reachable_host() -> str:
    """This host's address as the job sees it: that of the interface which leads to MindSpore's scheduler."""
    scheduler = os.environ.get("MS_SCHED_HOST", "127.0.0.1")
    port = int(os.environ.get("MS_SCHED_PORT", "8118"))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(scheduler, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # UDP: nothing is sent
            host: str = probe.getsockname()[0]
            return host
    except OSError:
        return socket.gethostname()


def _split(answer: bytes, size: int) -> list[bytes]:
    parts, at = [], 0
    for _ in range(size):
        (length,) = LENGTH.unpack_from(answer, at)
        at += LENGTH.size
        parts.append(answer[at : at + length])
        at += length
    return parts


def _first_lines(error: BaseException) -> str:
    """MindSpore's errors go on for pages: what failed, and what the driver says about it."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("-")]
    return f"{type(error).__name__}: {' / '.join(told[:3])}"
