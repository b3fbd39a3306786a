"""Work on threads that ends with the first error, without `concurrent.futures`, which takes 10 ms to import.

Also what keeps the interpreter's collector of garbage from looking at all values again and again meanwhile.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Callable, Generic, Optional, TypeVar

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
    """Set by a thread that begins. Python waits for that without end, also where a thread died for lack of memory."""

    def wait(self, timeout: Optional[float] = None) -> bool:
        if any(super(_Begun, self).wait(_SLICE_SECONDS) for _ in range(_SLICES)):  # this process may be stopped in one
            return True
        raise MemoryError("a thread did not begin")


class _Thread(threading.Thread):
    """A thread of `spread`."""

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
        """Work, unless that came too late."""
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


def in_order(call: Callable[[_Item], _Result], items: Iterable[_Item], workers: int) -> list[_Result]:
    """`call` of every item, by so many threads; raises the error of the first item, in order, that has one."""
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
        # What stands before an item that was taken was taken, too. Ctrl-C comes before everything.
        raise errors[min(errors)] if errors and isinstance(failed, Exception) else failed
    return [results[number] for number in range(len(todo))]


_RARELY = 200_000
"""Values that are made before the collector looks for cycles among the newest."""


class _Collector:
    """The threshold of Python's collector of garbage, raised for as long as somebody wants it."""

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
