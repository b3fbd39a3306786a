"""A parameter of one axis that several device axes split: MindSpore's file writes it as one of several axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ms_ckpt_ext import load, load_distributed_checkpoint, plan, transform_checkpoint_by_rank, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import cut, read_file, read_merged, strategy_of

LAYOUTS = {
    "bias": Layout((2, 3, 2), ((2, 0),)),
    "shard": Layout((2, 3, 2), ((1, 0),), 6, -1),
    "weight": Layout((2, 3, 2), ((1,), (0,))),
}
FULL = {
    "bias": np.arange(24, dtype=np.float32),
    "shard": np.arange(36, dtype=np.float32),
    "weight": np.arange(48, dtype=np.float32).reshape(6, 8),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    strategy = strategy_of(LAYOUTS, tmp_path / "src.ckpt")
    ones = {name: Layout((4,), ((0,),)) for name in ("bias", "shard")}
    strategy_of({**ones, "weight": Layout((4,), ((), (0,)))}, tmp_path / "dst.ckpt")
    return cut(strategy, FULL, tmp_path / "src")


def test_the_file_cannot_tell(source: Path) -> None:
    assert load_strategy(source.parent / "src.ckpt").layouts["bias"][0].tensor_map == ((2,), (0,))


def test_merge(source: Path, tmp_path: Path) -> None:
    unified_safetensors(source, tmp_path / "src.ckpt", tmp_path / "out")
    found, _ = read_merged(tmp_path / "out")
    assert {name: (t.shape, t.data) for name, t in found.items()} == {
        name: (array.shape, array.tobytes()) for name, array in FULL.items()
    }


def recut(source: Path, target: str, made: str = "src.ckpt") -> Path:
    root = source.parent
    load_distributed_checkpoint(
        None, None, root / target, root / made if made else None, format="safetensors",
        unified_safetensors_dir=source, dst_safetensors_dir=root / "out",
    )  # fmt: skip
    return root / "out"


def test_to_one_device_axis(source: Path) -> None:
    out = recut(source, "dst.ckpt")
    for rank in range(4):
        found = read_file(out / f"rank_{rank}/net.safetensors")
        assert found["bias"].data == FULL["bias"][6 * rank : 6 * rank + 6].tobytes()
        assert found["shard"].data == FULL["shard"][9 * rank : 9 * rank + 9].tobytes()


def test_to_several_device_axes(source: Path, tmp_path: Path) -> None:
    unified_safetensors(source, tmp_path / "src.ckpt", tmp_path / "whole")
    out = recut(tmp_path / "whole", "src.ckpt", made="")
    for rank in range(12):
        assert read_file(out / f"rank_{rank}/net.safetensors") == read_file(source / f"rank_{rank}/net.safetensors")


def test_by_rank(source: Path, tmp_path: Path) -> None:
    files = {rank: source / f"rank_{rank}/net.safetensors" for rank in range(12)}
    transform_checkpoint_by_rank(3, files, tmp_path / "net.safetensors", tmp_path / "src.ckpt", tmp_path / "dst.ckpt")
    assert read_file(tmp_path / "net.safetensors")["bias"].data == FULL["bias"][18:].tobytes()


def test_values_and_plans(source: Path, tmp_path: Path) -> None:
    with load(source, tmp_path / "src.ckpt") as held:
        assert held["shard"][10:20].tobytes() == FULL["shard"][10:20].tobytes()
    assert plan(source, tmp_path / "dst.ckpt", src_strategy=tmp_path / "src.ckpt").ranks


def test_more_axes_than_one_stay_an_error(tmp_path: Path) -> None:
    strategy = strategy_of({"w": Layout((2, 2), ((1,), (0,)))}, tmp_path / "src.ckpt")
    cut(strategy, {"w": np.ones((4, 4), np.float32)}, tmp_path / "src")
    strategy_of({"w": Layout((2, 2), ((1,), (0,), ()))}, tmp_path / "src.ckpt")
    with pytest.raises(LayoutMismatchError, match="has 2 axes; the layout has 3"):
        unified_safetensors(tmp_path / "src", tmp_path / "src.ckpt", tmp_path / "out")
