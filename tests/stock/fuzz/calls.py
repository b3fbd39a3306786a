"""The table of all calls, and the case of a seed."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Callable

from tests.stock.fuzz import converting, cutting, family, loading, merging
from tests.stock.fuzz.cases import Case
from tests.stock.fuzz.mistakes import mistaken

BUILDERS: dict[str, tuple[Callable[[Random, Path], Case], int]] = {
    "unify": (merging.unify, 4),
    "transform": (cutting.transform, 5),
    "transform_whole": (cutting.transform_whole, 2),
    "by_rank": (cutting.by_rank, 3),
    "rank_list": (cutting.rank_list, 1),
    "save_mode": (cutting.save_mode, 3),
    "into_network": (loading.into_network, 3),
    "ckpt_into_network": (loading.ckpt_into_network, 2),
    "strategies": (merging.strategies, 1),
    "searched": (family.searched, 1),
    "sliced": (family.sliced, 2),
    "group_info": (family.group_info, 1),
    "path_of_a_rank": (family.path_of_a_rank, 1),
    "convert_file": (converting.convert_file, 1),
    "convert_tree": (converting.convert_tree, 1),
    "load_file": (loading.load_file, 2),
    "load_segments": (loading.load_segments, 1),
}
"""Name -> how it is built, and how often."""


def build(seed: int, root: Path, name: str = "") -> Case:
    """The case of a seed, with its input in `root`; `name` chooses the builder."""
    rng = Random(seed)
    picked = rng.choices(list(BUILDERS), [weight for _, weight in BUILDERS.values()])[0]
    case = BUILDERS[name or picked][0](rng, root)
    tags = {tag for tag, chance in (("raw", 0.05), ("installed", 0.1)) if rng.random() < chance}
    case = case._replace(tags=case.tags | tags)
    return mistaken(rng, case, root) if rng.random() < 0.12 else case
