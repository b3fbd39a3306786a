"""MindFormers' legacy way for whole files: a single device's checkpoint, or each rank's own (`auto_trans_ckpt: False`).

Stock reads a file into a dictionary of Parameters, then copies those into the network and the optimizer. Here the bytes
go straight into the Parameters; what the network does not have is not read. MindFormers decides what is
loaded where, as before; what would change the dictionary on its way (Hugging Face's names, adapters, dropped replicas)
is left to MindFormers, with a warning.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Callable, Optional

import numpy as np

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge import network as live
from ms_ckpt_ext.bridge.mindformers.loader import Both, set_step
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.bridge.request import LoadRequest
from ms_ckpt_ext.bridge.settle import Manner
from ms_ckpt_ext.engine.source.catalog import Catalog, files_catalog
from ms_ckpt_ext.engine.source.values import read_whole
from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.table import CKPT

_STEP = "global_step"
_LEAN = "a checkpoint without replicas, which the ranks broadcast"


def load_safetensors_checkpoint(
    stock: Callable[[], Any],
    options: Options,
    config: Any,
    load_checkpoint_files: Sequence[str],
    network: Any,
    strategy_path: str,
    load_ckpt_path: str,
    optimizer: Any,
    **more: Any,
) -> None:
    """Drop-in for `mindformers.utils.load_checkpoint_utils.load_safetensors_checkpoint`.

    Raises:
        FormatError, LayoutMismatchError: a damaged file, or one of another model; nothing was changed.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    if config.use_parallel and config.auto_trans_ckpt:
        stock()  # by `mindspore.load_distributed_checkpoint`, see `legacy`
        return
    from mindformers.utils import load_checkpoint_utils as theirs

    origin, _ = theirs._get_origin_network(network)
    catalog = files_catalog(load_checkpoint_files)
    reason = _unknown(more)
    if _lean(catalog, config):
        reason = _LEAN
    elif theirs.is_hf_safetensors_dir(load_ckpt_path, origin):
        reason = "Hugging Face's names by the legacy way"
    if reason:
        _leave(reason, stock)
        return
    _fill([network], catalog, options, _step(config, catalog) if optimizer and config.resume_training else None)


def load_ckpt(
    stock: Callable[[], Any],
    options: Options,
    config: Any,
    network: Any,
    optimizer: Any = None,
    model: Any = None,
    future: Any = None,
    **more: Any,
) -> None:
    """Drop-in for `mindformers.trainer.utils.load_ckpt`; raises as `load_safetensors_checkpoint`."""
    reason = _unknown(more)
    if future is not None:
        reason = "a file that is being loaded already (load_ckpt_async)"
    elif config.auto_trans_ckpt:
        reason = "files that MindFormers has transformed (auto_trans_ckpt)"
    elif config.remove_redundancy:
        reason = _LEAN
    elif hasattr(network, "llm_boost") or config.model.model_config.get("pet_config"):
        reason = "an adapter"
    elif not _plain(network):
        reason = f"weights that {type(network).__name__} fuses itself"
    files = _ckpt_files(config) if not reason else []
    if not files:
        _leave(reason or f"no .ckpt file that this package finds in {_load_path(config)!r}", stock)
        return
    catalog = files_catalog(files)
    _fill([network, optimizer] if optimizer else [network], catalog, options, _step(config, catalog))


def _unknown(more: Mapping[str, Any]) -> str:
    return f"arguments this package does not know: {sorted(more)}" if more else ""


def _leave(reason: str, stock: Callable[[], Any]) -> None:
    log.warning("%s; MindFormers' own loader serves this call", reason)
    stock()


def _lean(catalog: Catalog, config: Any) -> bool:
    """Whether a file says that it lacks replicas, or says nothing and the YAML does."""
    told = str(bool(config.get("remove_redundancy", False)))
    return any(index.metadata.get("remove_redundancy", told) == "True" for index in catalog.files)


def _plain(network: Any) -> bool:
    """Whether the network takes a checkpoint as it is: its `fuse_weight_from_ckpt` is that of MindFormers' base."""
    fuse = getattr(type(network), "fuse_weight_from_ckpt", None)
    return fuse is None or fuse.__module__ in ("mindformers.models.base_model", "mindformers.models.modeling_utils")


def _load_path(config: Any) -> Any:
    """What the YAML says is to be loaded. MindFormers 1.8 has it at the top."""
    return config.checkpoint.load_path if config.checkpoint else config.load_checkpoint


def _ckpt_files(config: Any) -> list[str]:
    """The files that `mindformers.trainer.utils.get_load_checkpoint_result` would read, in its order."""
    from mindformers.trainer import utils as theirs

    path = theirs.format_path(_load_path(config))
    if os.path.isfile(path):
        return [path]
    if theirs.check_ckpt_file_exist(path):
        return [os.path.join(path, name) for name in os.listdir(path) if name.endswith(CKPT.suffix)]
    if isinstance(config.resume_training, str):
        return [os.path.join(path, f"rank_{config.rank_id}", config.resume_training)]
    found = theirs.get_distribute_checkpoint_path(path)
    return [found] if found else []


def _step(config: Any, catalog: Catalog) -> Optional[int]:
    """The step to go on from, scaled where the batch size has changed; None to keep the file's own."""
    scale = config.runner_config.step_scale
    if scale is None or _STEP not in catalog.tensors:
        return None
    with catalog.readers() as readers:
        value = read_whole(catalog, readers, catalog.tensors[_STEP])
    try:
        return int(np.asarray(value).item() * scale)
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(
            f"{catalog.files[0].path!r} has {value!r:.80} for {_STEP}, which is no number of steps; restore the file"
        ) from error


def _fill(cells: Iterable[Any], catalog: Catalog, options: Options, step: Optional[int]) -> None:
    cell = Both(cells)
    request = LoadRequest(cell, None, 0, Manner(strict=False, exact=False), workers=options.workers)
    unused = live.fill(request, catalog).unused
    if step is not None:
        set_step(cell, step)
    paths = ", ".join(index.path for index in catalog.files)
    log.info("loaded %s by ms_ckpt_ext; not in the network: %s", paths, unused or "nothing")
