"""Work that is done by threads, in order."""

from __future__ import annotations

import _thread
import gc
import os
import threading
import time
from functools import partial
from typing import Callable

import pytest

from ms_ckpt_ext.errors import StorageError
from ms_ckpt_ext.storage.threads import ThreadPool, few_collections, in_order


@pytest.mark.parametrize("workers", [0, 1, 3, 50])
def test_results_stand_in_the_order_of_the_items(workers: int) -> None:
    used = set()

    def call(item: int) -> int:
        used.add(threading.get_ident())
        time.sleep(0.001 * (item % 3))
        return item * item

    assert in_order(call, range(20), workers) == [item * item for item in range(20)]
    assert len(used) <= max(1, workers)
    assert in_order(call, (), workers) == []


def test_two_threads_work_at_once() -> None:
    meet = threading.Barrier(2, timeout=30)
    assert len(in_order(lambda _: meet.wait(), range(2), 2)) == 2


def test_the_error_of_the_first_item_that_has_one_is_raised() -> None:
    """Whichever comes first; it keeps its cause, and what was not begun is left."""
    later, begun = threading.Event(), []

    def call(item: int) -> None:
        begun.append(item)
        if item == 3:
            later.wait(30)  # until the error of item 4 is there
            try:
                os.stat("/nowhere/at/all")
            except OSError as cause:
                raise ValueError("three") from cause
        if item == 4:
            later.set()
            raise ValueError("four")

    with pytest.raises(ValueError, match="three") as caught:
        in_order(call, range(1000), 2)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert len(begun) < 900


def no_thread(*_: object, **__: object) -> int:
    """What Python raises for lack of memory, or of processes that a user may have."""
    raise RuntimeError("can't start new thread")


def stillborn(*_: object, **__: object) -> int:
    """A thread that is there, and has no memory to begin with anything."""
    return 1


def late(run: Callable[[], object], *_: object, **__: object) -> int:
    """A thread that begins when it has been given up."""

    def begin() -> None:
        time.sleep(2.5)
        run()

    return _thread.start_new_thread(begin, ())


def without_threads(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_start_new_thread", "_start_joinable_thread"):  # the latter from Python 3.13 on
        monkeypatch.setattr(threading, name, start, raising=False)


def test_a_pool_makes_calls_in_order_and_raises_what_they_raise() -> None:
    made: list[int] = []

    def call(number: int) -> int:
        made.append(number)
        if number == 3:
            raise ValueError("three")
        return -number

    pool = ThreadPool(1, "count")
    pending = [pool.submit(partial(call, number)) for number in range(100)]
    assert [each.result() for each in pending[:3]] == [0, -1, -2]
    with pytest.raises(ValueError, match="three"):
        pending[3].result()
    assert pending[99].result() == -99
    assert made == [*range(100)]
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(lambda: None)


def test_a_pool_has_as_many_threads_as_are_busy_and_no_more_than_it_may() -> None:
    """Also where many threads submit at once: with one thread, calls are in order."""
    for most in (1, 3):
        pool, used = ThreadPool(most, "work"), set[str]()

        def call(used: set[str] = used) -> None:
            used.add(threading.current_thread().name)
            time.sleep(0.002)

        in_order(lambda _, pool=pool, call=call: [pool.submit(call).result() for _ in range(10)], range(8), 8)
        pool.close()
        assert used == {f"work-{number}" for number in range(most)}
    idle = ThreadPool(8, "work")
    for _ in range(5):
        assert idle.submit(lambda: 1).result() == 1
        time.sleep(0.01)
    assert sum(thread.name.startswith("work-") for thread in threading.enumerate()) == 1
    idle.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("work-")]


@pytest.mark.parametrize("finish", [False, True])
def test_a_pool_that_closes_drops_or_makes_what_was_not_begun(finish: bool) -> None:
    pool, began, go = ThreadPool(1, "work"), threading.Event(), threading.Event()

    def first() -> str:
        began.set()
        go.wait(30)
        return "first"

    pending = [pool.submit(first), pool.submit(lambda: "second")]
    began.wait(30)
    closing = threading.Thread(target=partial(pool.close, finish))
    closing.start()
    if not finish:
        with pytest.raises(RuntimeError, match="closed before"):
            pending[1].result()
    go.set()
    closing.join()
    assert pending[0].result() == "first"
    assert not finish or pending[1].result() == "second"


@pytest.mark.parametrize("start", [no_thread, stillborn, late])
def test_a_pool_that_gets_no_thread_says_so_and_one_that_gets_few_has_those(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    go, pool = threading.Event(), ThreadPool(4, "read")
    held = pool.submit(lambda: go.wait(30))
    with monkeypatch.context() as patch:
        without_threads(start, patch)
        later = pool.submit(lambda: 5)
        with pytest.raises(StorageError, match="start a thread to read: Cannot allocate memory") as caught:
            ThreadPool(4, "read").submit(lambda: 5)
        assert isinstance(caught.value, MemoryError)
    go.set()
    assert held.result()
    assert later.result() == 5
    pool.close()


@pytest.mark.parametrize("start", [no_thread, stillborn, late])
def test_where_the_system_gives_no_thread_the_calling_one_does_it_all(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def call(item: int) -> int:
        used.append(threading.get_ident())
        return item

    without_threads(start, monkeypatch)
    assert in_order(call, range(5), 4) == [*range(5)]
    if start is late:
        time.sleep(1.0)
    assert used == [threading.get_ident()] * 5


@pytest.mark.parametrize("workers", [1, 2])
def test_what_an_error_came_out_of_is_kept(workers: int) -> None:
    def call(_: int) -> None:
        try:
            os.stat("/nowhere/at/all")
        except OSError:
            raise ValueError("implicit")  # noqa: B904 - the context is what is tested

    with pytest.raises(ValueError, match="implicit") as caught:
        in_order(call, range(3), workers)
    assert isinstance(caught.value.__context__, FileNotFoundError)
    assert not caught.value.__suppress_context__


def test_an_interruption_is_passed_on() -> None:
    def call(item: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_order(call, range(10), 3)


def test_the_collector_rests_for_as_long_as_somebody_wants_it() -> None:
    before = gc.get_threshold()
    first, second = few_collections(), few_collections()
    first.__enter__()
    second.__enter__()
    assert gc.get_threshold() == (200_000, *before[1:])
    first.__exit__(None, None, None)  # in another order than they came: two jobs on two threads
    assert gc.get_threshold() == (200_000, *before[1:])
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


@pytest.mark.parametrize("threshold", [0, 300_000])
def test_a_collector_that_is_off_or_rests_already_is_left_alone(threshold: int) -> None:
    before = gc.get_threshold()
    gc.set_threshold(threshold, *before[1:])
    try:
        with few_collections():
            assert gc.get_threshold()[0] == threshold
        assert gc.get_threshold()[0] == threshold
    finally:
        gc.set_threshold(*before)


def test_a_threshold_that_is_set_meanwhile_stays() -> None:
    before = gc.get_threshold()
    try:
        with pytest.raises(KeyError), few_collections():
            gc.set_threshold(5_000, *before[1:])
            raise KeyError
        assert gc.get_threshold()[0] == 5_000
    finally:
        gc.set_threshold(*before)
