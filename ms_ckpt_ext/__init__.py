"""Checkpoint resharding for MindSpore: drop-in functions that read less, hold less and survive more.

Importing this package does not import mindspore; functions that need it import it when they are called.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Box": "core.geometry.box",
    "CheckpointError": "errors",
    "CheckpointRecorder": "bridge.callback",
    "Restored": "api.resume",
    "__version__": "_version",
    "TransformParametersD2D": "api.mindspore.d2d",
    "as_parameters": "api.mindspore.parameters",
    "as_strategy": "api.arguments",
    "build_searched_strategy": "api.mindspore.family",
    "ckpt_to_safetensors": "api.convert",
    "convert": "api.convert",
    "convert_checkpoint_by_rank": "api.mindspore.transform",
    "convert_checkpoints": "api.mindspore.transform",
    "decrypt": "api.convert",
    "encrypt": "api.convert",
    "diff_strategy": "api.diff",
    "export": "api.huggingface.export",
    "get_ckpt_path_with_strategy": "api.mindspore.family",
    "inspect": "api.inspect",
    "install": "api.mindspore.install",
    "load": "api.mindspore.parameters",
    "load_checkpoint": "api.mindspore.parameters",
    "load_checkpoint_async": "api.mindspore.background",
    "load_distributed_checkpoint": "api.mindspore.load",
    "load_for_inference": "api.resume",
    "load_key": "formats.crypto",
    "load_rules": "api.huggingface.families",
    "load_segmented_checkpoints": "api.mindspore.parameters",
    "measure": "api.measure",
    "merge": "api.jobs",
    "merge_pipeline_strategys": "api.mindspore.merge",
    "merge_sliced_parameter": "api.mindspore.family",
    "plan": "api.dry_run.plan",
    "plan_transfer": "api.transfer",
    "rank_list_for_convert": "api.mindspore.transform",
    "rank_list_for_transform": "api.mindspore.transform",
    "reshard": "api.jobs",
    "restore_group_info_list": "api.mindspore.family",
    "resume": "api.resume",
    "safetensors_to_ckpt": "api.convert",
    "training_scalars": "api.scalars",
    "transform_checkpoint_by_rank": "api.mindspore.transform",
    "transfer": "api.transfer",
    "transform_checkpoints": "api.mindspore.transform",
    "unified_safetensors": "api.mindspore.merge",
    "uninstall": "api.mindspore.install",
    "verify": "api.verify",
}

__all__ = [
    "Box",
    "CheckpointError",
    "CheckpointRecorder",
    "Restored",
    "TransformParametersD2D",
    "__version__",
    "as_parameters",
    "as_strategy",
    "build_searched_strategy",
    "ckpt_to_safetensors",
    "convert",
    "convert_checkpoint_by_rank",
    "convert_checkpoints",
    "decrypt",
    "encrypt",
    "diff_strategy",
    "export",
    "get_ckpt_path_with_strategy",
    "inspect",
    "install",
    "load",
    "load_checkpoint",
    "load_checkpoint_async",
    "load_distributed_checkpoint",
    "load_for_inference",
    "load_key",
    "load_rules",
    "load_segmented_checkpoints",
    "measure",
    "merge",
    "merge_pipeline_strategys",
    "merge_sliced_parameter",
    "plan",
    "plan_transfer",
    "rank_list_for_convert",
    "rank_list_for_transform",
    "reshard",
    "restore_group_info_list",
    "resume",
    "safetensors_to_ckpt",
    "training_scalars",
    "transform_checkpoint_by_rank",
    "transfer",
    "transform_checkpoints",
    "unified_safetensors",
    "uninstall",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
