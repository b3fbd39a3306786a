"""Merge and re-cut against files that MindSpore wrote: every case, every pair, whole files byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ms_ckpt_ext import load_distributed_checkpoint, training_scalars, unified_safetensors
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from tests.support.checkpoints import CASES, FULL, PAIRS, read_file, read_merged, shard, tree

SCALARS = ("epoch_num", "global_step", "learning_rate", "loss_scale", "scale_sense", "step_num")


def recut(source: Path, trained: Path | None, predicted: object, target: Path, **more: object) -> None:
    load_distributed_checkpoint(
        None,
        predict_strategy=predicted,
        train_strategy_filename=trained,
        format="safetensors",
        unified_safetensors_dir=source,
        dst_safetensors_dir=target,
        **more,  # type: ignore[arg-type]
    )


def assert_is(target: Path, shards: Path) -> None:
    """The target's ranks are those of `shards`, whole files byte for byte."""
    expected = {f"{folder.name}/net.safetensors": shard(folder).read_bytes() for folder in shards.iterdir()}
    assert tree(target) == expected


@pytest.mark.parametrize("case", CASES)
def test_merge_equals_the_unsharded_truth(case: str, golden: Path, tmp_path: Path) -> None:
    report = unified_safetensors(golden / case / "shards", golden / case / "strategy.ckpt", tmp_path)
    truth = read_file(golden / FULL[case] / "model.safetensors")
    assert read_merged(tmp_path) == (truth, {})
    assert report.published and report.files_written == ("part0.safetensors",)


@pytest.mark.parametrize("case", CASES)
def test_merge_with_one_strategy_file_per_stage(case: str, golden: Path, tmp_path: Path) -> None:
    unified_safetensors(golden / case / "shards", golden / case / "strategy_stages", tmp_path)
    assert read_merged(tmp_path)[0] == read_file(golden / FULL[case] / "model.safetensors")


def test_there_are_82_pairs() -> None:
    assert len(PAIRS) == 82


@pytest.mark.parametrize("source", CASES)
def test_recut_of_shards_equals_mindspore_s_shards(source: str, golden: Path, tmp_path: Path) -> None:
    for target in (b for a, b in PAIRS if a == source):
        recut(
            golden / source / "shards",
            golden / source / "strategy.ckpt",
            golden / target / "strategy.ckpt",
            tmp_path / target,
        )
        assert_is(tmp_path / target, golden / target / "shards")


@pytest.mark.parametrize("source", ["dp2_tp2_pp2_zero", "dp2_tp4_layout"])
def test_recut_of_a_merged_checkpoint(source: str, golden: Path, tmp_path: Path) -> None:
    unified_safetensors(
        golden / source / "shards", golden / source / "strategy.ckpt", tmp_path / "merged", part_bytes=4096
    )
    assert len(list((tmp_path / "merged").glob("part*"))) > 3
    for target in (b for a, b in PAIRS if a == source):
        recut(tmp_path / "merged", None, golden / target / "strategy.ckpt", tmp_path / target)
        assert_is(tmp_path / target, golden / target / "shards")


def test_recut_of_a_merge_that_mindspore_wrote(golden: Path, tmp_path: Path) -> None:
    recut(golden / "full", None, golden / "dp3_tp8" / "strategy.ckpt", tmp_path)
    assert_is(tmp_path, golden / "dp3_tp8" / "shards")


@pytest.mark.parametrize("form", ["path", "str", "directory", "json", "value"])
def test_forms_of_the_target_strategy(form: str, golden: Path, tmp_path: Path) -> None:
    case = golden / "dp2_tp2_pp2_zero"
    strategy = load_strategy(case / "strategy.ckpt")
    save_strategy(strategy, tmp_path / "strategy.json")
    predicted = {
        "path": case / "strategy.ckpt",
        "str": str(case / "strategy.ckpt"),
        "directory": case / "strategy_stages",
        "json": tmp_path / "strategy.json",
        "value": strategy,
    }[form]
    recut(golden / "dp3_tp8" / "shards", golden / "dp3_tp8" / "strategy.ckpt", predicted, tmp_path / "out")
    assert_is(tmp_path / "out", case / "shards")


def test_no_target_strategy_is_one_device(golden: Path, tmp_path: Path) -> None:
    case = golden / "dp4_tp2_zero2"
    recut(case / "shards", case / "strategy.ckpt", None, tmp_path)
    assert list(tree(tmp_path)) == ["rank_0/net.safetensors"]
    assert read_file(tmp_path / "rank_0" / "net.safetensors") == read_file(golden / "full" / "model.safetensors")


@pytest.mark.parametrize("rank", [0, 5, 7])
def test_one_rank_alone(rank: int, golden: Path, tmp_path: Path) -> None:
    stage = golden / "tp4_pp2" / "strategy_stages" / f"ckpt_strategy_rank_{rank // 4 * 4}.ckpt"
    for number, predicted in enumerate([golden / "tp4_pp2" / "strategy.ckpt", stage]):
        source = golden / "dp2_tp4"
        recut(source / "shards", source / "strategy.ckpt", predicted, tmp_path / str(number), rank_id=rank)
        written = tree(tmp_path / str(number))
        assert written == {f"rank_{rank}/net.safetensors": shard(golden / f"tp4_pp2/shards/rank_{rank}").read_bytes()}


@pytest.mark.parametrize("name", ["formats_dp2_tp4", "formats_dp2_tp4_zero"])
@pytest.mark.parametrize("kind", ["safetensors", "dedup"])
def test_files_of_a_training_job(name: str, kind: str, golden: Path, tmp_path: Path) -> None:
    source, strategy = golden / name / kind, golden / name / "strategy.ckpt"
    unified_safetensors(source, strategy, tmp_path / "merged")
    found, extras = read_merged(tmp_path / "merged")
    assert found == read_file(golden / "full" / "model.safetensors")
    stored = read_file(shard(source / "rank_0"))
    assert extras == {key: stored[key] for key in stored.keys() - found.keys()}
    assert extras or kind == "dedup"
    recut(source, strategy, golden / "dp2_tp2" / "strategy.ckpt", tmp_path / "recut")
    for folder in (golden / "dp2_tp2" / "shards").iterdir():
        expected = {**read_file(shard(folder)), **extras}
        assert read_file(tmp_path / "recut" / folder.name / "net.safetensors") == expected


@pytest.mark.parametrize("kind", ["safetensors", "dedup"])
def test_scalars_are_at_hand(kind: str, golden: Path, tmp_path: Path) -> None:
    case = golden / "formats_dp2_tp4"
    unified_safetensors(case / kind, case / "strategy.ckpt", tmp_path)
    merged, sharded = training_scalars(tmp_path), training_scalars(case / kind, case / "strategy.ckpt")
    stored = {
        n: t
        for n, t in read_file(shard(case / kind / "rank_0")).items()
        if n not in load_strategy(case / "strategy.ckpt").layouts
    }
    assert sorted(merged) == sorted(sharded) == sorted(stored)
    for name, tensor in stored.items():
        for found in (merged[name], sharded[name]):
            assert (found.shape, found.tobytes()) == (tensor.shape, tensor.data)
            assert found.dtype == {"I32": np.int32, "F32": np.float32, "I64": np.int64}[tensor.dtype]


@pytest.mark.parametrize("step", ["step3", "step6"])
def test_a_real_training_job(step: str, golden: Path, tmp_path: Path) -> None:
    case = golden / "trained_dp2_tp2_zero"
    for file in case.glob(f"{step}/rank_*/*.safetensors"):
        (tmp_path / "shards" / file.parent.name).mkdir(parents=True)
        shutil.copy(file, tmp_path / "shards" / file.parent.name)
    unified_safetensors(tmp_path / "shards", case / "strategy", tmp_path / "merged")
    mine, theirs = tmp_path / "merged", case / f"merged_{step}"
    assert read_merged(mine) == read_merged(theirs)
    assert json.loads((mine / "param_name_map.json").read_text()) == json.loads(
        (theirs / "param_name_map.json").read_text()
    )


def test_a_training_job_recut_from_its_merge(golden: Path, tmp_path: Path) -> None:
    case = golden / "trained_dp2_tp2_zero"
    recut(case / "merged_step6", None, case / "strategy", tmp_path)
    for rank in range(4):
        expected = read_file(case / "step6" / f"rank_{rank}" / "net.safetensors")
        assert read_file(tmp_path / f"rank_{rank}" / "net.safetensors") == expected
