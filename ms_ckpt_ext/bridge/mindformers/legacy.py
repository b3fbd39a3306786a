"""MindFormers' legacy way (`auto_trans_ckpt: True` with rank folders) without its merge.

Stock: rank 0 merges all rank folders into `unified_checkpoint/` while the others wait, then every rank loads from
there. Here rank 0 leaves a note in that folder instead (where the source is, its strategy, which file of a rank
folder), the training scalars that MindFormers reads itself, and a link to one source file, in whose header it looks for
names; the load then goes to the source. `mindspore.load_distributed_checkpoint` must be ours (`ms_ckpt_ext.install`).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from types import ModuleType
from typing import Any, Optional

import numpy as np
from safetensors.numpy import save_file

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.source.values import read_extras
from ms_ckpt_ext.errors import CheckpointError, FormatError, storage_error
from ms_ckpt_ext.formats.discovery.rank_folders import HYPER_NAMES
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.formats.table import SAFETENSORS
from ms_ckpt_ext.storage.linux import read_small
from ms_ckpt_ext.storage.reader import from_json

NOTE_NAME = "ms_ckpt_ext_source.json"
_SAID = {"unified_safetensors_dir", "train_strategy_filename", "file_suffix"}
_MODULE = "mindformers.utils.load_checkpoint_utils"
_stock: dict[str, Any] = {}
"""Name in MindFormers' module -> what stood there; empty while nothing is replaced."""


def install(options: Options) -> list[str]:
    """Replace the merge and the load that follows it; returns the names of what is served."""
    module = _module()
    if module is None or not hasattr(module, "unify_safetensors") or _stock:
        return []
    _stock.update(unify_safetensors=module.unify_safetensors, ms=module.ms)
    setattr(module, "unify_safetensors", unify_safetensors)  # noqa: B010 - a module that mypy does not know
    setattr(module, "ms", _Redirected(options))  # noqa: B010
    return ["unify_safetensors"]


def uninstall() -> None:
    """Put everything back."""
    module = _module() if _stock else None
    for name, value in _stock.items():
        setattr(module, name, value)
    _stock.clear()


def _module() -> Optional[ModuleType]:
    import importlib

    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        return None


class _Redirected(ModuleType):
    """`mindspore` as that module sees it: a load from a folder with a note goes to what the note names."""

    def __init__(self, options: Options) -> None:
        super().__init__("mindspore")
        self._options = options

    def __getattr__(self, name: str) -> Any:
        return getattr(ms, name)

    def load_distributed_checkpoint(self, *args: Any, **named: Any) -> Any:
        """As `mindspore.load_distributed_checkpoint`, of the folder itself or of the note's source."""
        note = os.path.join(str(named.get("unified_safetensors_dir")), NOTE_NAME)
        if os.path.isfile(note):
            named.update(_read_note(note))
            options = self._options
            named.update(mode=options.way, verify=options.verify, bucket_bytes=options.bucket_bytes)
            named.update(hardware=options.hardware)
            log.info("loading %s straight from the rank folders", named["unified_safetensors_dir"])
        return ms.load_distributed_checkpoint(*args, **named)


def unify_safetensors(
    src_checkpoint: str,
    src_strategy_path: str,
    unified_path: str,
    use_parallel: bool = False,
    file_suffix: Optional[str] = None,
    remove_redundancy: bool = False,
) -> None:
    """Drop-in for MindFormers' function of that name: leaves a note where the merged checkpoint would be.

    Raises:
        DiscoveryError, StrategyError, FormatError: on rank 0, for a source that could not be loaded afterwards.
    """
    if "file_suffix" not in inspect.signature(ms.load_distributed_checkpoint).parameters:
        log.warning("mindspore.load_distributed_checkpoint is stock, so the rank folders are merged first")
        _stock["unify_safetensors"](
            src_checkpoint, src_strategy_path, unified_path, use_parallel, file_suffix, remove_redundancy
        )
        return
    from mindformers.tools.utils import is_main_rank

    if is_main_rank():
        try:
            _leave_note(src_checkpoint, src_strategy_path, unified_path, file_suffix)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise storage_error("leave a note in", unified_path, error) from error
    if use_parallel:
        from mindspore.communication.comm_func import barrier

        barrier()


def _read_note(path: str) -> dict[str, Any]:
    """Which source is meant. Raises FormatError when the note is not one of ours."""
    try:
        said = dict(from_json(read_small(path)))
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path!r} is no note of where the checkpoint is ({error}); start the job again") from error
    if said.keys() != _SAID or not all(value is None or isinstance(value, str) for value in said.values()):
        raise FormatError(f"{path!r} is no note of where the checkpoint is: it has {sorted(said)}; start the job again")
    return said


def _leave_note(source: str, strategy_path: str, target: str, file_suffix: Optional[str]) -> None:
    strategy = load_strategy(strategy_path)
    files = list_checkpoint(source, strategy, file_suffix, require_sharded=True, kind=SAFETENSORS.name).files
    scalars = read_extras(source, strategy, file_suffix, kind=SAFETENSORS.name)
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(target)
    os.symlink(os.path.abspath(next(iter(files.values()))), os.path.join(target, f"part0{SAFETENSORS.suffix}"))
    held = {name: value for name, value in scalars.items() if isinstance(value, np.ndarray)}
    save_file(held, os.path.join(target, HYPER_NAMES[0]), {"format": "ms"})
    note = {
        "unified_safetensors_dir": os.path.abspath(source),
        "train_strategy_filename": os.path.abspath(strategy_path),
        "file_suffix": file_suffix,
    }
    with open(os.path.join(target, NOTE_NAME), "w", encoding="utf-8") as file:
        json.dump(note, file, indent=4)
