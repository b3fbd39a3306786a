"""A LoRA adapter added to a model while that is loaded, in every way of loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.errors import CoverageError, UsageError
from tests.support.adapters import products, save_adapter, with_adapter
from tests.support.families import LAYERS, hub_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in ("self_attn.q_proj", "mlp.up_proj")]
WAYS: list[dict[str, Any]] = [{"mode": "direct"}, {"mode": "cooperative"}, {"return_param_dict": True}]


def loaded(root: Path, truth: dict[str, np.ndarray], **more: Any) -> dict[str, bytes]:
    cell = ms.nn.Cell()
    held = [ms.Parameter(ms.Tensor(np.zeros_like(array)), name=name) for name, array in truth.items()]
    cell.held = ms.ParameterTuple(held)
    source = {"format": "safetensors", "unified_safetensors_dir": root / "hub", "adapter": root / "lora"}
    rules = ms_ckpt_ext.load_rules("qwen3", root / "hub")
    found = ms_ckpt_ext.load_distributed_checkpoint(cell, **source, rules=rules, **more)
    got = found if more.get("return_param_dict") else {p.name: p for p in cell.get_parameters()}
    return {name: got[name].asnumpy().tobytes() for name in truth}


@pytest.mark.parametrize("way", WAYS, ids=["direct", "cooperative", "a dictionary"])
def test_an_adapter_is_added(way: dict[str, Any], tmp_path: Path) -> None:
    weights = hub_folder(tmp_path / "hub", "qwen3")
    tensors = products(weights, MODULES)
    save_adapter(tmp_path / "lora", tensors, target_modules=["q_proj", "up_proj"])
    (tmp_path / "plain").mkdir()
    save_file(with_adapter(weights, tensors, 5 / 3), tmp_path / "plain" / "model.safetensors")
    rules = ms_ckpt_ext.load_rules("qwen3", tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "plain", tmp_path / "truth", rules=rules, digests=False, sync=False)
    truth = {n: a for file in (tmp_path / "truth").glob("*.safetensors") for n, a in load_file(file).items()}
    assert loaded(tmp_path, truth, **way) == {name: array.tobytes() for name, array in truth.items()}
    save_adapter(tmp_path / "lora", {name.replace("self_attn", "attn"): tensor for name, tensor in tensors.items()})
    with pytest.raises(CoverageError, match=r"'model.layers.0.attn.q_proj.weight' is made of 3 sources"):
        loaded(tmp_path, truth, **way)
    save_adapter(tmp_path / "lora", tensors, use_dora=True)
    with pytest.raises(UsageError, match="use_dora True"):
        loaded(tmp_path, truth, **way)
