"""LoRA adapters as PEFT saves them, and what they make of a model's weights, one number after another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from tests.support.families import LAYERS

Weights = Mapping[str, np.ndarray]
CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a model", "inference_mode": True,
    "r": 3, "lora_alpha": 5, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "lora_dropout": 0.1,
    "use_rslora": False, "use_dora": False, "use_qalora": False, "modules_to_save": None, "layers_to_transform": None,
    "rank_pattern": {}, "alpha_pattern": {}, "megatron_core": "megatron.core", "megatron_config": None,
    "loftq_config": {}, "revision": None, "auto_mapping": None, "target_modules": ["q_proj"],
}  # fmt: skip
"""What PEFT 0.17 writes, in short."""


def products(weights: Weights, modules: Sequence[str], r: int = 3, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """The tensors of an adapter for modules whose weights are (out, in)."""
    found = {}
    for number, module in enumerate(modules):
        rng = np.random.default_rng(number)
        rows, columns = weights[f"{module}.weight"].shape
        found[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((r, columns)).astype(dtype)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((rows, r)).astype(dtype)
    return found


def save_adapter(root: Path, tensors: Weights, without: Sequence[str] = (), **config: Any) -> Path:
    """A folder of an adapter."""
    root.mkdir(parents=True, exist_ok=True)
    said = {key: value for key, value in {**CONFIG, **config}.items() if key not in without}
    (root / "adapter_config.json").write_text(json.dumps(said, indent=2))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()}, root / "adapter_model.safetensors"
    )
    return root


def with_product(weight: np.ndarray, b: np.ndarray, a: np.ndarray, factor: float) -> np.ndarray:
    """weight + factor · b a in F32, the product summed up index by index; rounded to the weight's dtype."""
    b, a = b.astype(np.float32), a.astype(np.float32)
    total = b[:, :1] * a[:1]
    for index in range(1, a.shape[0]):
        total = total + b[:, index : index + 1] * a[index : index + 1]
    return (total * np.float32(factor) + weight.astype(np.float32)).astype(weight.dtype)


def with_adapter(weights: Weights, tensors: Weights, factor: float) -> dict[str, np.ndarray]:
    """A model's weights with an adapter for modules whose weights are (out, in)."""
    found = dict(weights)
    for name in tensors:
        module, ending, _ = name.partition(".lora_A.weight")
        if ending:
            weight = f"{module[len('base_model.model.') :]}.weight"
            found[weight] = with_product(found[weight], tensors[f"{module}.lora_B.weight"], tensors[name], factor)
    return found


Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)]


def held(folder: Path) -> Weights:
    """Every tensor of the safetensors files below a folder."""
    return {name: array for file in sorted(folder.rglob("*.safetensors")) for name, array in load_file(file).items()}


def merged(source: Path, adapter: Path, target: Path, **more: Any) -> Weights:
    """Merge a model with an adapter; what the result holds."""
    ms_ckpt_ext.merge(source, target, adapter=adapter, naming="huggingface", sync=False, digests=False, **more)
    return held(target)
