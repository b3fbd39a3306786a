"""Every job on files, for sources with tensors that their strategy does not list."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import (
    load_distributed_checkpoint,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.checkpoints import read_file
from tests.support.outside import Source, listed, slices, source

RNG = np.random.default_rng(1)
FROZEN = RNG.standard_normal((8, 6), np.float32)
HALF = slices(Layout((4,), ((0,), ())), FROZEN, 4)
STEP = np.array([7], np.int32)
OUTSIDE = {"frozen": HALF, "global_step": STEP}


def lora(root: Path, outside: Any = None, stages: int = 1) -> Source:
    """Four ranks (per stage) with a frozen parameter cut by rows that the strategy does not list."""
    return source(root / "src", listed(4, stages), OUTSIDE if outside is None else outside)


def save(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    """`load_distributed_checkpoint` that writes files."""
    load_distributed_checkpoint(
        None, None, wanted, source.strategy, format="safetensors", unified_safetensors_dir=source.shards,
        dst_safetensors_dir=target, **more,
    )  # fmt: skip
    return target


def transform(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    """`transform_checkpoints`, its files renamed as those of the other jobs."""
    transform_checkpoints(source.shards, target, "net", source.strategy, wanted, 1, "safetensors", **more)
    for folder in target.glob("rank_*"):
        (file,) = folder.glob("*.safetensors")
        file.rename(folder / "net.safetensors")
    return target


def by_rank(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    """`transform_checkpoint_by_rank`, one rank after another."""
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    files = {rank: source.file(rank) for rank in source.held}
    for rank in range(load_strategy(str(wanted)).world):
        path = target / f"rank_{rank}/net.safetensors"
        transform_checkpoint_by_rank(rank, files, path, source.strategy, wanted, **more)
    return target


def reshard(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    """`reshard` for all ranks."""
    ms_ckpt_ext.reshard(source.shards, target, strategy=source.strategy, to_strategy=wanted, **more)
    return target


def reshard_by_rank(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    """`reshard`, one rank after another."""
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    for rank in range(load_strategy(str(wanted)).world):
        ms_ckpt_ext.reshard(source.shards, target, strategy=source.strategy, to_strategy=wanted, rank=rank, **more)
    return target


Recut = Callable[..., Path]
RECUTS = [save, transform, by_rank, reshard, reshard_by_rank]
recuts = pytest.mark.parametrize("recut", RECUTS, ids=[recut.__name__ for recut in RECUTS])


def held_by(target: Path, rank: int) -> dict[str, bytes]:
    """What the result's file of a rank holds."""
    return {name: tensor.data for name, tensor in read_file(target / f"rank_{rank}/net.safetensors").items()}


def strategy_file(strategy: Strategy, path: Path) -> Path:
    """Write a strategy."""
    save_strategy(strategy, path)
    return path


def merges(source: Source, target: Path) -> list[Callable[..., Any]]:
    """Every way to merge it."""
    return [
        lambda **more: unified_safetensors(source.shards, source.strategy, target, **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, naming="huggingface", **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, to="ckpt", **more),
        lambda **more: unified_safetensors(source.shards, source.strategy, target, split_dst_file=(1, 2), **more),
        lambda **more: unified_safetensors(source.shards, source.strategy, target, split_dst_file=(2, 2), **more),
    ]
