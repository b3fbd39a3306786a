"""A checkpoint into a network under another strategy, or cut anew into files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Optional

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    as_strategy,
    checked_name_map,
    execute,
    limits_of,
    path_of,
    workers_of,
)
from ms_ckpt_ext.core.strategy import Strategy
from ms_ckpt_ext.engine.catalog import list_checkpoint, open_catalog, read_extras
from ms_ckpt_ext.engine.jobs import recut_job
from ms_ckpt_ext.engine.session import LoadOptions
from ms_ckpt_ext.errors import ArgumentTypeError, UnsupportedError, UsageError
from ms_ckpt_ext.formats.strategy_file import load_strategy


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
    mode: Optional[str] = None,
    bucket_bytes: int = BUFFER_BYTES,
    prefetch: int = 1,
    verify: str = "none",
    trace: Optional[PathLike] = None,
    timeout: float = 600.0,
) -> Any:
    """Load a checkpoint into a network under another strategy, or cut it anew into files.

    Drop-in for `mindspore.load_distributed_checkpoint`; the arguments up to `return_param_dict` are MindSpore's.

    With a network, this is a collective call: either each rank reads just the bytes of its own slices, straight into
    its Parameters, or all ranks together read every byte once and exchange (see `mode`). With
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
        mode: "direct": every rank reads its own bytes, no communication at all; "cooperative": every byte of the
            checkpoint is read by one rank and exchanged over HCCL (MCCL on the CPU); "auto": the cheaper of the two.
            Default: the environment variable MS_CKPT_EXT_MODE, else "auto".
        bucket_bytes: staging memory of a rank for one round of a cooperative load.
        prefetch: rounds that are read ahead.
        verify: "none"; "replicas": afterwards compare digests between ranks that hold the same region.
        trace: write a Chrome trace of a cooperative load there.
        timeout: seconds that one exchange between ranks may last.

    Returns:
        `(param_not_load, ckpt_not_load)` as `load_param_into_net` gives them, or the parameter dict; True in save mode.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments; nothing was changed.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was changed.
        DisagreementError, PeerError, TransportError: ranks differ in their inputs, another rank failed, or has gone.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    _check_formats(format, output_format)
    source = path_of(unified_safetensors_dir, "unified_safetensors_dir")
    if checkpoint_filenames is not None or dec_key is not None:
        raise UsageError("checkpoint_filenames and dec_key do not go with format='safetensors'")
    names = checked_name_map(name_map)
    workers, limits = workers_of(max_process_num), limits_of(buffer_bytes)
    trained = None
    if train_strategy_filename is not None:
        trained = load_strategy(path_of(train_strategy_filename, "train_strategy_filename"))
    if network is not None:
        from ms_ckpt_ext.bridge import network as live

        rank = live.own_rank()
        strategy = as_strategy(predict_strategy, rank)
        options = LoadOptions(
            mode=mode or os.environ.get("MS_CKPT_EXT_MODE") or "auto",
            bucket_bytes=bucket_bytes,
            prefetch=prefetch,
            verify=verify,
            trace="" if trace is None else path_of(trace, "trace"),
            timeout=timeout,
        )
        if return_param_dict:
            catalog = open_catalog(source, trained, file_suffix, kind=format)
            return live.parameter_dict(network, catalog, strategy, rank, names, workers, limits)
        if options.mode == "direct" and verify == "none":
            catalog = open_catalog(source, trained, file_suffix, kind=format)
            return live.fill(network, catalog, strategy, rank, names, strict_load, workers, limits)
        from ms_ckpt_ext.bridge.together import Source, fill_together

        look = partial(list_checkpoint, source, trained, file_suffix, kind=format)
        shared = Source(look, trained)
        return fill_together(network, shared, strategy, rank, names, strict_load, options, workers, limits)
    target = path_of(dst_safetensors_dir, "dst_safetensors_dir")
    _check_rank(rank_id)
    strategy = as_strategy(predict_strategy, rank_id or 0)
    ranks = _ranks_of(rank_id, strategy)
    catalog = open_catalog(source, trained, file_suffix, kind=format)
    if rank_id is None:
        job = recut_job(catalog, strategy, ranks, names, lambda rank: f"rank_{rank}/net.{output_format}", target)
    else:  # a target of its own, so that the ranks of a job can do this at the same time
        job = recut_job(catalog, strategy, ranks, names, lambda _: f"net.{output_format}")
        target = os.path.join(target, f"rank_{rank_id}")
    execute(job, target, workers, limits, "reshard")
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
    strategy = None if strategy_file is None else load_strategy(path_of(strategy_file, "strategy_file"))
    return read_extras(path_of(checkpoint_dir, "checkpoint_dir"), strategy, file_suffix)


def _check_formats(source: str, target: str) -> None:
    for argument, value in (("format", source), ("output_format", target)):
        if value != "safetensors":
            raise UnsupportedError(f"{argument} must be 'safetensors' in this version, got {value!r}", argument)


def _check_rank(rank_id: Any) -> None:
    if rank_id is not None and (not isinstance(rank_id, int) or isinstance(rank_id, bool)):
        raise ArgumentTypeError(f"rank_id must be an int or None, got {type(rank_id).__name__}")
    if rank_id is not None and rank_id < 0:
        raise UsageError(f"rank_id must be at least 0, got {rank_id}")


def _ranks_of(rank_id: Optional[int], strategy: Optional[Strategy]) -> list[int]:
    if rank_id is None:
        if strategy is not None:
            strategy.check_complete()
        return list(range(strategy.world if strategy else 1))
    if strategy is not None and rank_id >= strategy.world:
        raise UsageError(f"rank_id must be between 0 and {strategy.world - 1} under predict_strategy, got {rank_id}")
    return [rank_id]
