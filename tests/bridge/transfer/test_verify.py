"""`verify` of a transfer: what each kind finds, and what it does not."""

from __future__ import annotations

from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import plan_transfer, rules, transfer
from ms_ckpt_ext.errors import LoadError, UsageError
from ms_ckpt_ext.transport.base import Handle
from tests.bridge.transfer.test_cells import GOLDEN, errors, filled, golden, poisoned, run
from tests.support.cells import HERE, threads  # noqa: F401 - a fixture
from tests.support.parameters import bytes_of

pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize(("one", "other"), [("dp2_tp2", "tp4"), ("tp4", "dp2_tp2")])
@pytest.mark.parametrize("verify", ["replicas", "full"])
@pytest.mark.parametrize("cast", [None, ms.bfloat16])
def test_what_is_right_is_right(one: str, other: str, verify: str, cast: Any) -> None:
    def work(rank: int) -> None:
        source, truth = filled(golden(one, rank)), golden(other, rank)
        target = poisoned(truth)
        if cast is not None:
            for place, parameter in list(target._params.items()):
                if parameter.dtype == ms.float32:
                    lossy = ms.Tensor(parameter.asnumpy(), cast)
                    target._params[place] = ms.Parameter(lossy, name=parameter.name)
        cuts = {
            f"{side}_strategy": GOLDEN / case / "strategy.ckpt" for side, case in (("source", one), ("target", other))
        }
        with plan_transfer(source, target, **cuts, verify=verify) as plan:
            plan.run()
            plan.run()
        held = bytes_of(target)
        for name, value in truth.items():
            lossy = cast is not None and value.dtype == np.float32
            assert held[name] == (ms.Tensor(value, cast).asnumpy() if lossy else value).tobytes()

    run(4, work)


class Flipping:
    """An exchange in which the last byte that comes is another."""

    def __init__(self, handle: Handle, recv: np.ndarray, nbytes: int) -> None:
        self._handle, self._recv, self._nbytes = handle, recv, nbytes

    def wait(self) -> None:
        self._handle.wait()
        self._recv[self._nbytes - 1] ^= 1


def flip() -> None:
    """Flip that byte from now on, on this rank."""
    start = HERE.transport.start_all_to_all

    def flipped(send: Any, send_counts: Any, recv: Any, recv_counts: Any) -> Any:
        return Flipping(start(send, send_counts, recv, recv_counts), recv, sum(recv_counts))

    HERE.transport.start_all_to_all = flipped


def rows(rank: int, start: int = 0) -> Any:
    return filled({"w": np.full((2, 4), start + rank, np.float32), "alike": np.full(3, 5, np.float32)})


CUT = {"w": ((2,), (0, -1)), "alike": ((2,), (-1,))}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_byte_that_flips_on_the_way(dtype: Any) -> None:
    """Rank 2 alone holds what it holds, so nobody can tell but the ranks that it took it from."""

    def work(rank: int, verify: str) -> Optional[str]:
        target = filled({"w": np.zeros((4, 4), dtype), "alike": np.zeros(3, np.float32)}) if rank == 2 else None
        with plan_transfer(rows(rank) if rank < 2 else None, target, source_strategy=CUT, verify=verify) as plan:
            if rank == 2:
                flip()
            plan.run()
        return None

    assert errors(3, lambda rank: work(rank, "replicas")) == [None] * 3
    found = errors(3, lambda rank: work(rank, "full"))
    assert all(isinstance(error, LoadError) and "rank 2 took" in str(error) for error in found), found
    assert found[2].changed and not found[0].changed


def test_ranks_of_the_source_that_differ() -> None:
    """Layouts say that ranks 0 and 2 hold the same rows; they do not any more."""
    replicated = {"w": ((2, 2), (0, -1)), "alike": ((4,), (-1,))}

    def work(rank: int, verify: str) -> None:
        source = rows(rank % 2)
        target = None if rank else filled({"w": np.zeros((4, 4), np.float32), "alike": np.zeros(3, np.float32)})
        with plan_transfer(source, target, source_strategy=replicated, verify=verify) as plan:
            plan.run()
            if rank == 2:
                source.p0.asnumpy()[0, 0] = 99
            plan.run()

    assert errors(4, lambda rank: work(rank, "replicas")) == [None] * 4
    found = errors(4, lambda rank: work(rank, "full"))
    assert all("'w'" in str(error) and "rank 2 holds digest" in str(error) for error in found), found


def test_what_is_computed_has_no_bytes_of_the_source() -> None:
    def work(rank: int) -> None:
        transfer(rows(rank), filled({"half": np.zeros((4, 4), np.float32)}), source_strategy=CUT, verify="full",
                 rules=[rules.Scale("w", "half", 0.5)])  # fmt: skip

    found = errors(2, work)
    assert all(isinstance(error, UsageError) and "a rule computes 'half'" in str(error) for error in found), found


def test_fused_and_interleaved() -> None:
    """Digests of boxes that lie in a view of what was filled."""
    fuse = [
        rules.QKV(["q", "k"], "qk", groups=4),
        rules.Interleave(["q", "k"], "pairs"),
        rules.Transpose("q", "turned"),
    ]

    def work(rank: int) -> None:
        whole = {
            "q": np.arange(64, dtype=np.float32).reshape(8, 8),
            "k": -np.arange(64, dtype=np.float32).reshape(8, 8),
        }
        source = filled({name: array[4 * rank : 4 * rank + 4] for name, array in whole.items()})
        target = filled({"qk": np.zeros((16, 4)), "pairs": np.zeros((8, 8), np.float32), "turned": np.zeros((8, 8))})
        cuts = {"qk": ((2,), (-1, 0)), "pairs": ((2,), (0, -1)), "turned": ((2,), (-1, -1))}
        how = {"source_strategy": dict.fromkeys("qk", ((2,), (0, -1))), "target_strategy": cuts}
        with plan_transfer(source, target, rules=fuse, verify="full", **how) as plan:
            plan.run()
        assert np.array_equal(target.p2.asnumpy(), whole["q"].T)
        flip()
        with plan_transfer(source, target, rules=fuse, verify="full", **how) as plan, pytest.raises(LoadError):
            plan.run()

    run(2, work)
