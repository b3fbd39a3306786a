"""Transfers between Cells by all ranks of a world of threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore.common import np_dtype

from ms_ckpt_ext import plan_transfer, transfer
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.engine.transfer.report import TransferReport
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.cells import HERE, cell, threads  # noqa: F401 - a fixture
from tests.support.checkpoints import read_file, shard
from tests.support.parameters import bytes_of

pytestmark = pytest.mark.usefixtures("threads")
GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"


def run(world: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` on every rank."""

    def rank(transport: LocalTransport) -> Any:
        HERE.transport = transport
        return work(transport.rank)

    return LocalWorld(world, timeout=20.0).run(rank)


def errors(world: int, work: Callable[[int], Any]) -> list[Optional[BaseException]]:
    def rank(number: int) -> Optional[BaseException]:
        try:
            work(number)
        except Exception as error:
            return error
        return None

    return run(world, rank)


def filled(values: Mapping[str, np.ndarray]) -> Any:
    """A Cell that holds these values."""
    made = ms.nn.Cell()
    for number, (name, value) in enumerate(values.items()):
        made.insert_param_to_cell(
            f"p{number}", ms.Parameter(ms.Tensor.from_numpy(np.array(value)), name=name), check_name_contain_dot=False
        )
    return made


def poisoned(like: Mapping[str, np.ndarray]) -> Any:
    """A Cell of the same shapes and dtypes, all values wrong."""
    return filled({name: np.full_like(value, 77) for name, value in like.items()})


def golden(case: str, rank: int) -> dict[str, np.ndarray]:
    numpy = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "F16": np.float16, "BF16": np_dtype.bfloat16}
    held = read_file(shard(GOLDEN / case / "shards" / f"rank_{rank}"))
    return {name: np.frombuffer(t.data, numpy[t.dtype]).reshape(t.shape) for name, t in held.items()}


PAIRS = (
    ("dp2_tp2", "tp4", 0, 4),
    ("dp2_tp2_pp2_zero", "dp2_tp2", 0, 8),
    ("dp2_tp2", "tp4_pp2", 4, 12),
    ("tp4", "dp2_tp2", 2, 6),
)
"""Source, target, the first rank of the target, ranks of the job."""


@pytest.mark.parametrize(("one", "other", "first", "world"), PAIRS)
def test_golden_networks(one: str, other: str, first: int, world: int) -> None:
    ranks = {"dp2_tp2": 4, "tp4": 4, "dp2_tp2_pp2_zero": 8, "tp4_pp2": 8}

    def work(rank: int) -> tuple[Any, Optional[TransferReport]]:
        source = filled(golden(one, rank)) if rank < ranks[one] else None
        place = rank - first
        target = poisoned(golden(other, place)) if 0 <= place < ranks[other] else None
        report = transfer(
            source, target,
            source_strategy=GOLDEN / one / "strategy.ckpt", target_strategy=GOLDEN / other / "strategy.ckpt",
        )  # fmt: skip
        return target, report

    for rank, (made, report) in enumerate(run(world, work)):
        if made is not None:
            expected = {name: value.tobytes() for name, value in golden(other, rank - first).items()}
            assert bytes_of(made) == expected, f"rank {rank}"
            assert report is not None
            assert report.bytes_local + report.bytes_received == sum(map(len, expected.values()))


def test_a_plan_moves_the_present_values() -> None:
    strategy = {"w": ((2,), (0, -1))}

    def work(rank: int) -> bool:
        source = filled({"w": np.full((2, 4), rank, np.float32)})
        target = cell({"w": np.zeros((4, 4), np.float16)})
        with plan_transfer(source, target, source_strategy=strategy) as plan:
            for number in range(3):
                source.p0.set_data(ms.Tensor(np.full((2, 4), number * 10 + rank, np.float32)))
                plan.run()
                expected = np.repeat([number * 10.0, number * 10 + 1.0], 2)[:, None].repeat(4, 1)
                assert np.array_equal(target.p0.asnumpy(), expected.astype(np.float16))
        return True

    assert all(run(2, work))


def test_boxes_uneven_on_both_sides() -> None:
    whole = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    give = {0: (0, 3), 1: (3, 7)}
    take = {0: (1, 4), 1: (0, 1), 2: (4, 7)}

    def box(span: tuple[int, int]) -> Box:
        return Box((7, 3), (span[0], 0), (span[1] - span[0], 3))

    def work(rank: int) -> bool:
        source = {"w": ms.Parameter(ms.Tensor(whole[slice(*give[rank])]), name="x")} if rank in give else None
        target = {"w": ms.Parameter(ms.Tensor(np.zeros((take[rank][1] - take[rank][0], 3), np.float32)), name="y")}
        transfer(
            source, target, source_strategy={"w": box(give[rank])} if source else None,
            target_strategy={"w": box(take[rank])},
        )  # fmt: skip
        return bool(np.array_equal(target["w"].asnumpy(), whole[slice(*take[rank])]))

    assert all(run(3, work))
