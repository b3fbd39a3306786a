"""Rank folders beyond the strategy's: passed over where they are plainly of another save, else refused by name."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import errors, load, load_distributed_checkpoint, transform_checkpoints
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import (
    arrays,
    assert_merged,
    assert_nothing_complete,
    cut,
    merge,
    read_file,
    read_merged,
    scalars,
    source,
    strategy_of,
)

NAMES = tuple(arrays(0))


def larger_run(root: Path, layout: Layout, seed: int = 1) -> None:
    """What a run on eight ranks left in rank_4 … rank_7 before the smaller one came."""
    strategy = strategy_of(dict.fromkeys(NAMES, layout), root / "larger.ckpt")
    cut(strategy, arrays(seed), root / "old", scalars(seed))
    for rank in range(4, 8):
        shutil.move(root / "old" / f"rank_{rank}", root / "shards" / f"rank_{rank}")


def cut_otherwise(root: Path) -> None:
    larger_run(root, Layout((8,), ((0,), ())))


def of_another_step(root: Path) -> None:
    copies(root)
    for rank in range(8):
        folder = root / "shards" / f"rank_{rank}"
        (folder / "net.safetensors").rename(folder / f"net-{1 if rank > 3 else 2}_10.safetensors")


def older(root: Path) -> None:
    copies(root)
    for rank in range(4, 8):
        os.utime(root / "shards" / f"rank_{rank}" / "net.safetensors", (1e9, 1e9))


def at_another_step(root: Path) -> None:
    """Known only by their number: shapes and names are the same, and they are newer."""
    strategy = load_strategy(root / "strategy.ckpt")
    cut(strategy, arrays(1), root / "old", scalars(1))
    for rank in range(4):
        shutil.move(root / "old" / f"rank_{rank}", root / "shards" / f"rank_{rank + 4}")


def copies(root: Path) -> None:
    for rank in range(4):
        shutil.copytree(root / "shards" / f"rank_{rank}", root / "shards" / f"rank_{rank + 4}")


@pytest.mark.parametrize("left", [cut_otherwise, of_another_step, older, at_another_step])
def test_what_a_larger_run_left_is_passed_over(
    left: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = source(tmp_path / "run")
    left(root)
    merge(root, tmp_path / "merged")
    assert_merged(tmp_path / "merged")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "ranks 4, 5, 6, 7" in warning and "rank_4" in warning and "for 4 ranks" in warning
    whole = {**arrays(0), **scalars(0)}
    with load(root / "shards", root / "strategy.ckpt") as held:
        assert {name: value.tobytes() for name, value in held.arrays().items()} == {
            name: array.tobytes() for name, array in whole.items()
        }


def another_stage(root: Path) -> dict[str, np.ndarray]:
    return {"stage1.w": np.zeros((8, 8), np.float32)}


def a_frozen_matrix(root: Path) -> dict[str, np.ndarray]:
    return {"frozen.w": np.zeros((8, 8), np.float32), **scalars(0)}


def another_state(root: Path) -> dict[str, np.ndarray]:
    return {"loss_scale": np.zeros(1, np.float32), **scalars(0)}


def the_same_again(root: Path) -> dict[str, np.ndarray]:
    """Eight ranks saved it, and the strategy is for four: what rank 4 holds is unknown."""
    return {name: array[:, :16] for name, array in arrays(1).items() if name == "b.w"}


@pytest.mark.parametrize(
    ("surplus", "told"),
    [
        (another_stage, "'stage1.w', a parameter that the strategy does not list"),
        (a_frozen_matrix, "'frozen.w', a parameter that the strategy does not list"),
        (another_state, "'loss_scale', a parameter that the strategy does not list"),
        (the_same_again, "nothing tells it from the others"),
    ],
)
def test_what_may_be_of_this_save_is_refused_by_name(surplus: Callable[[Path], Any], told: str, tmp_path: Path) -> None:
    root = source(tmp_path / "run")
    (root / "shards" / "rank_5").mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in surplus(root).items()}, root / "shards/rank_5/net.safetensors")
    calls: list[Callable[[], Any]] = [
        lambda: merge(root, tmp_path / "out"),
        lambda: transform_checkpoints(root / "shards", tmp_path / "out", "x", root / "strategy.ckpt"),
        lambda: load_distributed_checkpoint(
            None,
            format="safetensors",
            unified_safetensors_dir=root / "shards",
            train_strategy_filename=root / "strategy.ckpt",
            dst_safetensors_dir=tmp_path / "out",
        ),
    ]
    for call in calls:
        with pytest.raises(errors.StrategyError, match=f"is for 4 ranks, but the checkpoint has .*rank_5.*{told}"):
            call()
        assert_nothing_complete(tmp_path / "out")


def test_only_what_was_left_is_no_checkpoint(tmp_path: Path) -> None:
    root = source(tmp_path / "run")
    cut_otherwise(root)
    for rank in range(4):
        shutil.rmtree(root / "shards" / f"rank_{rank}")
    with pytest.raises(errors.StrategyError, match="is for 4 ranks, but the checkpoint has .*rank_4"):
        merge(root, tmp_path / "out")


def tied(root: Path, whole: Layout, frozen: bool = False) -> Path:
    """Two pipeline stages of four ranks whose parameters are all tied, and the strategy of the first."""
    strategy = strategy_of(dict.fromkeys(NAMES, whole), root / "strategy.ckpt")
    extras = {**scalars(0), **({"frozen.w": np.ones((8, 8), np.float32)} if frozen else {})}
    cut(strategy, arrays(0), root / "shards", extras)
    copies(root)
    return root


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "layout",
    [Layout((4,), ((0,), ())), Layout((2, 2), ((1,), ()), 1, 2), Layout((2, 2), ((0,), ())), Layout((4,), ((), ()))],
)
def test_stages_that_repeat_the_first(
    layout: Layout, frozen: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tied(tmp_path / "run", layout, frozen)
    merge(root, tmp_path / "merged")
    found, extras = read_merged(tmp_path / "merged")
    assert {name: held.data for name, held in found.items()} == {n: a.tobytes() for n, a in arrays(0).items()}
    assert ("frozen.w" in extras) is frozen
    assert "they repeat what these hold" in caplog.text


def other_bytes(root: Path) -> None:
    """In the middle of one parameter of one rank."""
    file = root / "shards" / "rank_6" / "net.safetensors"
    held = {name: np.frombuffer(t.data, np.float32).copy() for name, t in read_file(file).items() if name in NAMES}
    held["c.w"][len(held["c.w"]) // 2] += 1
    save_file({name: array.reshape(-1, 32) for name, array in held.items()}, file)


def zeros_only(root: Path) -> None:
    for rank in range(8):
        file = root / "shards" / f"rank_{rank}" / "net.safetensors"
        save_file({name: np.zeros(t.shape, np.float32) for name, t in read_file(file).items() if name in NAMES}, file)


def copies_that_differ(root: Path) -> None:
    """Files of four slices, and a strategy of two slices on two ranks each."""
    strategy_of(dict.fromkeys(NAMES, Layout((2, 2), ((0,), ()))), root / "strategy.ckpt")


def frozen_ones_that_differ(root: Path) -> None:
    for rank in range(8):
        file = root / "shards" / f"rank_{rank}" / "net.safetensors"
        held = {
            name: np.frombuffer(t.data, np.float32).reshape(t.shape)
            for name, t in read_file(file).items()
            if name in NAMES
        }
        save_file({**held, "frozen.w": np.eye(8, dtype=np.float32) * (rank % 4)}, file)


@pytest.mark.parametrize("change", [other_bytes, zeros_only, copies_that_differ, frozen_ones_that_differ])
def test_what_does_not_repeat_the_others_is_refused(change: Callable[[Path], None], tmp_path: Path) -> None:
    root = tied(tmp_path / "run", Layout((4,), ((0,), ())))
    change(root)
    with pytest.raises(errors.StrategyError, match="is for 4 ranks, but the checkpoint has .*rank_4.*nothing tells it"):
        merge(root, tmp_path / "out")
