"""Which files a checkpoint consists of, before any is opened.

A directory of rank folders, a merged checkpoint with its map, a folder of MindFormers, or files named one by one: all
become one value, which every host of a cooperative load makes alike and `catalog` turns into a source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.strategy import Strategy
from ms_ckpt_ext.errors import DiscoveryError
from ms_ckpt_ext.formats import discovery, mindformers


class Listing(NamedTuple):
    """The files of a checkpoint, before any is opened.

    Attributes:
        files: key -> path. The key says which file is meant on any host: a rank number as text, or a file's name.
        sharded: the keys are ranks.
        names: the parameter map of a merged checkpoint.
        folder: what a folder of MindFormers says about itself.
    """

    files: dict[str, str]
    sharded: bool
    names: Optional[dict[str, str]]
    folder: Optional[mindformers.Folder] = None


def list_checkpoint(
    directory: str,
    strategy: Optional[Strategy],
    file_suffix: Optional[str] = None,
    require_sharded: bool = False,
    kind: Optional[str] = None,
) -> Listing:
    """The files of a sharded checkpoint (needs its strategy unless a single rank saved it) or of a merged one.

    Args:
        directory: where they are.
        strategy: what cut them, if anything did.
        file_suffix: which file of a rank folder, see `discovery.rank_files`.
        require_sharded: there must be rank folders.
        kind: "safetensors" or "ckpt"; None for whichever is there.

    Raises:
        DiscoveryError: also when several rank folders, or another than rank 0's, come without a strategy, or files of
            both kinds without `kind`.
    """
    folder = None if require_sharded or strategy is not None else mindformers.find_folder(directory)
    if folder is not None:
        return Listing(folder.files, False, None, folder)
    merged_too = strategy is None and os.path.isfile(os.path.join(directory, discovery.MAP_NAME))
    if not require_sharded and (merged_too or not discovery.is_sharded(directory)):
        found = discovery.unified_files(directory, kind)
        hyper = {} if found.hyper is None else {os.path.basename(found.hyper): found.hyper}
        return Listing({**found.files, **hyper}, False, found.names)
    files = discovery.rank_files(directory, kind, file_suffix)
    if strategy is None and len(files) > 1:
        raise DiscoveryError(
            f"{directory!r} holds {len(files)} rank folders, so the strategy that cut them is needed: "
            "give the training job's strategy file"
        )
    if strategy is None and 0 not in files:
        (path,) = files.values()
        raise DiscoveryError(
            f"the only rank folder with a checkpoint in {directory!r} is that of {path!r}, and without a strategy only "
            "rank 0 counts as a whole model: give the training job's strategy file, or the other ranks' folders as well"
        )
    return Listing({str(rank): path for rank, path in files.items()}, True, None)


def list_files(files_by_rank: Mapping[int, str], strategy: Optional[Strategy]) -> Listing:
    """A sharded checkpoint whose files were named one by one.

    Raises:
        DiscoveryError: no file, or several without the strategy that cut them.
    """
    if not files_by_rank or (strategy is None and len(files_by_rank) > 1):
        raise DiscoveryError(
            f"{len(files_by_rank)} checkpoint files {'and' if files_by_rank else 'or'} no strategy: "
            "give every file that is needed, and the strategy of the job that saved them"
        )
    return Listing({str(rank): path for rank, path in files_by_rank.items()}, True, None)
