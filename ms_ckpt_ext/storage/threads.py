"""Work on threads that does not wait, as `concurrent.futures` does, for a thread that has no memory to begin.

Also what keeps Python's garbage collector from looking at all values again and again meanwhile.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Callable, Generic, Optional, TypeVar, cast

from ms_ckpt_ext.errors import named

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_SLICES, _SLICE_SECONDS = 20, 0.1
"""How long a thread may take to begin."""
Make = Callable[[Callable[[], bool]], Callable[[_Item], None]]


def spread(items: Iterator[_Item], workers: int, make: Make[_Item]) -> None:
    """Have threads (the calling one is one of them) take items until none are left.

    The first error stops the others and is raised. Where the system gives no more threads, there are fewer.

    Args:
        make: called by each thread, with a function that tells whether another thread has failed; returns what the
            thread does with an item.
    """
    source = _Shared(items)
    threads: list[_Thread] = []
    try:
        while len(threads) < workers - 1:
            threads.append(_Thread(partial(_work, source, make), f"worker-{len(threads)}"))
            if not threads[-1].begins():
                threads.pop()
                break
        _work(source, make)
    except BaseException as error:  # noqa: BLE001 - such as Ctrl-C; raised below
        source.fail(error)
    for thread in threads:
        _join(thread, source)
    if source.error is not None:
        raise named(source.error, "read or write files")


class _Begun(threading.Event):
    """Set by a thread that begins. Python waits for that without end, even where a thread died for lack of memory."""

    def wait(self, timeout: Optional[float] = None) -> bool:
        if any(super(_Begun, self).wait(_SLICE_SECONDS) for _ in range(_SLICES)):  # the process may be suspended in one
            return True
        raise MemoryError("a thread did not begin")


class _Thread(threading.Thread):
    """A thread of `spread` or of a `ThreadPool`."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work_off = work
        self._started = _Begun()
        self._lock = threading.Lock()
        self._begun = self._given_up = False

    def begins(self) -> bool:
        """Start it; False where the system gives no thread, or no memory for one: then it never works."""
        try:
            self.start()
        except (RuntimeError, MemoryError):
            with self._lock:
                self._given_up = not self._begun
        return not self._given_up

    def run(self) -> None:
        """Work, unless `begins` has given up waiting."""
        with self._lock:
            self._begun = not self._given_up
        if self._begun:
            self._work_off()


def _join(thread: threading.Thread, source: _Shared[_Item]) -> None:
    """Wait for a thread even through a Ctrl-C: the caller closes the files it writes to."""
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:  # noqa: BLE001 - stops the threads; raised by spread()
            source.fail(error)


class _Shared(Generic[_Item]):
    """An iterator that threads take from, and the first error any of them met."""

    def __init__(self, items: Iterator[_Item]) -> None:
        self._items = items
        self._lock = threading.Lock()
        self.error: Optional[BaseException] = None

    def take(self) -> Optional[_Item]:
        with self._lock:
            return None if self.error is not None else next(self._items, None)

    def stopped(self) -> bool:
        return self.error is not None

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error


def _work(source: _Shared[_Item], make: Make[_Item]) -> None:
    try:
        do = make(source.stopped)
        while (item := source.take()) is not None:
            do(item)
    except BaseException as error:  # noqa: BLE001 - handed to the caller of spread()
        source.fail(error)


class Pending(Generic[_Result]):
    """A call that a `ThreadPool` makes."""

    def __init__(self, call: Callable[[], _Result]) -> None:
        self._call: Optional[Callable[[], _Result]] = call
        self._ended = threading.Event()
        self._result: Optional[_Result] = None
        self._error: Optional[BaseException] = None

    def make(self) -> None:
        """Make the call, and keep what comes of it; what it was given is let go."""
        call, self._call = self._call, None
        try:
            self._result = call() if call is not None else None
        except BaseException as error:  # noqa: BLE001 - raised by result()
            self._error = error
        self._ended.set()

    def drop(self) -> None:
        """Give up the call: `result` raises a RuntimeError."""
        self._error, self._call = RuntimeError("the pool was closed before it began this"), None
        self._ended.set()

    def result(self) -> _Result:
        """Wait for the call; returns what it returned, or raises what it raised."""
        self._ended.wait()
        if self._error is not None:
            raise self._error
        return cast(_Result, self._result)


class ThreadPool:
    """Threads that make calls in the order in which they were submitted.

    A thread is started when a call finds none free, up to `workers`. Where the system gives fewer, those do the work.
    """

    def __init__(self, workers: int, name: str) -> None:
        self._most, self._name = workers, name
        self._threads: list[_Thread] = []
        self._starting = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[Pending[object]] = deque()
        self._free, self._closed = 0, False

    def submit(self, call: Callable[[], _Result]) -> Pending[_Result]:
        """Have a thread make a call. Any thread may submit.

        Raises:
            StorageError, also a MemoryError: the system gives not a single thread.
            RuntimeError: the pool is closed.
        """
        pending = Pending(call)
        with self._starting:
            if len(self._threads) < self._most and len(self._waiting) >= self._free:
                self._add_thread()
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._waiting.append(cast("Pending[object]", pending))
            self._changed.notify()
        return pending

    def _add_thread(self) -> None:
        thread = _Thread(self._serve, f"{self._name}-{len(self._threads)}")
        if thread.begins():
            self._threads.append(thread)
        elif self._threads:
            self._most = len(self._threads)
        else:
            raise named(MemoryError("no thread began"), f"start a thread to {self._name}")

    def _serve(self) -> None:
        while (pending := self._next()) is not None:
            pending.make()

    def _next(self) -> Optional[Pending[object]]:
        with self._changed:
            self._free += 1
            while not self._waiting and not self._closed:
                self._changed.wait()
            self._free -= 1
            return self._waiting.popleft() if self._waiting else None

    def close(self, finish: bool = False) -> None:
        """Wait for the calls that were begun, and end.

        Args:
            finish: whether those that were not begun are made, too; else they are dropped.
        """
        with self._changed:
            self._closed = True
            dropped = [] if finish else list(self._waiting)
            if not finish:
                self._waiting.clear()
            self._changed.notify_all()
        for pending in dropped:
            pending.drop()
        for thread in self._threads:
            thread.join()


def in_order(call: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> list[_Result]:
    """`call` of every item, by `workers` threads; raises the error of the first item, in order, that has one."""
    results: dict[int, _Result] = {}
    errors: dict[int, BaseException] = {}

    def make(_stopped: Callable[[], bool]) -> Callable[[tuple[int, _Item]], None]:
        def do(numbered: tuple[int, _Item]) -> None:
            number, item = numbered
            try:
                results[number] = call(item)
            except BaseException as error:
                errors[number] = error
                raise

        return do

    todo = list(items)
    failed: Optional[BaseException] = None
    try:
        spread(iter(enumerate(todo)), min(workers, len(todo)), make)
    except BaseException as error:  # noqa: BLE001 - raised below
        failed = error
    if failed is not None:
        # All items before one that was taken were taken, too. Ctrl-C comes before everything.
        raise errors[min(errors)] if errors and isinstance(failed, Exception) else failed
    return [results[number] for number in range(len(todo))]


_RARELY = 200_000
"""Values that are made before the collector looks for cycles among the newest."""


class _Collector:
    """The threshold of Python's garbage collector, raised for as long as somebody wants it."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, 0

    def calm(self) -> None:
        with self._lock:
            first, *others = gc.get_threshold()
            if not self._users:
                self._before = first
                gc.set_threshold(max(first, _RARELY) if first else 0, *others)
            self._users += 1

    def wake(self) -> None:
        with self._lock:
            self._users -= 1
            first, *others = gc.get_threshold()
            if not self._users and first == _RARELY:  # else somebody has set another meanwhile
                gc.set_threshold(self._before, *others)


_collector = _Collector()


@contextmanager
def few_collections() -> Iterator[None]:
    """Look for cycles of values rarely: a table of contents is hundreds of thousands of values that live to the end.

    With Python's own threshold that takes a fifth to a half of the time of a job with many tensors. For as long as
    anyone in the process wants it.
    """
    _collector.calm()
    try:
        yield
    finally:
        _collector.wake()
