"""Slices into whole parameters, file to file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    access_of,
    as_strategy,
    checked_format,
    checked_naming,
    checked_rules,
    checked_words,
    path_of,
    running,
    seal_of,
)
from ms_ckpt_ext.api.jobs import run_merge, share_of
from ms_ckpt_ext.api.source import Filter, Source
from ms_ckpt_ext.engine.files.job import Report
from ms_ckpt_ext.engine.files.merge import PART_BYTES, MergeOptions
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Choice
    from ms_ckpt_ext.formats.crypto import KeyLike


@few_collections()
def unified_safetensors(
    src_dir: PathLike,
    src_strategy_file: Any,
    dst_dir: PathLike,
    merge_with_redundancy: bool = True,
    file_suffix: Optional[str] = None,
    max_process_num: Optional[int] = 64,
    choice_func: Optional[Choice] = None,
    split_dst_file: Any = (),
    *,
    naming: str = "mindspore",
    part_bytes: int = PART_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
    digests: bool = True,
    sync: bool = True,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    crc_check: bool = False,
    crc: bool = False,
    output_format: str = "safetensors",
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = "AES-GCM",
    rules: Sequence[Rule] = (),
    name_map: Optional[Mapping[str, str]] = None,
    allow_equal_slices: bool = False,
) -> Report:
    """Merge the slices of all ranks into whole parameters, in memory that does not grow with the model.

    Drop-in for `mindspore.unified_safetensors`; the arguments up to `split_dst_file` are MindSpore's.

    Args:
        src_dir: holds `rank_{N}/*.safetensors`, or `.ckpt` files.
        src_strategy_file: strategy of the job that saved them: one file (merged if it has pipeline stages), or a
            directory with one file per stage. None when a single rank saved everything whole. Any other form that
            `as_strategy` takes will do, such as a list of the file and what it lacks.
        dst_dir: gets `part{i}.safetensors`, `param_name_map.json` and, for what lies outside the strategy (training
            scalars), `hyper_param.safetensors`. An older result there is replaced when the new one is complete.
        merge_with_redundancy: kept for compatibility: which slices a file holds is read from the file.
        file_suffix: which file of a rank folder, see `formats.discovery.rank_folders`; None for the newest.
        max_process_num: upper bound on worker threads, at most the cores this process may use; None for all of them.
        choice_func: parameter name -> True (keep), False (drop) or a str (new name).
        split_dst_file: (i, n): write share i of n, from 1, on any hosts. Shares that have begun in one `dst_dir` appear
            together; one that sees no other there publishes what it has, and the report and the log say what is
            missing: the files of all shares, gathered from several disks, are the whole result. "auto" takes i and n
            from the launcher's environment.
        naming: "mindspore", or "huggingface" for `model-00001-of-000NN.safetensors` and its index.
        part_bytes: aim for parts of at most this many bytes; with Hugging Face's names it is a limit.
        buffer_bytes: buffer budget of each worker.
        digests: write `ms_ckpt_ext.digests.json` beside the files: xxh3-128 of every tensor, see
            `engine.integrity.manifest`.
        sync: the result is on disk, safe from a power cut, when this returns. False is for speed: `cp` does not wait
            for the disk either. Being killed harms no result in either case. With shares it must be True.
        dec_key: key of encrypted sources: bytes, or what `load_key` gives. Default: the environment variable
            MS_CKPT_EXT_DEC_KEY.
        dec_mode: "AES-GCM" (which covers this package's "chunked" container), "AES-CBC" or "SM4-CBC".
        crc_check: verify the checksum of every source file that has one.
        crc: give a checksum to every file that is written.
        output_format: "safetensors", or "ckpt" for `part{i}.ckpt` and `hyper_param.ckpt`.
        enc_key: encrypt what is written, except the map, which names parameters. Default: the environment variable
            MS_CKPT_EXT_ENC_KEY.
        enc_mode: for `.ckpt` "AES-GCM", "AES-CBC", "SM4-CBC" in MindSpore's format, or "chunked"; for safetensors
            "AES-GCM", in this package's chunked container. See docs/encryption.md.
        rules: weight rules (`ms_ckpt_ext.rules`), applied before `choice_func`; what they make is written.
        name_map: name in the result -> name in the checkpoint as `choice_func` left it, as for
            `load_distributed_checkpoint`; a source keeps its own name, too.
        allow_equal_slices: slices that are all equal are intended. Otherwise they are an error: `integrated_save=True`
            makes them by writing whole parameters into every rank's file; see `engine.unlisted.whole_slices`.

    Returns:
        What was read and written. `published` is False while files of other shares are `missing`.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was written.
        StorageError: no space or permission; what is finished is kept for a rerun and looks unfinished to loaders.
    """
    checked_words(unified_safetensors, locals(), ("merge_with_redundancy",))
    source, target = path_of(src_dir, "src_dir"), path_of(dst_dir, "dst_dir")
    if os.path.isfile(source):
        raise UsageError(f"src_dir must be the directory that holds the rank folders, got the file {source!r}")
    called = checked_naming(choice_func, name_map, scalars=False)
    task, tasks = share_of(split_dst_file, "split_dst_file")
    checked_format(output_format, "output_format")
    seal = seal_of(enc_key, enc_mode)
    options = MergeOptions(task, tasks, naming, part_bytes, output_format, crc, seal, digests)
    run = running(max_process_num, buffer_bytes, sync=sync)
    access, weight_rules = access_of(dec_key, dec_mode, crc_check), checked_rules(rules)
    strategy = as_strategy(src_strategy_file, argument="src_strategy_file")
    found = Source(source, list_checkpoint(source, strategy, file_suffix, require_sharded=True), strategy, access)
    catalog = found.ruled(found.slices(allow_equal_slices), weight_rules)
    return run_merge(catalog, target, options, run, called, Filter())


def merge_pipeline_strategys(src_strategy_dirs: PathLike, dst_strategy_file: PathLike) -> None:
    """Merge per-stage strategy files into one. Drop-in for `mindspore.merge_pipeline_strategys`.

    Args:
        src_strategy_dirs: the directory with the files of all pipeline stages, `.ckpt` or `.json`.
        dst_strategy_file: the file to write; JSON for a name that ends in `.json`.

    Raises:
        StrategyError: the directory holds no strategy files, or both kinds, or a bad one, or only merged ones.
        UsageError: the file to write is one of those to be merged.
    """
    from ms_ckpt_ext.formats.strategies.merging import merge_strategy_files

    merge_strategy_files(
        path_of(src_strategy_dirs, "src_strategy_dirs"), path_of(dst_strategy_file, "dst_strategy_file")
    )
