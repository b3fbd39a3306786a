"""Calls of the backend under the control plane's guard: their errors, their time limit, and what they hold is freed."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.control import ControlPlane
from tests.support.control import die, forever, job
from tests.support.waiting import comes


def test_guard_gives_the_result_and_translates_the_backends_error() -> None:
    def fail() -> None:
        raise RuntimeError("HcclAllGather failed, ret:9\n\n-----\n- C++ Call Stack\n-----\nfile.cc:12")

    def work(plane: ControlPlane) -> Any:
        assert plane.guard(lambda: 42, "thinking") == 42
        return plane.guard(fail, "all_gather of 12 bytes")

    (error,) = job(1, work)
    assert type(error) is TransportError and isinstance(error.__cause__, RuntimeError)
    assert "rank 0: all_gather of 12 bytes failed: RuntimeError: HcclAllGather failed, ret:9" in str(error)


class Held:
    """What a call refers to: a device's buffer, say."""


@pytest.fixture
def without_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("fails", [False, True])
def test_guard_frees_what_the_call_held_and_keeps_its_thread_for_the_next(fails: bool) -> None:
    """A thread that ends, or frees a tensor, while MindSpore takes itself down at exit may crash the process."""

    def work(plane: ControlPlane) -> list[int]:
        held = Held()
        gone = weakref.ref(held)
        threads = []

        def blocking(_held: Held = held) -> None:
            threads.append(threading.get_ident())
            if fails:
                raise ValueError("no")

        for _ in range(3):
            with contextlib.suppress(ValueError):
                plane.guard(blocking, "thinking")
        del held, blocking
        assert gone() is None
        return threads

    ((first, *others),) = job(1, work)
    assert others == [first, first] and first != threading.get_ident()
    assert first in {thread.ident for thread in threading.enumerate()}


@pytest.mark.usefixtures("without_gc")
@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_was_given_up_frees_what_it_held_when_it_returns(fails: bool) -> None:
    release = threading.Event()

    def work(plane: ControlPlane) -> weakref.ref[Held]:
        held = Held()

        def blocking(_held: Held = held) -> None:
            release.wait(10)
            if fails:
                raise ValueError("no")

        with pytest.raises(TransportError, match="waited"):
            plane.guard(blocking, "thinking")
        return weakref.ref(held)

    (held,) = job(1, work, timeout=0.1)
    assert held() is not None
    release.set()
    assert comes(lambda: held() is None)


def test_guard_ends_after_the_timeout() -> None:
    (error,) = job(1, lambda plane: plane.guard(forever, "a long exchange"), timeout=0.5)
    assert type(error) is TransportError and "waited 0.5 s in a long exchange" in str(error)


def test_a_backend_error_followed_by_news_of_a_death_names_the_dead() -> None:
    def fail() -> None:
        raise RuntimeError("AllGather failed.")

    def work(plane: ControlPlane) -> Any:
        if plane.rank == 1:
            time.sleep(0.5)
            return die(plane)
        return plane.guard(fail, "all_gather")

    error = job(2, work)[0]
    assert isinstance(error, PeerError) and error.rank == 1
