"""Rules that compute, in transfers: what arrives is what a parameter is computed from, whoever holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import plan_transfer, rules, transfer
from ms_ckpt_ext.errors import UsageError
from tests.bridge.transfer.test_cells import filled, run
from tests.support.cells import threads  # noqa: F401 - a fixture
from tests.support.parameters import bytes_of
from tests.support.quantised import Tensor, dequantised

pytestmark = pytest.mark.usefixtures("threads")
RULES = [
    rules.Dequantize(["blocks", "scales"], "dense", block=(4, 8), dtype="F32"),
    rules.Scale("w", "half", 0.5, dtype="BF16"),
    rules.Scale("half.first", "whole", 4.0),
    rules.Pad("rows", "longer", 12, value=2.5),
    rules.Crop("padded", "shorter", 6),
    rules.AddProduct(["base", "b", "a"], "adapted", 0.25),
    rules.Concat(["half", "half.second"], "joined"),
]
ROWS, COLUMNS = (0, -1), (-1, 0)
CUT_BY_COLUMNS = ("rows", "base", "scales")
TAKEN = {"dense": COLUMNS, "whole": ROWS, "longer": ROWS, "shorter": COLUMNS, "adapted": ROWS, "joined": ROWS}


def bfloat16(array: np.ndarray) -> np.ndarray:
    return ms.Tensor(array).astype(ms.bfloat16).asnumpy()


def source() -> dict[str, np.ndarray]:
    """All of it, small whole numbers where something is summed up."""
    rng = np.random.default_rng(0)
    full = {"blocks": rng.integers(0, 126, (8, 8), np.uint8), "scales": rng.standard_normal((2, 2), np.float32)}
    full |= {name: rng.standard_normal((8, 16), np.float32) for name in ("w", "half.first", "rows", "padded")}
    full["half.second"] = bfloat16(rng.standard_normal((4, 16), np.float32))
    shapes = {"base": (8, 16), "b": (8, 2), "a": (2, 16)}
    full |= {name: rng.integers(-8, 8, shape).astype(np.float32) for name, shape in shapes.items()}
    return full


def target(full: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the rules make of it."""
    dense = dequantised(Tensor("U8", full["blocks"]), "FP4", Tensor("F32", full["scales"]), "F32", (4, 8), "F32")
    return {
        "dense": dense.reshape(8, 16),
        "whole": full["half.first"] * np.float32(4),
        "longer": np.concatenate([full["rows"], np.full((4, 16), 2.5, np.float32)]),
        "shorter": full["padded"][:6],
        "adapted": full["base"] + np.float32(0.25) * (full["b"] @ full["a"]),
        "joined": np.concatenate([bfloat16(full["w"] * np.float32(0.5)), full["half.second"]]),
    }


def part(array: np.ndarray, way: Sequence[int], place: int) -> np.ndarray:
    """Half of it, by rows or by columns."""
    return np.ascontiguousarray(np.split(array, 2, way.index(0))[place])


@pytest.mark.parametrize(("give", "take"), [((0, 1), (0, 1)), ((0, 1), (2, 3)), ((1, 2), (0, 1))])
@pytest.mark.parametrize("verify", ["none", "replicas"])
def test_what_is_computed(give: Sequence[int], take: Sequence[int], verify: str) -> None:
    full = source()
    cuts = {name: COLUMNS if name in CUT_BY_COLUMNS else ROWS for name in full}
    expected = target(full)

    def work(rank: int) -> None:
        mine = made = None
        wanted = {}
        if rank in give:
            mine = filled({name: part(array, cuts[name], give.index(rank)) for name, array in full.items()})
        if rank in take:
            wanted = {name: part(array, TAKEN[name], take.index(rank)) for name, array in expected.items()}
            made = filled({name: np.zeros_like(array) for name, array in wanted.items()})
        how: dict[str, Any] = {
            "source_strategy": {name: ((2,), way) for name, way in cuts.items()},
            "target_strategy": {name: ((2,), way) for name, way in TAKEN.items()},
        }
        with plan_transfer(mine, made, **how, rules=RULES, bucket_bytes=4096, verify=verify) as plan:
            for number in range(2):
                plan.run()
                assert made is None or bytes_of(made) == {n: a.tobytes() for n, a in wanted.items()}, f"run {number}"

    run(max(*give, *take) + 1, work)


def test_what_is_computed_from_itself_is_no_copy() -> None:
    """A Parameter of both sides does not stay as it is where a rule computes it; it is not written while it is read."""

    def work(rank: int) -> None:
        one = ms.Parameter(ms.Tensor(np.ones((2, 3), np.float32)), name="w")
        with pytest.raises(UsageError, match="share memory"):
            transfer({"w": one}, {"w": one}, rules=[rules.Scale("w", "w", 0.5)])
        assert one.asnumpy().tolist() == [[1.0] * 3] * 2

    run(1, work)
