"""Sources with tensors that their strategy does not list, for the tests of what becomes of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Callable, NamedTuple, Union

import numpy as np
from safetensors.numpy import save_file

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.source.catalog import Catalog, catalog_of
from ms_ckpt_ext.formats.registry import read_indexes
from ms_ckpt_ext.formats.strategies.file import save_strategy

Content = Union[np.ndarray, Sequence[np.ndarray], Callable[[int], np.ndarray]]
"""What every rank holds: the same, or one for each, or by rank."""


class Source(NamedTuple):
    """A checkpoint in rank folders, and its strategy's file; `held` is rank -> name -> what lies outside it."""

    shards: Path
    strategy: Path
    held: Mapping[int, Mapping[str, np.ndarray]]

    def file(self, rank: int) -> Path:
        return self.shards / f"rank_{rank}" / "net.safetensors"

    def catalog(self) -> Catalog:
        """As headers tell it, nothing compared."""
        from ms_ckpt_ext.formats.strategies.file import load_strategy

        keys = {str(rank): str(self.file(rank)) for rank in self.held if self.file(rank).exists()}
        indexes = dict(zip(keys, read_indexes(keys.values())))
        return catalog_of(indexes, True, None, load_strategy(str(self.strategy)))


def listed(devices: int, stages: int = 1, matrices: Sequence[tuple[int, ...]] = ()) -> Strategy:
    """A strategy of one parameter `w` per stage and matrix (`w0.0`, …), cut by rows along the first device axis."""
    items = [
        LayoutItem(f"w{stage}.{number}", stage, Layout(matrix, ((len(matrix) - 1,), ())))
        for stage in range(stages)
        for number, matrix in enumerate(matrices or [(devices,)])
    ]
    return Strategy.from_items(items, "the strategy")


def layouts_file(path: Path, **layouts: Mapping[int, Layout]) -> Path:
    """A strategy's file: name -> stage -> layout."""
    items = [LayoutItem(name, stage, layout) for name, stages in layouts.items() for stage, layout in stages.items()]
    save_strategy(Strategy.from_items(items, "it"), path)
    return path


def whole(name: str) -> np.ndarray:
    """What a listed parameter holds."""
    return np.arange(48 * 24, dtype=np.float32).reshape(48, 24) + len(name)


def source(root: Path, strategy: Strategy, outside: Mapping[str, Content]) -> Source:
    """Write the files of every rank: its slices of what is listed, and what `outside` says it holds."""
    save_strategy(strategy, root.parent / f"{root.name}.ckpt")
    held = {rank: {name: _of(content, rank) for name, content in outside.items()} for rank in range(strategy.world)}
    for rank, mine in held.items():
        slices = {}
        for name in strategy.names_of(rank):
            layout = strategy.layout(name, rank)
            assert layout is not None
            box = layout.region(rank % strategy.devices_per_stage, whole(name).shape)
            slices[name] = np.ascontiguousarray(whole(name)[box.slices])
        folder = root / f"rank_{rank}"
        folder.mkdir(parents=True)
        save_file({**slices, **{n: a for n, a in mine.items() if a is not None}}, folder / "net.safetensors")
    present = {rank: {n: a for n, a in mine.items() if a is not None} for rank, mine in held.items()}
    return Source(root, root.parent / f"{root.name}.ckpt", present)


def _of(content: Content, rank: int) -> np.ndarray:
    if callable(content):
        return content(rank)
    return content if isinstance(content, np.ndarray) else content[rank]


def slices(layout: Layout, full: np.ndarray, devices: int) -> Callable[[int], np.ndarray]:
    """Rank -> its slice of `full` under a layout that the strategy does not list."""
    return lambda rank: np.ascontiguousarray(full[layout.region(rank % devices, full.shape).slices])
