"""Rows of docs/differences.md. Names: suffixes, prefixes, maps, and the order of parameters.

Every test tells what stock does, measured here, and what is right, which ours does.
"""

from __future__ import annotations

import glob
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.stock.differences.both import (
    ROWS,
    arrays,
    by_stock,
    network,
    numbers,
)
from tests.stock.fuzz.files import write_strategy
from tests.stock.fuzz.model import Cut, Job
from tests.support.checkpoints import strategy_of
from tests.support.parameters import held_by

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]


def test_names_by_suffix(ms: Any, tmp_path: Path) -> None:
    """The weight is not in the file, its moment is: stock fills the weight from it."""
    save_file({"adam_m.w": numbers(4), "v": numbers(4)}, tmp_path / "net.safetensors")
    pair = [network(ms, {"w": (4,), "v": (4,)}) for _ in range(2)]
    by_stock("load_checkpoint", tmp_path / "net.safetensors", pair[0], format="safetensors")
    ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", pair[1], format="safetensors")
    assert np.array_equal(held_by(pair[0])["w"], numbers(4))
    assert not held_by(pair[1])["w"].any()
    assert all(np.array_equal(held_by(cell)["v"], numbers(4)) for cell in pair)


def test_prefixes_of_safetensors(tmp_path: Path) -> None:
    """Stock takes them and does nothing with them."""
    save_file({"a.w": numbers(4), "b.w": numbers(4)}, tmp_path / "net.safetensors")
    call = {"format": "safetensors", "specify_prefix": "a"}
    theirs, _ = by_stock("load_checkpoint", tmp_path / "net.safetensors", **call)
    assert list(theirs) == ["a.w", "b.w"]
    assert list(ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", **call)) == ["a.w"]


def test_names_of_parameters(tmp_path: Path) -> None:
    """Parameters out of safetensors have no names of their own in stock."""
    save_file({"a.w": numbers(4)}, tmp_path / "net.safetensors")
    theirs, _ = by_stock("load_checkpoint", tmp_path / "net.safetensors", format="safetensors")
    assert theirs["a.w"].name != "a.w"
    assert ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", format="safetensors")["a.w"].name == "a.w"


def test_name_map_and_the_parameter_map(tmp_path: Path) -> None:
    """Names in the map as the files have them: stock leaves out what name_map renames."""
    (tmp_path / "merged").mkdir()
    for number in range(2):
        save_file({f"model.p{number}": numbers(4)}, tmp_path / f"merged/part{number}.safetensors")
    weights = {f"model.p{number}": f"part{number}.safetensors" for number in range(2)}
    (tmp_path / "merged/param_name_map.json").write_text(json.dumps({"weight_map": weights}))
    strategy_of({f"p{number}": Layout((2,), ((0,),)) for number in range(2)}, tmp_path / "d.ckpt")
    told = {
        "format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": 0,
        "name_map": {f"p{number}": f"model.p{number}" for number in range(2)},
    }  # fmt: skip
    call = (None, None, tmp_path / "d.ckpt")
    by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
    assert not list((tmp_path / "stock").rglob("*.safetensors")) or not arrays(
        tmp_path / "stock/rank_0/net.safetensors"
    )
    assert arrays(tmp_path / "ours/rank_0/net.safetensors").keys() == {"p0", "p1"}


def test_a_dash_in_a_name(tmp_path: Path) -> None:
    """Stock takes what stands before a dash for a pipeline stage."""
    strategy_of({"side-car.w": ROWS}, tmp_path / "s.ckpt")
    with pytest.raises(ValueError, match="invalid literal for int"):
        by_stock("rank_list_for_transform", 0, tmp_path / "s.ckpt", tmp_path / "s.ckpt")
    assert ms_ckpt_ext.rank_list_for_transform(0, tmp_path / "s.ckpt", tmp_path / "s.ckpt") == [0]


def test_names_loaded_by_their_ends(ms: Any, tmp_path: Path) -> None:
    """A wrapper's prefix before every name: loaded by both; stock tells of the same names that they went nowhere."""
    (tmp_path / "merged").mkdir()
    save_file({"backbone.a": numbers(4), "backbone.b": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "b": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], **told)
    assert (theirs, mine) == (([], ["backbone.a", "backbone.b"]), ([], []))
    assert all(np.array_equal(held_by(cell)["b"], numbers(4)) for cell in pair)


def test_names_that_went_nowhere(ms: Any, tmp_path: Path) -> None:
    """What the strategy does not list and the network does not have: nothing is said of it by stock."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "adam_m.a": numbers(4)}, tmp_path / "merged/part0.safetensors")
    strategy_of({"a": Layout((1,), ((),))}, tmp_path / "d.ckpt")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], None, tmp_path / "d.ckpt", **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], None, tmp_path / "d.ckpt", **told)
    assert (theirs, mine) == (([], []), ([], ["adam_m.a"]))


def test_the_order_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Cut((2,), ((0,), ()))
    job = Job(2, 2, {"a": {0: rows}, "b": {1: rows}}, frozenset("ab"))
    for stage in range(2):
        write_strategy(tmp_path / f"src/s_{stage}.ckpt", job, stage)
    results = []
    for backwards in (False, True):
        listed = SimpleNamespace(glob=lambda pattern: sorted(glob.glob(pattern), reverse=backwards))  # noqa: B023
        monkeypatch.setattr("mindspore.parallel.checkpoint_transform.glob", listed)
        by_stock("merge_pipeline_strategys", tmp_path / "src", tmp_path / "stock.ckpt")
        results.append((tmp_path / "stock.ckpt").read_bytes())
    ms_ckpt_ext.merge_pipeline_strategys(tmp_path / "src", tmp_path / "ours.ckpt")
    assert results[0] != results[1]
    assert (tmp_path / "ours.ckpt").read_bytes() == results[0]


def test_the_order_of_safetensors_in_ckpt(tmp_path: Path) -> None:
    """Of one whole checkpoint: ours keeps the file's order."""
    strategy_of(dict.fromkeys("dacb", ROWS), tmp_path / "d.ckpt")
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({name: numbers(4, 2) for name in "abcd"}, tmp_path / "src/rank_0/net.safetensors")
    call = {"dst_strategy_file": tmp_path / "d.ckpt"}
    by_stock("transform_checkpoints", tmp_path / "src", tmp_path / "stock", "n", **call)
    ms_ckpt_ext.transform_checkpoints(tmp_path / "src", tmp_path / "ours", "n", **call)
    theirs, mine = (arrays(tmp_path / who / "rank_1/n1.ckpt") for who in ("stock", "ours"))
    assert list(mine) == ["a", "b", "c", "d"]
    assert sorted(theirs) == list(mine)
    assert all(np.array_equal(theirs[name], mine[name]) for name in mine)
