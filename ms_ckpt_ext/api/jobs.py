"""Merge and reshard, file to file, under plain names: any checkpoint as source, dry runs, formats and keys alike.

`unified_safetensors` and `load_distributed_checkpoint(network=None)` are MindSpore's names for the same jobs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    Running,
    any_mode,
    as_strategy,
    checked_choice,
    checked_format,
    checked_naming,
    checked_rules,
    checked_words,
    execute_with_progress,
    path_of,
    running,
    seal_of,
)
from ms_ckpt_ext.api.source import Filter, Globs, find_source
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.files.job import Report, check_apart
from ms_ckpt_ext.engine.files.merge import PART_BYTES, MergeOptions, merge_job
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, integer
from ms_ckpt_ext.formats.crypto import GCM
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Choice, Naming
    from ms_ckpt_ext.formats.crypto import KeyLike

# (rank, world) as rank tables, msrun, torchrun, Open MPI, MPICH and Intel MPI, and SLURM's srun give them; the first
# pair that is set counts. SLURM comes last, because its variables are also set for every launcher that it starts.
_LAUNCHERS = (
    ("RANK_ID", "RANK_SIZE"),
    ("RANK_ID", "MS_WORKER_NUM"),
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


@few_collections()
def merge(
    src: PathLike,
    dst: PathLike,
    *,
    strategy: Any = None,
    match: Globs = (),
    exclude: Globs = (),
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    rules: Sequence[Rule] = (),
    adapter: Optional[PathLike] = None,
    naming: str = "mindspore",
    part_bytes: int = PART_BYTES,
    share: Union[tuple[int, int], str] = (1, 1),
    to: str = "safetensors",
    file_suffix: Optional[str] = None,
    format: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = GCM,
    crc_check: bool = False,
    crc: bool = False,
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
    allow_equal_slices: bool = False,
) -> Report:
    """Put the slices of a checkpoint together, in memory that does not grow with the model.

    Args:
        src: rank folders, a merged directory (to cut its parts anew), or a file.
        dst: the directory for the result. An older result there is replaced when the new one is complete.
        strategy: of the job that saved rank folders, in any form that `as_strategy` takes.
        match, exclude: shell-style globs of parameter names; all by default. Training scalars always go along.
        choice_func: parameter name -> True (keep), False (drop) or a str (new name); after the globs.
        name_map: name in the result -> name in the checkpoint as `choice_func` left it, as for `reshard`.
        rules: weight rules (`ms_ckpt_ext.rules`), applied first.
        adapter: a folder with a LoRA adapter, as PEFT saves it, of the model in `src` by Hugging Face's names: its
            products are added to the weights before the rules move them.
        naming: "mindspore" or "huggingface", for names of files and the index.
        part_bytes: aim for parts of at most this many bytes; with Hugging Face's names it is a limit.
        share: (i, n): write share i of n, from 1, on any hosts. Shares that have begun in one directory appear
            together; one that sees no other there publishes what it has, and the report and the log say what is
            missing. "auto" takes i and n from the launcher's environment.
        to: "safetensors" or "ckpt".
        file_suffix, format: which file of a rank folder, and of which format; by default the newest, and what is there.
        dec_key, dec_mode: of an encrypted source; by default the key in MS_CKPT_EXT_DEC_KEY, where needed.
        enc_key, enc_mode: encrypt the result; by default with the key in MS_CKPT_EXT_ENC_KEY, if there is one.
        crc_check, crc: verify checksums of the source; give one to every file that is written.
        digests: write `ms_ckpt_ext.digests.json` beside the files, see `engine.integrity.manifest`.
        max_process_num, buffer_bytes: upper bound on worker threads, and the buffer budget of each.
        sync: the result is on disk, safe from a power cut, when this returns. False is for speed: `cp` does not wait
            for the disk either. Being killed harms no result in either case. With shares it must be True.
        dry_run: only report what would be read and written.
        allow_equal_slices: slices that are all equal are intended. Otherwise they are an error: `integrated_save=True`
            makes them by writing whole parameters into every rank's file; see `engine.unlisted.whole_slices`.

    Returns:
        What was read and written; of a dry run, a `Preview`.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was written.
        StorageError: no space or permission; what is finished is kept for a rerun.
    """
    checked_words(merge, locals())
    target, wanted = path_of(dst, "dst"), Filter(match, exclude)
    called = checked_naming(_choice(wanted, checked_choice(choice_func)), name_map, scalars=False)
    checked_format(to, "to")
    task, tasks = share_of(share, "share")
    options = MergeOptions(task, tasks, naming, part_bytes, to, crc, seal_of(enc_key, enc_mode), digests)
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    weight_rules = checked_rules(rules)
    source = find_source(src, strategy, file_suffix, any_mode(dec_key, dec_mode, crc_check), format, "src")
    catalog = source.ruled(source.slices(allow_equal_slices), weight_rules, adapter)
    return run_merge(catalog, target, options, run, called, wanted)


def run_merge(
    catalog: Catalog,
    target: str,
    options: MergeOptions,
    run: Running,
    naming: Optional[Naming],
    wanted: Filter,
) -> Report:
    """Merge a catalog, by arguments that are checked; `wanted` must leave something. Raises as `merge`."""
    catalog.require_any()
    wanted.check((*catalog.tensors, *catalog.absent))
    if catalog.outside:
        from ms_ckpt_ext.engine.unlisted.proven import judged

        catalog = judged(catalog)
    catalog = catalog.called(naming)
    job = merge_job(catalog, target, options)
    check_apart(job, target)
    return execute_with_progress(job, target, run, "merge")


@few_collections()
def reshard(
    src: PathLike,
    dst: PathLike,
    *,
    strategy: Any = None,
    to_strategy: Any = None,
    rank: Optional[int] = None,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    rules: Sequence[Rule] = (),
    adapter: Optional[PathLike] = None,
    to: str = "safetensors",
    file_suffix: Optional[str] = None,
    format: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = GCM,
    crc_check: bool = False,
    crc: bool = False,
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
    allow_equal_slices: bool = False,
) -> Report:
    """Cut a checkpoint anew for another strategy, straight from its slices, without a merge in between.

    Args:
        src: rank folders, a merged directory, or a file.
        dst: the directory for the result: `rank_N/net.safetensors` for every rank.
        strategy: of the job that saved rank folders; to_strategy: of the job that will load, None for one device.
        rank: write this rank's folder only, so that several hosts can do their ranks at the same time.
        choice_func: name in the source -> True (keep), False (leave out) or a str (new name); also of scalars.
        name_map: name in the result -> name in the source (as `choice_func` left it). It takes precedence
            over a parameter that already has that name; several names may share a source, which also keeps its own name
            where `to_strategy` lists it or is None: to rename, use `choice_func`.

    The other arguments, the result and the errors are those of `merge`.

    Raises:
        UsageError: also when there is no such rank.
        others: as `merge`.
    """
    checked_words(reshard, locals())
    target, naming = path_of(dst, "dst"), checked_naming(choice_func, name_map)
    checked_format(to, "to")
    seal = seal_of(enc_key, enc_mode)
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    weight_rules = checked_rules(rules)
    source = find_source(src, strategy, file_suffix, any_mode(dec_key, dec_mode, crc_check), format, "src")
    layout = as_strategy(to_strategy, argument="to_strategy")
    from ms_ckpt_ext.engine.files.reshard import folders_job  # which a merge does without

    ranks = _ranks(layout, rank)
    catalog = source.ruled(source.slices(allow_equal_slices), weight_rules, adapter).called(naming)
    alone = rank is not None
    job, target = folders_job(catalog, layout, ranks, alone, target, to, crc=crc, seal=seal, digests=digests)
    return execute_with_progress(job, target, run, "reshard")


def _choice(wanted: Filter, choice: Optional[Choice]) -> Optional[Choice]:
    if not wanted:
        return choice
    return lambda name: wanted(name) and (True if choice is None else choice(name))


def _ranks(strategy: Optional[Strategy], rank: Optional[int]) -> list[int]:
    if strategy is not None:
        strategy.check_complete()
    world = strategy.world if strategy else 1
    if rank is None:
        return list(range(world))
    rank = integer(rank, "rank", 0)
    if rank >= world:
        raise UsageError(f"rank must be between 0 and {world - 1} under to_strategy, got {rank}")
    return [rank]


def share_of(share: Any, argument: str) -> tuple[int, int]:
    """(i, n): share i of n, from 1. "auto" takes it from the launcher's environment; an empty value means all of it.

    Raises:
        ArgumentTypeError: it is neither that nor a pair of ints; the message calls it `argument`.
        UsageError: there is no such share, or the launcher's variables are no numbers.
    """
    if isinstance(share, str) and share == "auto":
        return _checked(argument, *_from_environment(argument))
    if not share:
        return 1, 1
    try:
        task, tasks = share if isinstance(share, (tuple, list)) else ()
        task, tasks = integer(task, argument), integer(tasks, argument)
    except ValueError:
        raise ArgumentTypeError(
            f"{argument} must be () or (task, tasks), two ints from 1, or 'auto'; got {share!r}"
        ) from None
    return _checked(argument, task, tasks)


def _checked(argument: str, task: int, tasks: int) -> tuple[int, int]:
    if not 1 <= task <= tasks:
        raise UsageError(f"{argument} must be (task, tasks) with 1 <= task <= tasks, got ({task}, {tasks})")
    return task, tasks


def _from_environment(argument: str) -> tuple[int, int]:
    for names in _LAUNCHERS:
        rank, world = map(os.environ.get, names)
        if rank and world:
            if not (rank.isdecimal() and world.isdecimal()):
                raise UsageError(f"{argument}='auto' needs numbers in {names[0]}={rank!r}, {names[1]}={world!r}")
            return int(rank) + 1, int(world)
    return 1, 1
