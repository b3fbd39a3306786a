"""What goes wrong between runs and within one: all ranks are told, and nothing is half-written without an error."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Callable, Optional
from unittest import mock

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import plan_transfer
from ms_ckpt_ext.errors import LayoutMismatchError, LoadError, PeerError, TransportError, UsageError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from ms_ckpt_ext.transport.select import lent
from tests.bridge.transfer.test_cells import filled
from tests.support.cells import HERE, threads  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("threads")
ROWS, COLUMNS = dict.fromkeys("ab", ((2,), (0, -1))), dict.fromkeys("ab", ((2,), (-1, 0)))
VICTIM = 1


def run(work: Callable[[int], Any], timeout: float = 20.0) -> list[Any]:
    """Run `work` on two ranks, each of which leaves the world when it closes its transport; the world may fail."""
    found = {}

    def rank(transport: LocalTransport) -> None:
        HERE.transport = transport
        with lent(transport):
            found[transport.rank] = work(transport.rank)

    world = LocalWorld(2, timeout=timeout)
    with suppress(TransportError):
        world.run(rank)
    assert not world.errors
    return [found[rank] for rank in range(2)]


def slices(rank: int, start: float = 0.0) -> dict[str, np.ndarray]:
    """Two rows of `a` and of `b`, of four."""
    whole = np.arange(4 * 512, dtype=np.float32).reshape(4, 512) + start
    return {"a": whole[2 * rank : 2 * rank + 2], "b": -whole[2 * rank : 2 * rank + 2]}


def right(rank: int, start: float = 0.0) -> dict[str, bytes]:
    """Half of the columns of both."""
    whole = np.arange(4 * 512, dtype=np.float32).reshape(4, 512) + start
    half = whole[:, 256 * rank : 256 * rank + 256]
    return {"a": half.tobytes(), "b": (-half).tobytes()}


class Fragile(ms.Tensor):
    """Fails when it is told that it has its data, if `broken`."""

    broken = False

    @property
    def init_param(self) -> bool:
        if self.broken:
            raise RuntimeError("the memory is gone")
        return True


class Job:
    """A plan on this rank, from rows to columns, in many rounds."""

    def __init__(self, rank: int, **more: Any) -> None:
        self.rank, self.source = rank, {name: Fragile(value) for name, value in slices(rank).items()}
        self.target = {name: Fragile(np.full((4, 256), 77, np.float32)) for name in "ab"}
        how = {"source_strategy": ROWS, "target_strategy": COLUMNS, "bucket_bytes": 4096, **more}
        self.plan = plan_transfer(self.source, self.target, **how)

    def fail(self) -> Exception:
        """A run that fails: what it is told. What it does not name is as it was."""
        before = self.held()
        try:
            self.plan.run()
        except Exception as error:
            changed = {name for name, data in self.held().items() if data != before.get(name)}
            assert changed <= set(error.changed if isinstance(error, LoadError) else ())
            return error
        raise AssertionError("no error")

    def succeed(self, start: float = 0.0) -> None:
        self.plan.run()
        assert self.held() == right(self.rank, start)

    def held(self) -> dict[str, bytes]:
        return {name: tensor.asnumpy().tobytes() for name, tensor in self.target.items()}


def check(found: list[Any], kind: type[Exception], *said: str) -> None:
    """The victim raises it, the other is told."""
    assert isinstance(found[VICTIM], kind) and isinstance(found[1 - VICTIM], (PeerError, LoadError)), found
    assert all(text in str(error) for error in found for text in said), found


def test_other_parameters_of_the_same_names_are_found() -> None:
    """By name, also where a side has other objects than it had when the transfer was planned."""

    def work(rank: int) -> None:
        job = Job(rank)
        job.succeed()
        job.source.update({name: ms.Parameter(ms.Tensor(value)) for name, value in slices(rank, 5.0).items()})
        job.target["a"] = ms.Parameter(ms.Tensor(np.zeros((4, 256), np.float32)))
        job.succeed(5.0)
        job.target["a"] = half = ms.Parameter(ms.Tensor(np.zeros((4, 256), np.float16)))
        job.plan.run()
        wanted = np.frombuffer(right(rank, 5.0)["a"], np.float32).reshape(4, 256).astype(np.float16)
        assert np.array_equal(half.asnumpy(), wanted)
        job.plan.close()

    run(work)


def test_a_cell_whose_parameter_was_replaced() -> None:
    def work(rank: int) -> None:
        source, target = filled({"w": np.full((2, 3), rank, np.float32)}), filled({"w": np.zeros((4, 3), np.float32)})
        with plan_transfer(source, target, source_strategy={"w": ROWS["a"]}) as plan:
            plan.run()
            source._params["p0"] = ms.Parameter(ms.Tensor(np.full((2, 3), rank + 5, np.float32)), name="w")
            plan.run()
        assert target.p0.asnumpy()[:, 0].tolist() == [5, 5, 6, 6]

    run(work)


def gone(side: dict[str, Any]) -> None:
    del side["a"]


def longer(side: dict[str, Any]) -> None:
    side["a"] = ms.Tensor(np.zeros((8, 512), np.float32))


def of_ints(side: dict[str, Any]) -> None:
    side["a"] = ms.Tensor(np.zeros(side["a"].shape, np.int32))


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (gone, UsageError, "has no parameter 'a' any more"),
        (longer, LayoutMismatchError, "Float32 of shape [8, 512] now"),
        (of_ints, LayoutMismatchError, "Int32 of shape"),
    ],
)
def test_a_cell_that_was_changed_is_refused(side: str, change: Callable[[Any], None], kind: Any, said: str) -> None:
    def work(rank: int) -> Exception:
        job = Job(rank)
        job.succeed()
        given = getattr(job, side)
        as_it_was = dict(given)
        if rank == VICTIM:
            change(given)
        error = job.fail()
        given.update(as_it_was)
        job.succeed()
        job.plan.close()
        return error

    check(run(work), kind, said, "'a'", "nothing was moved", side)


def test_a_parameter_of_both_sides_that_parts() -> None:
    def work(rank: int) -> Exception:
        source = filled(slices(rank))
        target = {"a": source.p0, "b": ms.Parameter(ms.Tensor(np.zeros((4, 256), np.float32)), name="b")}
        cuts = {"source_strategy": ROWS, "target_strategy": {"a": ROWS["a"], "b": COLUMNS["b"]}}
        with plan_transfer(source, target, **cuts) as plan:
            plan.run()
            if rank == VICTIM:
                target["a"] = ms.Parameter(ms.Tensor(np.zeros((2, 512), np.float32)), name="a")
            with pytest.raises((UsageError, PeerError)) as told:
                plan.run()
        return told.value

    check(run(work), UsageError, "'a' of the target", "plan anew")


@pytest.mark.parametrize("verify", ["none", "replicas"])
def test_a_piece_that_does_not_land(verify: str) -> None:
    started = set(threading.enumerate())

    def work(rank: int) -> Exception:
        job = Job(rank, verify=verify)
        last = job.target["b"]
        last.broken = rank == VICTIM
        error = job.fail()
        last.broken = False
        job.succeed()
        job.plan.close()
        return error

    check(run(work), LoadError, "the memory is gone", "run it again")
    assert not [each for each in set(threading.enumerate()) - started if each.name.startswith("digest")]


def test_an_exchange_that_fails_on_one_rank() -> None:
    """The others are in the middle of it, and are told at once; the plan is of no use any more."""
    began = time.monotonic()

    def work(rank: int) -> Exception:
        job = Job(rank)
        job.succeed()
        if rank == VICTIM:
            HERE.transport.start_all_to_all = mock.Mock(side_effect=RuntimeError("the link is down"))
        error = job.fail()
        with pytest.raises(TransportError):
            job.plan.run()
        job.plan.close()
        job.plan.close()
        return error

    found = run(work, timeout=60)
    check(found, LoadError)
    assert "the link is down" in str(found[VICTIM]) and f"rank {VICTIM} ended before" in str(found[0])
    assert time.monotonic() - began < 50


def test_a_rank_that_never_comes() -> None:
    """It is waited for as long as was said, and named; nothing was moved."""
    given_up = threading.Event()

    def work(rank: int) -> Optional[Exception]:
        job = Job(rank)
        job.succeed()
        if rank == VICTIM:
            given_up.wait(30)
        job.source["a"].asnumpy()[:] = 3
        error = job.fail()
        given_up.set()
        assert job.held() == right(rank)
        job.plan.close()
        return error

    late = run(work, timeout=1)
    assert all(isinstance(error, TransportError) and "rank 1 did not come (waited 1 s)" in str(error) for error in late)
