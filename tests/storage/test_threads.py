"""Work that is done by threads, in order."""

from __future__ import annotations

import _thread
import gc
import os
import threading
import time
from typing import Callable

import pytest

from ms_ckpt_ext.storage.threads import few_collections, in_order


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


@pytest.mark.parametrize("start", [no_thread, stillborn, late])
def test_where_the_system_gives_no_thread_the_calling_one_does_it_all(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def call(item: int) -> int:
        used.append(threading.get_ident())
        return item

    for name in ("_start_new_thread", "_start_joinable_thread"):  # the latter from Python 3.13 on
        monkeypatch.setattr(threading, name, start, raising=False)
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
