"""The functions users call: MindSpore's names and signatures, and what this package adds to them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Optional, Union

from ms_ckpt_ext import progress
from ms_ckpt_ext.core.reads import Limits
from ms_ckpt_ext.core.strategy import Strategy, strategy_from_layout_dict, strategy_from_messages
from ms_ckpt_ext.engine import offline
from ms_ckpt_ext.engine.catalog import open_catalog, read_extras
from ms_ckpt_ext.engine.jobs import PART_BYTES, Choice, MergeOptions, merge_job, recut_job
from ms_ckpt_ext.engine.offline import Job, Report
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError
from ms_ckpt_ext.formats import discovery
from ms_ckpt_ext.formats.strategy_file import load_strategy, merge_strategy_files

PathLike = Union[str, "os.PathLike[str]"]
log = logging.getLogger("ms_ckpt_ext")
BUFFER_BYTES = 64 << 20
"""Default buffer budget of one worker, in bytes."""


def unified_safetensors(
    src_dir: PathLike,
    src_strategy_file: Optional[PathLike],
    dst_dir: PathLike,
    merge_with_redundancy: bool = True,
    file_suffix: Optional[str] = None,
    max_process_num: int = 64,
    choice_func: Optional[Choice] = None,
    split_dst_file: Any = (),
    *,
    naming: str = "mindspore",
    part_bytes: int = PART_BYTES,
    buffer_bytes: int = BUFFER_BYTES,
) -> Report:
    """Merge the slices of all ranks into whole parameters, in memory that does not grow with the model.

    Drop-in for `mindspore.unified_safetensors`; the arguments up to `split_dst_file` are MindSpore's.

    Args:
        src_dir: holds `rank_{N}/*.safetensors`.
        src_strategy_file: strategy of the job that saved them: one file (merged if it has pipeline stages), or a
            directory with one file per stage. None when a single rank saved everything whole.
        dst_dir: gets `part{i}.safetensors`, `param_name_map.json` and, for what lies outside the strategy (training
            scalars), `hyper_param.safetensors`. An older result there is replaced when the new one is complete.
        merge_with_redundancy: kept for compatibility: which slices a file holds is read from the file.
        file_suffix: which file of a rank folder, see `formats.discovery`; None for the newest.
        max_process_num: upper bound on worker threads; never more than the cores this process may use.
        choice_func: parameter name -> True (keep), False (drop) or a str (new name).
        split_dst_file: (i, n): write share i of n, from 1; shares run independently, on any hosts that see `dst_dir`;
            whoever completes the set publishes it. "auto" takes i and n from the launcher's environment.
        naming: "mindspore", or "huggingface" for `model-00001-of-000NN.safetensors` and its index.
        part_bytes: aim for parts of at most this many bytes.
        buffer_bytes: buffer budget of each worker.

    Returns:
        What was read and written. `published` is False while other shares are missing.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was written.
        StorageError: no space or permission; what is finished is kept for a rerun and looks unfinished to loaders.
    """
    source, target = _path(src_dir, "src_dir"), _path(dst_dir, "dst_dir")
    if os.path.isfile(source):
        raise UsageError(f"src_dir must be the directory that holds the rank folders, got the file {source!r}")
    if choice_func is not None and not callable(choice_func):
        raise ArgumentTypeError(f"choice_func must be callable, got {type(choice_func).__name__}")
    task, tasks = _share(split_dst_file)
    options = MergeOptions(choice_func, task, tasks, naming, part_bytes)
    workers, limits = _workers(max_process_num), _limits(buffer_bytes)
    strategy = None if src_strategy_file is None else load_strategy(_path(src_strategy_file, "src_strategy_file"))
    _refuse_mixed(source)
    catalog = open_catalog(source, strategy, file_suffix, require_sharded=True)
    return _execute(merge_job(catalog, target, options), target, workers, limits, "merge")


def load_distributed_checkpoint(
    network: Any,
    checkpoint_filenames: Optional[list[str]] = None,
    predict_strategy: Any = None,
    train_strategy_filename: Optional[PathLike] = None,
    strict_load: bool = False,
    dec_key: Optional[bytes] = None,
    dec_mode: str = "AES-GCM",
    format: str = "ckpt",
    unified_safetensors_dir: Optional[PathLike] = None,
    dst_safetensors_dir: Optional[PathLike] = None,
    rank_id: Optional[int] = None,
    output_format: str = "safetensors",
    name_map: Optional[Mapping[str, str]] = None,
    max_process_num: int = 64,
    return_param_dict: bool = False,
    *,
    file_suffix: Optional[str] = None,
    buffer_bytes: int = BUFFER_BYTES,
) -> Any:
    """Load a checkpoint into a network under another strategy, or cut it anew into files.

    Drop-in for `mindspore.load_distributed_checkpoint`; the arguments up to `return_param_dict` are MindSpore's.

    With a network, each rank reads just the bytes of its own slices, straight into its Parameters. With
    `network=None` (save mode) the slices of `rank_id`, or of every rank, go to
    `dst_safetensors_dir/rank_{N}/net.{output_format}`.

    Args:
        network: the `Cell` to fill, or None.
        predict_strategy: layouts of the target: a strategy file or directory, the dict of
            `build_searched_strategy`, `Cell.parameter_layout_dict` or `Model.infer_predict_layout()`, or None for one
            device.
        train_strategy_filename: strategy that cut the source; needed when `unified_safetensors_dir` is sharded.
        strict_load: refuse to cast between dtypes of a family and to match names by suffix.
        format: "safetensors".
        unified_safetensors_dir: a merged checkpoint, or a sharded one (`rank_{N}/…`): no merge is needed first.
        dst_safetensors_dir: target of save mode.
        rank_id: rank of save mode; None for all.
        name_map: name in the network (or target strategy) -> name in the checkpoint.
        max_process_num: upper bound on worker threads.
        return_param_dict: with a network: return `{name: Parameter}` instead of filling it.
        file_suffix: which file of a rank folder of a sharded source; None for the newest.
        buffer_bytes: buffer budget of each worker.

    Returns:
        `(param_not_load, ckpt_not_load)` as `load_param_into_net` gives them, or the parameter dict; True in save mode.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments; nothing was changed.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was changed.
        LoadError: reading failed on the way; `changed` names the Parameters that may hold new bytes.
    """
    _check_formats(format, output_format)
    source = _path(unified_safetensors_dir, "unified_safetensors_dir")
    if checkpoint_filenames is not None or dec_key is not None:
        raise UsageError("checkpoint_filenames and dec_key do not go with format='safetensors'")
    names = _checked_name_map(name_map)
    workers, limits = _workers(max_process_num), _limits(buffer_bytes)
    trained = None
    if train_strategy_filename is not None:
        trained = load_strategy(_path(train_strategy_filename, "train_strategy_filename"))
    if network is not None:
        from ms_ckpt_ext.bridge import network as live

        rank = live.own_rank()
        strategy = as_strategy(predict_strategy, rank)
        catalog = open_catalog(source, trained, file_suffix)
        if return_param_dict:
            return live.parameter_dict(network, catalog, strategy, rank, names, workers, limits)
        return live.fill(network, catalog, strategy, rank, names, strict_load, workers, limits)
    target = _path(dst_safetensors_dir, "dst_safetensors_dir")
    strategy = as_strategy(predict_strategy, rank_id or 0)
    ranks = _ranks(rank_id, strategy)
    catalog = open_catalog(source, trained, file_suffix)
    job = recut_job(catalog, strategy, ranks, names, lambda rank: f"rank_{rank}/net.{output_format}")
    _execute(job, target, workers, limits, "reshard")
    return True


def training_scalars(
    checkpoint_dir: PathLike, strategy_file: Optional[PathLike] = None, file_suffix: Optional[str] = None
) -> dict[str, Any]:
    """What a checkpoint holds outside its strategy: `global_step`, `epoch_num`, `loss_scale`, learning rate, …

    Args:
        checkpoint_dir: a merged or a sharded checkpoint.
        strategy_file: of a sharded one; without it every parameter of a single element counts as a scalar.
        file_suffix: which file of a rank folder; None for the newest.

    Returns:
        name -> numpy array of the stored shape and dtype (raw uint16 for BF16, uint8 for narrower types).

    Raises:
        DiscoveryError, StrategyError, FormatError, StorageError: as for the merge.
    """
    strategy = None if strategy_file is None else load_strategy(_path(strategy_file, "strategy_file"))
    return read_extras(_path(checkpoint_dir, "checkpoint_dir"), strategy, file_suffix)


def merge_pipeline_strategys(src_strategy_dirs: PathLike, dst_strategy_file: PathLike) -> None:
    """Merge per-stage strategy files into one. Drop-in for `mindspore.merge_pipeline_strategys`.

    Raises:
        StrategyError: the directory holds no strategy files, or both kinds, or a bad one.
    """
    merge_strategy_files(
        _path(src_strategy_dirs, "src_strategy_dirs"), _path(dst_strategy_file, "dst_strategy_file")
    )


def as_strategy(value: Any, rank: int = 0) -> Optional[Strategy]:
    """Any form in which MindSpore gives layouts, as one value; None for one device.

    Raises:
        StrategyError: the value is of a legal type but its contents are not.
        ArgumentTypeError: it is none of the legal types.
    """
    if value is None or isinstance(value, Strategy):
        return value
    if isinstance(value, (str, os.PathLike)):
        return load_strategy(value)
    if isinstance(value, Mapping):
        if value and all(hasattr(message, "dev_matrix") for message in value.values()):
            return strategy_from_messages(value)
        from ms_ckpt_ext.bridge.world import group_size

        return strategy_from_layout_dict(value, rank, group_size)
    raise ArgumentTypeError(
        "a strategy must be a path, the dict of build_searched_strategy, a layout dict, or None; "
        f"got {type(value).__name__}"
    )


def _execute(job: Job, target: str, workers: int, limits: Limits, title: str) -> Report:
    total = sum(entry.nbytes for output in job.outputs for entry in output.layout.tensors.values())
    with progress.bar(title, total) as advance:
        report = offline.execute(job, target, workers, limits, advance)
    log.info("%s into %s: read %d bytes in %d reads, wrote %s", title, target, report.bytes_read, report.reads, report)
    return report


def _path(value: Any, argument: str) -> str:
    if isinstance(value, (str, os.PathLike)):
        return str(os.fspath(value))
    if value is None:
        raise UsageError(f"{argument} is needed here: give a path")
    raise ArgumentTypeError(f"{argument} must be a path, got {type(value).__name__}")


def _check_formats(source: str, target: str) -> None:
    for argument, value in (("format", source), ("output_format", target)):
        if value != "safetensors":
            raise UsageError(f"{argument} must be 'safetensors' in this version, got {value!r}")


def _checked_name_map(name_map: Optional[Mapping[str, str]]) -> Mapping[str, str]:
    if name_map is None:
        return {}
    if not isinstance(name_map, Mapping) or not all(isinstance(t, str) for pair in name_map.items() for t in pair):
        raise ArgumentTypeError("name_map must map names (str) in the network to names (str) in the checkpoint")
    sources = list(name_map.values())
    twice = sorted({name for name in sources if sources.count(name) > 1})
    if twice:
        log.warning("name_map gives several network parameters the same source: %s", twice)
    return name_map


def _ranks(rank_id: Optional[int], strategy: Optional[Strategy]) -> list[int]:
    if rank_id is not None and (not isinstance(rank_id, int) or isinstance(rank_id, bool)):
        raise ArgumentTypeError(f"rank_id must be an int or None, got {type(rank_id).__name__}")
    if rank_id is None:
        if strategy is not None:
            strategy.check_complete()
        return list(range(strategy.world if strategy else 1))
    if rank_id < 0 or (strategy is not None and rank_id >= strategy.world):
        world = strategy.world if strategy else 1
        raise UsageError(f"rank_id must be between 0 and {world - 1} under predict_strategy, got {rank_id}")
    return [rank_id]


def _workers(most: int) -> int:
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise UsageError(f"max_process_num must be an int of at least 1, got {most!r}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, cores, 16)


def _limits(buffer_bytes: int) -> Limits:
    if not isinstance(buffer_bytes, int) or buffer_bytes < 1 << 16:
        raise UsageError(f"buffer_bytes must be an int of at least 65536, got {buffer_bytes!r}")
    return Limits(tile=min(Limits().tile, buffer_bytes // 4))


def _share(split: Any) -> tuple[int, int]:
    if isinstance(split, str) and split == "auto":
        rank = os.environ.get("RANK_ID") or os.environ.get("RANK") or "0"
        size = os.environ.get("RANK_SIZE") or os.environ.get("MS_WORKER_NUM") or os.environ.get("WORLD_SIZE") or "1"
        return int(rank) + 1, int(size)
    if not split:
        return 1, 1
    if not isinstance(split, (tuple, list)) or len(split) != 2 or not all(type(n) is int for n in split):
        raise UsageError(f"split_dst_file must be () or (task, tasks), two ints from 1, or 'auto'; got {split!r}")
    return split[0], split[1]


def _refuse_mixed(directory: str) -> None:
    """Both kinds of files in the rank folders: which one is meant cannot be guessed."""
    if not discovery.is_sharded(directory):
        raise DiscoveryError(
            f"{directory!r} holds no rank_0, rank_1, … folders; a sharded checkpoint is DIR/rank_N/*.safetensors"
        )
    kinds = discovery.kinds(directory)
    if len(kinds) > 1:
        raise DiscoveryError(
            f"the rank folders of {directory!r} hold both .safetensors and .ckpt files; "
            "move one kind away so that it is clear which is meant"
        )
