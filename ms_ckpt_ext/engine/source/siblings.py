"""Files of other ranks beside those that were named one by one: looked at for comparison, and for nothing else.

Who wants one rank's file names those of the source that hold its slices. Whether what no strategy lists is the same on
all ranks takes a rank on every device axis, whose file mostly lies where the names of the given ones say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import Outside, outside_of
from ms_ckpt_ext.engine.unlisted.proven import unseen_ranks
from ms_ckpt_ext.errors import CheckpointError, name_ranks
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import read_index


def with_files_beside(catalog: Catalog, given: Mapping[int, str]) -> Catalog:
    """The catalog of `given` files, by rank, with what lies outside the strategy in a few files of other ranks as well.

    Files that are not there, or cannot be read, are left alone.
    """
    strategy = catalog.strategy
    if strategy is None or not catalog.outside:
        return catalog
    wanted = {rank for ranks in _holders(catalog) for rank in unseen_ranks(catalog, ranks)}
    found = {rank: index for rank in sorted(wanted) if (index := _beside(catalog, given, rank)) is not None}
    if not found:
        return catalog
    log.info("looked at the files of %s, too, to compare what is not in %s", name_ranks([*found]), strategy.origin)
    files = (*catalog.files, *found.values())
    ranks = {**catalog.ranks, **{rank: len(catalog.files) + number for number, rank in enumerate(found)}}
    outside: Outside = outside_of(files, ranks, strategy.layouts.keys())
    return catalog._replace(files=files, ranks=ranks, **outside._asdict())


def _holders(catalog: Catalog) -> set[tuple[int, ...]]:
    """Which ranks hold what, outside the strategy."""
    held = {tuple(each.files) for each in (*catalog.unproven.values(), *catalog.own.values())}
    alone = (next(iter(tensor.placements[0].expected.values())) for tensor in catalog.extras.values())
    return {*held, *alone}


def _beside(catalog: Catalog, given: Mapping[int, str], rank: int) -> Optional[FileIndex]:
    for path in (path_of_rank(path, named, rank) for named, path in given.items()):
        if path is not None and os.path.isfile(path):
            try:
                return read_index(path, catalog.access)
            except CheckpointError:
                return None
    return None


def path_of_rank(path: str, rank: int, other: int) -> Optional[str]:
    """Where the file of another rank is, by the name of one rank's file; None when that does not say.

    >>> path_of_rank("src/rank_1/net_rank_1-3_1200.ckpt", 1, 12)
    'src/rank_12/net_rank_12-3_1200.ckpt'
    >>> path_of_rank("flat/net1.safetensors", 1, 2), path_of_rank("flat/net.safetensors", 0, 2)
    ('flat/net2.safetensors', None)
    """
    named = re.sub(rf"rank_{rank}(?!\d)", f"rank_{other}", path)
    if named == path:
        named = re.sub(rf"(?<!\d){rank}(?=\.\w+$)", str(other), path)
    return None if named == path else named
