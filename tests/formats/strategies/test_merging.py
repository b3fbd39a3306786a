"""Strategies of pipeline stages as one file: operators stay as they are, and no stage contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import StrategyError
from ms_ckpt_ext.formats.strategies.file import load_strategy, read_map
from ms_ckpt_ext.formats.strategies.merging import merge_strategy_files

LAYOUT = {"dev_matrix": [2, 4], "tensor_map": [0, -1], "field": 0, "opt_weight_shard_size": 0}


def stage(number: int, names: list[str], **more: Any) -> dict[str, Any]:
    return {
        "current_stage": 2,
        "parallel_strategy_item": {
            f"MatMul_{number}": {"parallel_strategy": [[1, 4], [4, 1]], "stage": number, "note": "kept"}
        },
        "parallel_layout_item": {name: {**LAYOUT, "opt_weight_shard_step": 0, **more} for name in names},
    }


def write(folder: Path, *stages: dict[str, Any], suffix: str = "json") -> Path:
    folder.mkdir()
    for number, content in enumerate(stages):
        (folder / f"rank_{number}.{suffix}").write_text(json.dumps(content))
    return folder


def test_json_is_taken_word_for_word(tmp_path: Path) -> None:
    first, second = stage(0, ["a"]), stage(1, ["a", "b"], unknown=[1])
    merge_strategy_files(write(tmp_path / "s", first, second), tmp_path / "merged.json")
    assert json.loads((tmp_path / "merged.json").read_text()) == {
        "current_stage": 1,
        "parallel_strategy_item": {**first["parallel_strategy_item"], **second["parallel_strategy_item"]},
        "parallel_layout_item": {
            "0-a": first["parallel_layout_item"]["a"],
            "1-a": second["parallel_layout_item"]["a"],
            "1-b": second["parallel_layout_item"]["b"],
        },
    }


@pytest.mark.stock
@pytest.mark.parametrize("suffix", ["json", "ckpt"])
def test_beside_stock(suffix: str, golden: Path, tmp_path: Path) -> None:
    """The same of both forms, but for the order of files, which stock takes as the directory has it."""
    import mindspore

    stages = golden / "tp4_pp2" / "strategy_stages"
    if suffix == "json":
        stages = write(tmp_path / "s", stage(0, ["a", "b"]), stage(0, ["a", "b"]), stage(1, ["c"]))
    merge_strategy_files(stages, tmp_path / f"ours.{suffix}")
    mindspore.merge_pipeline_strategys(str(stages), str(tmp_path / f"stock.{suffix}"))
    ours, theirs = (tmp_path / f"{who}.{suffix}" for who in ("ours", "stock"))
    if suffix == "json":
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    else:
        found, expected = read_map(str(ours)), read_map(str(theirs))
        for items in ("parallel_strategy_item", "parallel_layout_item"):
            assert sorted(map(str, getattr(found, items))) == sorted(map(str, getattr(expected, items)))


@pytest.mark.stock
def test_operators_survive_in_the_other_form(tmp_path: Path) -> None:
    """JSON text in files named .ckpt becomes protobuf, with what it says of operators."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    merge_strategy_files(write(tmp_path / "s", stage(0, ["a"]), stage(1, ["b"]), suffix="ckpt"), tmp_path / "m.ckpt")
    found = ParallelStrategyMap.FromString((tmp_path / "m.ckpt").read_bytes())
    cuts = [
        [list(row.dim) for row in item.parallel_strategys.parallel_strategy] for item in found.parallel_strategy_item
    ]
    assert cuts == [[[1, 4], [4, 1]]] * 2
    assert [item.parallel_strategys.stage for item in found.parallel_strategy_item] == [0, 1]


def test_files_of_one_stage_add_to_each_other(tmp_path: Path) -> None:
    """As in a directory that is loaded without a merge."""
    folder = write(tmp_path / "s", stage(0, ["a"]), stage(0, ["a", "b"]), stage(1, ["c"]))
    merge_strategy_files(folder, tmp_path / "m.json")
    assert load_strategy(tmp_path / "m.json").layouts == load_strategy(folder).layouts
    assert load_strategy(folder).layouts["b"] == {0: Layout((2, 4), ((0,), ()))}


@pytest.mark.parametrize("suffix", ["json", "ckpt"])
def test_what_contradicts_itself_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "s", stage(0, ["a"]), stage(0, ["a"], tensor_map=[-1, 0]), suffix=suffix)
    with pytest.raises(StrategyError, match=r"rank_0.*rank_1.* are both of stage 0, and give parameter 'a' different"):
        merge_strategy_files(folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("suffix", ["json", "ckpt"])
def test_a_file_that_does_not_say_its_stage(suffix: str, tmp_path: Path) -> None:
    """It would pass for another file of stage 0, and its parameters would be lost."""
    folder = write(
        tmp_path / "s",
        stage(0, ["a"]),
        {"parallel_layout_item": stage(1, ["b"])["parallel_layout_item"]},
        suffix=suffix,
    )
    with pytest.raises(StrategyError, match=r"rank_1\..* lists no operator, so nothing says which pipeline stage"):
        merge_strategy_files(folder, tmp_path / "m")


def test_a_name_that_says_json_of_what_is_none(golden: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "s", stage(0, ["a"]))
    file = golden / "tp4_pp2" / "strategy_stages" / "ckpt_strategy_rank_4.ckpt"
    (folder / "z.json").write_bytes(file.read_bytes())
    with pytest.raises(StrategyError, match=r"z\.json' is not JSON, as its name says"):
        merge_strategy_files(folder, tmp_path / "m.json")
