"""Weight rules that take what no strategy lists, in every way of loading: the same, or the same error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.rules import Concat, Rename
from tests.support.checkpoints import cut, strategy_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FULL = {"listed": np.arange(16, dtype=np.float32).reshape(4, 4)}
FROZEN = {name: np.full(3000, number, np.float32) for number, name in enumerate("fgh", 1)}
RULES = [Rename("f", "x"), Concat(["g", "h"], "y")]
WANTED = {**FULL, "x": FROZEN["f"], "y": np.concatenate([FROZEN["g"], FROZEN["h"]])}


def network() -> Any:
    cell = ms.nn.Cell()
    held = [ms.Parameter(ms.Tensor(np.zeros_like(array)), name=name) for name, array in WANTED.items()]
    cell.held = ms.ParameterTuple(held)
    return cell


def loaded(root: Path, **more: Any) -> dict[str, bytes]:
    cell = network()
    source = {"format": "safetensors", "unified_safetensors_dir": root / "shards", "rules": RULES}
    found = ms_ckpt_ext.load_distributed_checkpoint(
        cell, **source, train_strategy_filename=root / "strategy.ckpt", **more
    )
    held = found if more.get("return_param_dict") else {p.name: p for p in cell.get_parameters()}
    return {name: held[name].asnumpy().tobytes() for name in WANTED}


WAYS: list[dict[str, Any]] = [{"mode": "direct"}, {"mode": "cooperative"}, {"return_param_dict": True}]


@pytest.mark.parametrize("way", WAYS, ids=["direct", "cooperative", "a dictionary"])
def test_rules_take_what_no_strategy_lists(way: dict[str, Any], tmp_path: Path) -> None:
    strategy = strategy_of({"listed": Layout((2,), ((0,), ()))}, tmp_path / "strategy.ckpt")
    cut(strategy, FULL, tmp_path / "shards", FROZEN)
    assert loaded(tmp_path, **way) == {name: array.tobytes() for name, array in WANTED.items()}


@pytest.mark.parametrize("way", WAYS, ids=["direct", "cooperative", "a dictionary"])
def test_rules_take_nothing_that_differs_by_rank(way: dict[str, Any], tmp_path: Path) -> None:
    listed = {**FULL, "g": FROZEN["g"]}
    strategy = strategy_of({"listed": Layout((2,), ((0,), ())), "g": Layout((2,), ((0,),))}, tmp_path / "all.ckpt")
    cut(strategy, listed, tmp_path / "shards", {name: FROZEN[name] for name in "fh"})
    strategy_of({"listed": Layout((2,), ((0,), ()))}, tmp_path / "strategy.ckpt")
    for folder in (tmp_path / "shards").iterdir():
        file = next(folder.glob("*.safetensors"))
        held = ms_ckpt_ext.load(file).arrays()
        held["g"] = held["g"] + float(folder.name[-1])
        save_file(held, file)
    with pytest.raises(LayoutMismatchError, match="'g' .*the ranks' files differ in it.*no rule can take it"):
        loaded(tmp_path, **way)
