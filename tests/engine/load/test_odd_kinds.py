"""Slices without elements, values without axes, integers and booleans, in loads that cast floats."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import load, merge, reshard
from ms_ckpt_ext.bridge.together import SharedSource
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.cells import fill, threads
from tests.support.checkpoints import cut, read_file, strategy_of

__all__ = ["threads"]
ROWS, COLUMNS, WHOLE = Layout((2,), ((0,), ())), Layout((2,), ((), (0,))), Layout((2,), ((), ()))
LAYOUTS = {
    "weight": ROWS,
    "no rows": COLUMNS,
    "no columns": ROWS,
    "no rows to cut": ROWS,
    "mask": COLUMNS,
    "codes": ROWS,
    "positions": ROWS,
    "scale": Layout((2,), ()),
    "count": Layout((2,), ()),
    "flag": Layout((2,), ()),
}
FULL: dict[str, np.ndarray] = {
    "weight": np.random.default_rng(0).random((8, 6)).astype(np.float32),
    "no rows": np.zeros((0, 6), np.float32),
    "no columns": np.zeros((8, 0), np.float32),
    "no rows to cut": np.zeros((0, 4), np.int32),
    "mask": np.arange(48).reshape(8, 6) % 3 == 0,
    "codes": np.arange(-24, 24, dtype=np.int8).reshape(8, 6),
    "positions": np.arange(48, dtype=np.int64).reshape(8, 6) << 33,
    "scale": np.array(1.5, np.float32),
    "count": np.array(1 << 40, np.int64),
    "flag": np.array(True),
}
EXTRAS = {"global_step": np.array([7], np.int32), "done": np.array([True, False]), "rate": np.array(0.25, np.float32)}
MODES = ["alone", "direct", "cooperative"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cut(strategy_of(LAYOUTS, tmp_path / "s.ckpt"), FULL, tmp_path / "shards", EXTRAS)
    return tmp_path


def of(saved: Path) -> SharedSource:
    strategy = load_strategy(saved / "s.ckpt")
    return SharedSource(partial(list_checkpoint, str(saved / "shards"), strategy), strategy)


def turned() -> dict[str, Layout]:
    """Rows where there were columns, and vice versa."""
    return {name: {ROWS: COLUMNS, COLUMNS: ROWS}.get(layout, layout) for name, layout in LAYOUTS.items()}


def wanted(layouts: dict[str, Layout], rank: int) -> dict[str, np.ndarray]:
    """What a rank has of each tensor; empty wherever the whole is empty."""

    def mine(name: str, whole: np.ndarray) -> np.ndarray:
        shape = layouts[name].slice_shape(whole.shape)
        return whole[layouts[name].region(rank, whole.shape).slices] if whole.size else np.zeros(shape, whole.dtype)

    return {**{name: mine(name, whole) for name, whole in FULL.items()}, **EXTRAS}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cast", [False, True])
def test_loads(mode: str, cast: bool, saved: Path) -> None:
    """Floats are cast where the network has another type; integers and booleans stay as they are."""
    target = strategy_of(turned(), saved / "t.ckpt")
    expected = [wanted(turned(), rank) for rank in range(2)]

    def network(rank: int) -> dict[str, np.ndarray]:
        floats = {n: a.astype(np.float16) for n, a in expected[rank].items() if a.dtype == np.float32 and cast}
        return {**expected[rank], **floats}

    for rank, filled in enumerate(fill(of(saved), target, network, 2, mode, "none" if mode == "alone" else "replicas")):
        assert filled.error is None, filled.error
        assert (filled.missing, filled.unused) == ([], [])
        for name, array in network(rank).items():
            assert filled.held[name].dtype == array.dtype and filled.held[name].shape == array.shape, name
            assert filled.held[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "dtype"), [("mask", np.float32), ("codes", np.float16), ("count", np.float32)])
def test_no_number_becomes_another_kind(mode: str, name: str, dtype: Any, saved: Path) -> None:
    """A boolean or an integer is no float: refused by name, and nothing is changed."""
    target = strategy_of(LAYOUTS, saved / "t.ckpt")
    got = fill(of(saved), target, lambda rank: {name: wanted(LAYOUTS, rank)[name].astype(dtype)}, 2, mode)
    assert any(isinstance(filled.error, LayoutMismatchError) for filled in got)
    assert all(f"'{name}'" in str(filled.error) for filled in got)


def test_merge_and_reshard(saved: Path) -> None:
    merge(saved / "shards", saved / "merged", strategy=saved / "s.ckpt")
    held = load(saved / "merged").arrays()
    for name, array in {**FULL, **EXTRAS}.items():
        got = held[name]
        assert not isinstance(got, str) and (got.dtype, got.shape) == (array.dtype, array.shape), name
        assert got.tobytes() == array.tobytes(), name
    strategy_of(turned(), saved / "t.ckpt")
    for source, how in ((saved / "shards", {"strategy": saved / "s.ckpt"}), (saved / "merged", {})):
        target = saved / f"cut_{source.name}"
        reshard(source, target, to_strategy=saved / "t.ckpt", **how)
        for rank in range(2):
            stored = read_file(target / f"rank_{rank}/net.safetensors")
            expected = wanted(turned(), rank)
            assert {name: (t.shape, t.data) for name, t in stored.items()} == {
                name: (array.shape, np.ascontiguousarray(array).tobytes()) for name, array in expected.items()
            }
