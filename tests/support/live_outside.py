"""Loads into Cells of what no strategy lists: a source of all kinds, and what every rank should have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ms_ckpt_ext.bridge.together import SharedSource as Together
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import Manifest, write_manifest
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.cells import Filled
from tests.support.outside import Content, Source, listed, slices, whole

FROZEN = np.arange(48, dtype=np.float32).reshape(8, 6)
MODES = {
    "alone": ("alone", "none"),
    "direct": ("direct", "replicas"),
    "cooperative": ("cooperative", "none"),
    "replicas": ("cooperative", "replicas"),
    "full": ("cooperative", "full"),
    "auto": ("auto", "none"),
}


def together(src: Source) -> Together:
    """The checkpoint, as ranks read it together."""
    strategy = load_strategy(str(src.strategy))
    return Together(partial(list_checkpoint, str(src.shards), strategy), strategy)


def recorded(src: Source) -> Source:
    """The same, with a manifest of digests."""
    files = {f"rank_{rank}/net.safetensors": src.file(rank) for rank in src.held}
    write_manifest(str(src.shards), Manifest({n: digest_file(read_index(str(p))) for n, p in files.items()}))
    return src


def assert_own(filled: list[Filled], src: Source, names: tuple[str, ...]) -> None:
    """Every rank got what its own file holds under these names."""
    for rank, got in enumerate(filled):
        assert got.error is None, got.error
        for name in names:
            assert got.held[name].tobytes() == src.held[rank][name].tobytes(), f"{name} of rank {rank}"


def wanting(src: Source, names: tuple[str, ...], target: Strategy) -> Any:
    """By rank, what a network of the same job has."""

    def wanted(rank: int) -> Mapping[str, Any]:
        held = {name: src.held[rank][name] for name in names if name in src.held[rank]}
        for name in target.names_of(rank):
            layout = target.layout(name, rank)
            assert layout is not None
            held[name] = whole(name)[layout.region(rank % target.devices_per_stage, whole(name).shape).slices]
        return held

    return wanted


OUTSIDE: dict[str, Content] = {
    "frozen": slices(Layout((2, 2), ((0,), ())), FROZEN, 4),
    "columns": slices(Layout((2, 2), ((), (0,))), FROZEN.astype(np.float16), 4),
    "generator": lambda rank: np.arange(625, dtype=np.uint32) + rank,
    "cursor": lambda rank: np.array(rank + 5, np.int64),
    "ragged": lambda rank: np.full((rank + 1, 3), rank, np.float32),
    "mask": lambda rank: np.arange(5) % 2 == rank % 2,
    "none": lambda rank: np.zeros((0, rank + 1), np.float32),
    "global_step": np.array([7], np.int32),
    "shared": np.random.default_rng(0).random((300, 70)).astype(np.float32),
}
NAMES = tuple(OUTSIDE)
TARGET = listed(4, matrices=[(2, 2)])
