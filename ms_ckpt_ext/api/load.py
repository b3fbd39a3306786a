"""A checkpoint into a network under another strategy, or cut anew into files."""

from __future__ import annotations

from collections.abc import Mapping
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
from ms_ckpt_ext.engine.catalog import open_catalog, read_extras
from ms_ckpt_ext.engine.jobs import recut_job
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError
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
        catalog = open_catalog(source, trained, file_suffix)
        if return_param_dict:
            return live.parameter_dict(network, catalog, strategy, rank, names, workers, limits)
        return live.fill(network, catalog, strategy, rank, names, strict_load, workers, limits)
    target = path_of(dst_safetensors_dir, "dst_safetensors_dir")
    strategy = as_strategy(predict_strategy, rank_id or 0)
    ranks = _ranks_of(rank_id, strategy)
    catalog = open_catalog(source, trained, file_suffix)
    job = recut_job(catalog, strategy, ranks, names, lambda rank: f"rank_{rank}/net.{output_format}")
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
            raise UsageError(f"{argument} must be 'safetensors' in this version, got {value!r}")


def _ranks_of(rank_id: Optional[int], strategy: Optional[Strategy]) -> list[int]:
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
