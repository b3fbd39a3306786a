"""Which files a checkpoint consists of, before any is opened.

A directory of rank folders, a merged checkpoint with its map, a folder of MindFormers, or files named one by one: all
become one value, which every host of a cooperative load makes alike and `catalog` turns into a source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import DiscoveryError, also
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.table import STRATEGY, format_of, is_mindformers, kind_of

if TYPE_CHECKING:
    from ms_ckpt_ext.formats.discovery.mindformers import Folder


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
    folder: Optional[Folder] = None


def list_checkpoint(
    path: str,
    strategy: Optional[Strategy],
    file_suffix: Optional[str] = None,
    require_sharded: bool = False,
    kind: Optional[str] = None,
) -> Listing:
    """The files of a sharded checkpoint (needs its strategy unless a single rank saved it) or of whole parameters.

    Args:
        path: the directory where they are, the index of a model in parts, or one file.
        strategy: what cut them, if anything did; one file is then rank 0's.
        file_suffix: which file of a rank folder, see `formats.discovery.rank_folders`.
        require_sharded: there must be rank folders.
        kind: "safetensors" or "ckpt"; None for whichever is there.

    Raises:
        DiscoveryError: also when files of several ranks, or of another than rank 0, come without a strategy, or files
            of both kinds without `kind`.
    """
    if strategy is None:
        _warn_of_one_rank(path)
    if not require_sharded and os.path.isfile(path):
        return _list_file(path, strategy, kind)
    folder = None if require_sharded or strategy is not None else _mindformers_folder(path)
    if folder is not None:
        return Listing(folder.files, False, None, folder)
    if require_sharded or (rank_folders.is_sharded(path) and not (strategy is None and _has_map(path))):
        world = None if strategy is None else strategy.world
        return _of_ranks(rank_folders.rank_files(path, kind, file_suffix, world), strategy, path)
    from ms_ckpt_ext.formats.discovery.whole_models import unified_files  # which rank folders do without

    found = unified_files(path, kind, file_suffix, ranked=strategy is not None and strategy.world > 1)
    if found.ranks:
        return _of_ranks(found.ranks, strategy, path)
    hyper = {} if found.hyper is None else {os.path.basename(found.hyper): found.hyper}
    return Listing({**found.files, **hyper}, False, found.names)


def _mindformers_folder(path: str) -> Optional[Folder]:
    """A folder of MindFormers', if it is one."""
    names = [child.name for child in rank_folders.inside(Path(path))] if os.path.isdir(path) else []
    if not any(map(is_mindformers, names)):
        return None
    from ms_ckpt_ext.formats.discovery.mindformers import find_folder

    return find_folder(path)


def _list_file(path: str, strategy: Optional[Strategy], kind: Optional[str]) -> Listing:
    from ms_ckpt_ext.formats.discovery.whole_models import is_map, unified_files

    folder, name = os.path.split(path)
    if is_map(name):
        found = unified_files(folder or os.curdir, kind, index=name)
        return Listing(found.files, False, found.names)
    form = format_of(name)
    if form is not None and kind_of(path) == STRATEGY:
        raise DiscoveryError(
            f"{path!r} is a strategy file, which has the same suffix as a checkpoint; give the checkpoint's path here"
        )
    if kind is not None and not name.endswith(f".{kind}"):
        error = also(DiscoveryError, NotADirectoryError)
        raise error(f"{path!r} is a file, and none of the format {kind!r} by its name; check path and format")
    return Listing({name if strategy is None else "0": path}, strategy is not None, None)


def _warn_of_one_rank(path: str) -> None:
    """Who gives the folder of one rank of several may have meant the folder above it."""
    folder = os.path.abspath(os.path.dirname(path) if os.path.isfile(path) else path)
    above, name = os.path.split(folder)
    if rank_folders.RANK_FOLDER.match(name) and os.path.isdir(folder):
        others = len(rank_folders.rank_folders(above)) - 1
        if others:
            log.warning(
                "%r is of one rank, and beside it there are %d others: it is taken for the whole model, which is wrong "
                "where the ranks hold slices; give %r and the strategy if they do",
                path,
                others,
                above,
            )


def _has_map(directory: str) -> bool:
    from ms_ckpt_ext.formats.discovery.whole_models import is_map

    return any(is_map(path.name) for path in rank_folders.inside(Path(directory), Path.is_file))


def _of_ranks(files: Mapping[int, str], strategy: Optional[Strategy], directory: str) -> Listing:
    if strategy is None and len(files) > 1:
        flat = os.path.samefile(os.path.dirname(next(iter(files.values()))), directory)
        what = f"the files of {len(files)} ranks" if flat else f"{len(files)} rank folders"
        raise DiscoveryError(
            f"{directory!r} holds {what}, so the strategy that cut them is needed: "
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
