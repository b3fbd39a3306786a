"""Ranks and stages: strategies with more of them than there are files, or fewer; half a model is not a whole one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext import errors, load_distributed_checkpoint, transform_checkpoints, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.support.checkpoints import FULL, Case, assert_nothing_complete, read_file, read_merged, shard, strategy_of
from tests.support.damage import memory_limit


def test_a_strategy_of_far_more_ranks_than_files(tmp_path: Path) -> None:
    """Twenty bytes of strategy must not cost a second, and a million cells, for every parameter."""
    folder = tmp_path / "shards" / "rank_0"
    folder.mkdir(parents=True)
    save_file({"w": np.zeros((1,), np.float32)}, folder / "net.safetensors")
    strategy_of({"w": Layout((1 << 20,), ((0,),))}, tmp_path / "strategy.ckpt")
    with (
        memory_limit(4 << 20),
        pytest.raises(errors.CoverageError, match="is for 1048576 ranks, of which only 1 have files, such as .*rank_0"),
    ):
        unified_safetensors(tmp_path / "shards", tmp_path / "strategy.ckpt", tmp_path / "out")
    assert_nothing_complete(tmp_path / "out")


def test_one_stage_of_two_is_not_taken_for_the_whole(golden: Path, tmp_path: Path) -> None:
    """Without stage 1's layouts its slices would pass for whole parameters."""
    case = Case(golden, "tp4_pp2", tmp_path)
    for stage, said in (
        (0, "is for 4 ranks, but the checkpoint has .*rank_4"),
        (4, r"lacks pipeline stage\(s\) \[0\]"),
    ):
        shutil.copy(golden / "tp4_pp2" / "strategy_stages" / f"ckpt_strategy_rank_{stage}.ckpt", case.strategy)
        with pytest.raises(errors.StrategyError, match=f"{said}"):
            case.merge()
    assert not case.target.exists()


def without_stage(golden: Path, root: Path, name: str, stage: int) -> Case:
    """A golden case of two stages of four ranks that lacks all files of one."""
    case = Case(golden, name, root)
    for rank in range(4 * stage, 4 * stage + 4):
        shutil.rmtree(case.shards / f"rank_{rank}")
    return case


@pytest.mark.parametrize("name", ["tp4_pp2", "dp2_tp2_pp2_zero"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_any_file(stage: int, name: str, golden: Path, tmp_path: Path) -> None:
    """Half a model does not pass for a whole one, whatever is asked of it."""
    case = without_stage(golden, tmp_path, name, stage)
    target = golden / "tp4" / "strategy.ckpt"
    opened = {"format": "safetensors", "unified_safetensors_dir": case.shards, "dst_safetensors_dir": case.target}
    ranks = ", ".join(str(4 * stage + n) for n in range(4))
    for call in (
        case.merge,
        case.recut,
        lambda: load_distributed_checkpoint(None, None, target, case.strategy, **opened),
        lambda: load_distributed_checkpoint(None, None, None, case.strategy, **opened),
        lambda: transform_checkpoints(case.shards, case.target, "net", case.strategy, target, 1, "safetensors"),
        lambda: ms_ckpt_ext.load(case.shards, case.strategy),
        lambda: ms_ckpt_ext.verify(case.shards, case.shards, strategy=case.strategy, strategy_b=case.strategy),
        lambda: ms_ckpt_ext.plan(case.shards, src_strategy=case.strategy, dst_strategy=target),
    ):
        with pytest.raises(errors.CoverageError, match=f"parameter '.*' and .* more should be in .* of ranks {ranks},"):
            call()
    assert not case.target.exists()


def test_a_stage_that_nobody_asks_for_need_not_be_there(golden: Path, tmp_path: Path) -> None:
    case = without_stage(golden, tmp_path, "tp4_pp2", 0)
    whole = {rank: read_file(shard(golden / "tp4_pp2" / "shards" / f"rank_{rank}")) for rank in range(4, 8)}
    for rank, expected in whole.items():
        ms_ckpt_ext.reshard(case.shards, case.target, strategy=case.strategy, to_strategy=case.strategy, rank=rank)
        assert read_file(case.target / f"rank_{rank}" / "net.safetensors") == expected
    case.merge(choice_func=lambda name: name in whole[4])
    full = read_file(golden / FULL["tp4_pp2"] / "model.safetensors")
    merged, scalars = read_merged(case.target)
    assert merged == {name: tensor for name, tensor in full.items() if name in whole[4] and name not in scalars}
    first = next(name for name in full if name not in whole[4])
    with pytest.raises(errors.CoverageError, match="'other' and 1 more should be in the files of ranks 0, 1, 2, 3"):
        case.merge(choice_func=lambda name: "other" if name == first else name in whole[4], name_map={"tied": "other"})
