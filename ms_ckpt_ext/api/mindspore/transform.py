"""MindSpore's functions that cut a checkpoint anew for other ranks, file to file, in one pass and bounded memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    access_of,
    as_strategy,
    check_path,
    checked_format,
    checked_naming,
    checked_words,
    execute_with_progress,
    path_of,
    running,
    seal_of,
)
from ms_ckpt_ext.core.geometry.ranks import needed_for_whole, needed_ranks, same_cut
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.files.job import Report, check_apart
from ms_ckpt_ext.engine.files.order import of_ranks, of_transform
from ms_ckpt_ext.engine.files.reshard import recut_job
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import list_files
from ms_ckpt_ext.engine.source.renaming import Choice
from ms_ckpt_ext.engine.source.siblings import with_files_beside
from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError, integer, name_ranks
from ms_ckpt_ext.formats.crypto import KeyLike
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.table import CKPT, SUFFIXES
from ms_ckpt_ext.storage.threads import few_collections

_NOT_COUNTED = ("accu_grads", "adam_v", "adam_m")
"""Names that MindSpore leaves out when it compares which of two strategies has more parameters."""


@few_collections()
def transform_checkpoints(
    src_checkpoints_dir: PathLike,
    dst_checkpoints_dir: PathLike,
    ckpt_prefix: str,
    src_strategy_file: Any = None,
    dst_strategy_file: Any = None,
    process_num: Optional[int] = 1,
    output_format: str = "ckpt",
    *,
    file_suffix: Optional[str] = None,
    buffer_bytes: int = BUFFER_BYTES,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    crc_check: bool = False,
    crc: bool = False,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = "AES-GCM",
    digests: bool = True,
    sync: bool = True,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    allow_equal_slices: bool = False,
) -> Report:
    """Cut a sharded checkpoint anew for every rank of another strategy.

    Drop-in for `mindspore.transform_checkpoints`; the arguments up to `output_format` are MindSpore's. Deduplicated and
    encrypted sources are taken as well, and `.ckpt` may become safetensors.

    Args:
        src_checkpoints_dir: holds `rank_{N}/*.ckpt` or `rank_{N}/*.safetensors`; or one file, taken as that of rank 0.
        dst_checkpoints_dir: gets `rank_{N}/{ckpt_prefix}{N}.{output_format}`. When the source strategy is that of one
            pipeline stage and the target strategy lists more parameters, the files are those of that stage,
            `rank_{N}/{ckpt_prefix}{N}_part{stage}.{output_format}`.
            An older result of that prefix is replaced when the new one is complete.
        src_strategy_file: strategy that cut the source; None when rank 0 holds everything whole. Any form that
            `as_strategy` takes will do, such as a list of the file and what it lacks.
        dst_strategy_file: strategy of the target, likewise; None for one device. What it does not list is kept, whole
            or as the rank's own file has it; see docs/outside-the-strategy.md.
        process_num: upper bound on worker threads; 0 is one, None as many as help.
        output_format: "ckpt" or "safetensors".
        file_suffix: which file of a rank folder; None for the newest.
        buffer_bytes: buffer budget of each worker.
        dec_key, dec_mode, crc_check, enc_key, enc_mode: as in `load_distributed_checkpoint`.
        crc: give every file a checksum.
        digests: write `ms_ckpt_ext.digests.json` beside the files, see `engine.integrity.manifest`.
        sync: the files are on disk when this returns; False as in `unified_safetensors`.
        choice_func, name_map: as in `load_distributed_checkpoint`: the source of each name in the target.
        allow_equal_slices: as in `unified_safetensors`.

    Returns:
        What was read and written.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or a target in the source's rank folders; nothing was written.
        DiscoveryError: no rank folders, or files of both formats or of several steps, or it is not clear which file
            of a folder is meant.
        StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was written.
        StorageError: no space or permission; what is finished is kept for a rerun.
    """
    checked_words(transform_checkpoints, locals())
    source, target = (
        path_of(src_checkpoints_dir, "src_checkpoints_dir"),
        path_of(dst_checkpoints_dir, "dst_checkpoints_dir"),
    )
    prefix = _checked_prefix(ckpt_prefix)
    checked_format(output_format, "output_format")
    access, seal = access_of(dec_key, dec_mode, crc_check), seal_of(enc_key, enc_mode)
    naming = checked_naming(choice_func, name_map)
    run = running(process_num, buffer_bytes, sync=sync, argument="process_num", least=0)
    trained, wanted = (
        as_strategy(src_strategy_file, argument="src_strategy_file"),
        as_strategy(dst_strategy_file, argument="dst_strategy_file"),
    )
    files = _source_files(source, file_suffix, trained)
    kind = next(iter(files.values())).rsplit(".", 1)[-1]
    as_ckpt = kind == CKPT.name  # which MindSpore transforms in ways of its own
    if file_suffix is None and as_ckpt and os.path.isdir(source):
        _refuse_two_newest(files)
    part = _stage_alone(trained, wanted)
    if part is not None and trained is not None and as_ckpt:
        first = part * trained.devices_per_stage
        files = {rank - first: path for rank, path in files.items() if 0 <= rank - first < trained.devices_per_stage}
        trained = _only_stage(trained, part)
    suffix = f"_part{part}.{output_format}" if part is not None and as_ckpt else f".{output_format}"
    catalog = _catalog(files, trained, access, allow_equal_slices).called(naming)
    if part is not None and trained is not None and as_ckpt:
        wanted = _only_names(wanted, {*trained.layouts, *catalog.tensors, *catalog.outside})
    if wanted is not None:
        wanted.check_complete()
    ranks = range(wanted.world if wanted else 1)
    order = partial(of_transform, catalog, kind, wanted, part is not None and as_ckpt)
    recut = partial(recut_job, catalog, wanted, ranks, files=order, crc=crc, seal=seal, digests=digests)
    job = recut(lambda rank: f"rank_{rank}/{prefix}{rank}{suffix}", target)
    check_apart(job, target)
    return execute_with_progress(job, target, run, "transform")


@few_collections()
def transform_checkpoint_by_rank(
    rank_id: int,
    checkpoint_files_map: Mapping[int, PathLike],
    save_checkpoint_file_name: PathLike,
    src_strategy_file: Any = None,
    dst_strategy_file: Any = None,
    *,
    buffer_bytes: int = BUFFER_BYTES,
    max_process_num: int = 64,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    crc_check: bool = False,
    crc: bool = False,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = "AES-GCM",
    digests: bool = True,
    sync: bool = True,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    allow_equal_slices: bool = False,
) -> Report:
    """Cut the file of one rank of another strategy from the files that hold its slices.

    Drop-in for `mindspore.transform_checkpoint_by_rank`; the arguments up to `dst_strategy_file` are MindSpore's.

    Args:
        rank_id: rank of the target.
        checkpoint_files_map: rank of the source -> its file, `.ckpt` or safetensors; those of
            `rank_list_for_transform` suffice. Without a source strategy only rank 0 counts. What the strategies do not
            list is compared with files of other ranks, if these lie where the names of the given ones say.
        save_checkpoint_file_name: the file to write, `.ckpt` or `.safetensors`. Several ranks may do so at once.
        src_strategy_file, dst_strategy_file: as in `transform_checkpoints`.
        buffer_bytes, max_process_num: buffer budget of each worker, and upper bound on their number.
        dec_key, dec_mode, crc_check, crc, enc_key, enc_mode, digests, sync, choice_func, name_map, allow_equal_slices:
            as in `transform_checkpoints`.

    Returns:
        What was read and written.

    Raises:
        as `transform_checkpoints`; CoverageError names a rank whose file is missing in the map.
    """
    checked_words(transform_checkpoint_by_rank, locals())
    rank_id = integer(rank_id, "rank_id", 0)
    if not isinstance(checkpoint_files_map, Mapping):
        raise ArgumentTypeError("checkpoint_files_map must map ranks (int) to paths")
    given = {integer(rank, "a rank in checkpoint_files_map", 0): path for rank, path in checkpoint_files_map.items()}
    target = path_of(save_checkpoint_file_name, "save_checkpoint_file_name")
    if not target.endswith(SUFFIXES):
        raise UsageError(f"save_checkpoint_file_name must end with {' or '.join(reversed(SUFFIXES))}, got {target!r}")
    access, seal = access_of(dec_key, dec_mode, crc_check), seal_of(enc_key, enc_mode)
    naming = checked_naming(choice_func, name_map)
    run = running(max_process_num, buffer_bytes, sync=sync)
    trained, wanted = (
        as_strategy(src_strategy_file, argument="src_strategy_file"),
        as_strategy(dst_strategy_file, argument="dst_strategy_file"),
    )
    world = wanted.world if wanted else 1
    if rank_id >= world:
        raise UsageError(f"rank_id must be between 0 and {world - 1} under dst_strategy_file, got {rank_id}")
    files = {rank: path_of(path, f"the file of rank {rank}") for rank, path in sorted(given.items())}
    for rank, path in files.items():
        if os.path.isdir(path):
            raise UsageError(f"checkpoint_files_map gives rank {rank} the directory {path!r}; give the file in it")
    catalog = _catalog(files, trained, access, allow_equal_slices)
    if trained is not None and (wanted is None or not same_cut(trained, wanted)):
        catalog = with_files_beside(catalog, files)
    catalog = catalog.called(naming)
    folder, name = os.path.split(target)
    folder = folder or os.curdir
    order = of_ranks(catalog, given)
    job = recut_job(
        catalog, wanted, [rank_id], lambda _: name, files=lambda _: order, crc=crc, seal=seal, digests=digests
    )
    check_apart(job, folder)
    return execute_with_progress(job, folder, run, "transform")


def rank_list_for_transform(rank_id: int, src_strategy_file: Any = None, dst_strategy_file: Any = None) -> list[int]:
    """Ranks of the source whose files together hold what `rank_id` of the target needs, descending.

    Drop-in for `mindspore.rank_list_for_transform`. The list is as short as the layouts allow, where MindSpore's
    may name more ranks.

    Args:
        rank_id: rank of the target.
        src_strategy_file: strategy that cut the source; None when rank 0 holds everything whole.
        dst_strategy_file: strategy of the target; None for one device.

    Returns:
        Ranks, the largest first; [0] without a source strategy.

    Raises:
        ArgumentTypeError, UsageError, StrategyError: wrong arguments.
    """
    rank_id = integer(rank_id, "rank_id", 0)
    trained, wanted = (
        as_strategy(src_strategy_file, argument="src_strategy_file"),
        as_strategy(dst_strategy_file, argument="dst_strategy_file"),
    )
    if trained is None:
        return [0]
    if wanted is None:
        return sorted(needed_for_whole(trained), reverse=True)
    if rank_id >= wanted.world:
        raise UsageError(f"rank_id must be between 0 and {wanted.world - 1} under dst_strategy_file, got {rank_id}")
    # Of what neither lists, a rank keeps what its own file has where the ranks are the same.
    own = {rank_id} if same_cut(trained, wanted) else set()
    return sorted(needed_ranks(trained, wanted, rank_id) | own, reverse=True)


convert_checkpoints = transform_checkpoints
convert_checkpoint_by_rank = transform_checkpoint_by_rank
rank_list_for_convert = rank_list_for_transform
"""Newer names in `mindspore.parallel` for the same."""


def _checked_prefix(prefix: str) -> str:
    if os.path.basename(prefix) != prefix:
        raise UsageError(f"ckpt_prefix is the beginning of a file's name and holds no path; got {prefix!r}")
    check_path(prefix, "ckpt_prefix")
    return prefix


def _source_files(source: str, file_suffix: Optional[str], trained: Optional[Strategy]) -> Mapping[int, str]:
    """The file of every rank; one file, which MindSpore takes as well, is rank 0's."""
    if not os.path.isfile(source):
        return rank_folders.rank_files(source, None, file_suffix, None if trained is None else trained.world)
    if not source.endswith(SUFFIXES):
        raise DiscoveryError(f"src_checkpoints_dir is the file {source!r}, which is no checkpoint by its name")
    return {0: source}


def _catalog(files: Mapping[int, str], trained: Optional[Strategy], access: Access, allow_equal: bool) -> Catalog:
    """The source; without a strategy rank 0 holds all of it."""
    if trained is None:
        if len(files) > 1:
            log.warning(
                "src_strategy_file is None, so the file of rank 0 is taken for the whole model, and those of %s are "
                "passed over: give the strategy if they are slices",
                name_ranks(sorted(files.keys() - {0})),
            )
        files = {rank: path for rank, path in files.items() if rank == 0}
    return read_slices(list_files(files, trained), trained, access, allow_equal)


def _refuse_two_newest(files: Mapping[int, str]) -> None:
    """MindSpore takes the last name in alphabetical order, where `net-9_1.ckpt` comes after `net-10_1.ckpt`."""
    for path in files.values():
        folder, name = os.path.split(path)
        last = max(rank_folders.checkpoint_names(Path(folder), [CKPT.name]))
        if last != name:
            raise DiscoveryError(
                f"of the files in {folder!r}, {name!r} is the newest by its numbers, but MindSpore takes {last!r}, the "
                "last in alphabetical order; say with file_suffix which is meant, or move the others away"
            )


def _stage_alone(trained: Optional[Strategy], wanted: Optional[Strategy]) -> Optional[int]:
    """The stage that the source's strategy describes, if MindSpore would write only that stage's part of the target."""
    if trained is None or wanted is None or wanted.stages != 1:
        return None
    stages = {stage for held in trained.layouts.values() for stage in held}
    mine, theirs = (
        {name for name in strategy.layouts if not name.startswith(_NOT_COUNTED)} for strategy in (trained, wanted)
    )
    return stages.pop() if len(stages) == 1 and mine < theirs else None


def _only_stage(strategy: Strategy, stage: int) -> Strategy:
    """A strategy of one stage as one of a whole job."""
    layouts = {name: {0: stages[stage]} for name, stages in strategy.layouts.items()}
    return Strategy(layouts, strategy.devices_per_stage, 1, strategy.origin)


def _only_names(wanted: Optional[Strategy], listed: Collection[str]) -> Optional[Strategy]:
    """The part of the target that the source lists, by the target's names."""
    if wanted is None:
        return None
    layouts = {name: stages for name, stages in wanted.layouts.items() if name in listed}
    return Strategy(layouts, wanted.devices_per_stage, wanted.stages, wanted.origin)
