"""Strategy files: MindSpore's own, ours, and files that are not strategies."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import CheckpointError, StorageError, StrategyError, UsageError
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from ms_ckpt_ext.formats.strategies.merging import merge_strategy_files
from tests.support.checkpoints import CASES, FULL, read_file


@pytest.mark.parametrize("case", CASES)
def test_every_golden_shard_is_the_box_of_its_layout(case: str, golden: Path) -> None:
    strategy = load_strategy(golden / case / "strategy.ckpt")
    index = read_index(str(golden / FULL[case] / "model.safetensors"))
    raw = Path(index.path).read_bytes()
    checked = 0
    for rank in range(strategy.world):
        for name, held in read_file(golden / case / "shards" / f"rank_{rank}" / "net.safetensors").items():
            entry = index.tensors[name]
            layout = strategy.layout(name, rank)
            assert layout is not None
            whole = np.frombuffer(raw, np.uint8, entry.nbytes, entry.extents[0].offset)
            whole = whole.reshape(*entry.shape, entry.dtype.bits // 8)
            box = layout.region(rank % strategy.devices_per_stage, entry.shape)
            assert np.ascontiguousarray(whole[box.slices]).tobytes() == held.data, (rank, name)
            assert box.shape == held.shape
            checked += 1
    assert checked == sum(
        not name.startswith("accu_grads") for rank in range(strategy.world) for name in strategy.names_of(rank)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_directory_of_stages_is_the_merged_file(case: str, golden: Path, tmp_path: Path) -> None:
    merged = load_strategy(golden / case / "strategy.ckpt")
    assert load_strategy(golden / case / "strategy_stages").layouts == merged.layouts
    for suffix in ("ckpt", "json"):
        save_strategy(merged, tmp_path / f"again.{suffix}")
        assert load_strategy(tmp_path / f"again.{suffix}").layouts == merged.layouts


@pytest.mark.parametrize("case", ["dp2_tp2_pp2_zero", "tp4_pp2"])
def test_merging_gives_mindspores_bytes(case: str, golden: Path, tmp_path: Path) -> None:
    merge_strategy_files(golden / case / "strategy_stages", tmp_path / "new" / "merged.ckpt")
    assert (tmp_path / "new" / "merged.ckpt").read_bytes() == (golden / case / "strategy.ckpt").read_bytes()


@pytest.mark.parametrize("name", ["a.ckpt", "ckpt_strategy.ckpt", "merged.ckpt"])
def test_merging_again_among_the_stages(name: str, golden: Path, tmp_path: Path) -> None:
    """The first result sorts before the stages or after them, and is none of them."""
    stages = shutil.copytree(golden / "tp4_pp2" / "strategy_stages", tmp_path / "stages")
    for target in (name, name, "0_other.ckpt"):
        merge_strategy_files(stages, stages / target)
        assert (stages / target).read_bytes() == (golden / "tp4_pp2" / "strategy.ckpt").read_bytes()


def test_what_cannot_be_merged(golden: Path, tmp_path: Path) -> None:
    stages = shutil.copytree(golden / "tp4_pp2" / "strategy_stages", tmp_path / "stages")
    file = stages / "ckpt_strategy_rank_4.ckpt"
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"would replace '.*rank_4\.ckpt', the file of one of the stages"):
        merge_strategy_files(stages, file)
    assert file.read_bytes() == before
    (tmp_path / "merged").mkdir()
    merge_strategy_files(stages, tmp_path / "merged" / "s.ckpt")
    with pytest.raises(StrategyError, match="holds merged strategies only"):
        merge_strategy_files(tmp_path / "merged", tmp_path / "again.ckpt")


def test_a_full_disk_leaves_the_old_file(golden: Path, tmp_path: Path) -> None:
    """The kernel refuses what is longer than the old file, as a full disk does."""
    stages, target = golden / "tp4_pp2" / "strategy_stages", tmp_path / "s.ckpt"
    target.write_bytes((stages / "ckpt_strategy_rank_0.ckpt").read_bytes())
    before = target.read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
        with pytest.raises(StorageError, match="cannot write strategy file"):
            merge_strategy_files(stages, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_one_stage_alone_knows_its_number(golden: Path) -> None:
    strategy = load_strategy(golden / "tp4_pp2" / "strategy_stages" / "ckpt_strategy_rank_4.ckpt")
    assert strategy.stages == 2
    assert strategy.names_of(0) == []
    assert strategy.layout("head.weight", 4) is not None


def test_the_json_form_of_mindspore(tmp_path: Path) -> None:
    item = {"dev_matrix": [2, 4], "field": 0, "opt_weight_shard_size": -1, "opt_weight_shard_step": 4}
    content = {
        "current_stage": 0,
        "parallel_strategy_item": {"MatMul_a": {"parallel_strategy": [[1, 4]], "stage": 0}},
        "parallel_layout_item": {
            "a": {**item, "tensor_map": [0, -1], "param_split_shape": [], "indices_offset": []},
            "b": {"dev_matrix": [2, 4], "tensor_map": [[-1], [1, 0]], "field": 0},
        },
    }
    (tmp_path / "s.json").write_text(json.dumps(content))
    assert load_strategy(tmp_path / "s.json").layouts == {
        "a": {0: Layout((2, 4), ((0,), ()), 4, -1)},
        "b": {0: Layout((2, 4), ((), (1, 0)))},
    }


def test_names_with_dashes_keep_them(tmp_path: Path) -> None:
    items = [LayoutItem(name, stage, Layout((2,), ((0,),))) for stage, name in enumerate(["a-b", "c-d-e"])]
    save_strategy(Strategy.from_items(items, "x"), tmp_path / "s.ckpt")
    assert load_strategy(tmp_path / "s.ckpt").names_of(2) == ["c-d-e"]


@pytest.mark.stock
def test_no_collision_with_mindspores_own_messages(golden: Path) -> None:
    """In one process, whoever comes first."""
    path = str(golden / "dp2_tp4" / "strategy.ckpt")
    ours = f"from ms_ckpt_ext.formats.strategies.file import load_strategy; s = load_strategy({path!r}).layouts; "
    theirs = f"from mindspore.parallel import build_searched_strategy as b; t = b({path!r}); "
    check = "from ms_ckpt_ext import as_strategy; assert s == as_strategy(t).layouts and len(s) == 42"
    for code in (ours + theirs + check, theirs + ours + check):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bad_files(golden: Path, tmp_path: Path) -> None:
    shard = golden / "formats_dp2_tp4" / "ckpt" / "rank_0" / "net_rank_0-3_1200.ckpt"
    bad = {
        "empty": (b"", "is empty"),
        "random": (bytes(range(255, 0, -1)), "is not a strategy file"),
        "checkpoint": (shard.read_bytes(), "a checkpoint has the same .ckpt suffix"),
        "broken json": (b'{"parallel_layout_item": ', "is not valid JSON"),
        "json list": (b'{"parallel_layout_item": [1]}', "is not valid JSON"),
        "no layouts": (b'{"current_stage": 1}', "holds no parameter layouts"),
        "uneven": (
            b'{"parallel_layout_item": {"e": {"dev_matrix": [2], "tensor_map": [0], "field": 3}}}',
            "'e' is split unevenly",
        ),
        "contradiction": (
            b'{"parallel_layout_item": {"e": {"dev_matrix": [2], "tensor_map": [4]}}}',
            "parameter 'e': tensor map",
        ),
    }
    for name, (content, message) in bad.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(StrategyError) as caught:
            load_strategy(path)
        assert message in str(caught.value), name
        assert str(path) in str(caught.value), name
    with pytest.raises(StrategyError, match="No such file"):
        load_strategy(tmp_path / "absent.ckpt")


def test_bad_directories(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match=r"holds no \.ckpt or \.json file"):
        load_strategy(tmp_path)
    stages = golden / "tp4_pp2" / "strategy_stages"
    (tmp_path / "b.ckpt").write_bytes((stages / "ckpt_strategy_rank_4.ckpt").read_bytes())
    with pytest.raises(StrategyError, match=r"lacks pipeline stage\(s\) \[0\] of 2"):
        load_strategy(tmp_path)
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(StrategyError, match=r"holds both \.ckpt and \.json files"):
        load_strategy(tmp_path)
    with pytest.raises(StrategyError, match="is not a directory of strategy files"):
        merge_strategy_files(tmp_path / "b.ckpt", tmp_path / "out.ckpt")
    (tmp_path / "c.json").unlink()
    (tmp_path / "a.ckpt").write_bytes((golden / "dp2_tp4" / "strategy.ckpt").read_bytes())
    with pytest.raises(StrategyError, match="every pipeline stage must have the same number"):
        load_strategy(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=3),
    keep=st.integers(0, 3000),
)
def test_mutations_give_layouts_or_our_error(changes: list, keep: int, golden: Path, tmp_path: Path) -> None:
    raw = bytearray((golden / "dp2_tp4" / "strategy.ckpt").read_bytes())
    for at, value in changes:
        raw[at % len(raw)] = value
    (tmp_path / "s.ckpt").write_bytes(raw[: keep if keep % 2 else len(raw)])
    try:
        strategy = load_strategy(tmp_path / "s.ckpt")
    except CheckpointError:
        return
    assert strategy.world >= 1


@pytest.mark.parametrize(
    "text",
    [
        '{"parallel_layout_item": {"\\ud800": {"dev_matrix": [2]}}}',
        '{"parallel_strategy_item": {"op": {"stage": -1}}, "parallel_layout_item": {"w": {"dev_matrix": [2]}}}',
        '{"parallel_strategy_item": {"op": {"stage": Infinity}}, "parallel_layout_item": {"w": {"dev_matrix": [2]}}}',
        '{"parallel_layout_item": {"w": {"dev_matrix": [2], "opt_weight_shard_step": Infinity}}}',
        '{"parallel_layout_item": {"w": {"dev_matrix": [2], "opt_weight_shard_step": 18446744073709551616}}}',
        '{"parallel_layout_item": {"w": {"dev_matrix": [4294967296]}}}',
    ],
)
def test_numbers_and_names_that_the_other_form_cannot_hold(text: str, tmp_path: Path) -> None:
    """What one form held and the other did not would be another layout after it was saved again."""
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(StrategyError, match="not valid JSON of MindSpore's form"):
        load_strategy(tmp_path / "s.json")


def test_a_name_that_is_no_text_is_not_saved(tmp_path: Path) -> None:
    strategy = Strategy.from_items([LayoutItem("\ud800", 0, Layout((2,), ((0,),)))], "the layout dict")
    with pytest.raises(StrategyError, match="the layout dict cannot be written as a strategy file"):
        save_strategy(strategy, tmp_path / "s.ckpt")
    assert not (tmp_path / "s.ckpt").exists()
