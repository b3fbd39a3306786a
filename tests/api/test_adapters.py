"""LoRA adapters in a folder of their own, added at export, merge and re-cut: the right bytes."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.errors import (
    LayoutMismatchError,
)
from ms_ckpt_ext.rules import AddProduct, Dequantize
from tests.support.adapters import Q, Weights, held, merged, products, save_adapter, with_adapter, with_product
from tests.support.checkpoints import cut, read_file
from tests.support.families import ARCHITECTURES, LAYERS, hub_folder, told, training
from tests.support.quantised import Tensor, dequantised, random_items, rounded, save, values

DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)]


MODULES: dict[str, list[str]] = {
    "llama": [*Q, *DOWN],
    "qwen2": ["model.layers.2.self_attn.v_proj", "lm_head"],
    "qwen3": [*Q, "model.layers.1.mlp.gate_proj"],
    "qwen3-moe": ["model.layers.1.mlp.experts.2.up_proj", "model.layers.3.mlp.gate", "model.layers.0.self_attn.o_proj"],
    "deepseek-v3": ["model.layers.1.self_attn.kv_b_proj", "model.layers.2.mlp.experts.0.down_proj"],
}


@pytest.mark.parametrize("case", ["dp2_tp2_pp2_zero", "dp4_tp2_zero2"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_export_adds_it(family: str, case: str, golden: Path, tmp_path: Path) -> None:
    """Of every family, from shards of a training; what has no product stays as it is, to the bit."""
    weights = hub_folder(tmp_path / "hub", family)
    tensors = products(weights, MODULES[family], dtype=np.float16)
    adapter = save_adapter(tmp_path / "lora", tensors, target_modules="a pattern")
    rules = ms_ckpt_ext.load_rules(family, tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "hub", tmp_path / "trained", rules=rules, digests=False, sync=False)
    parameters = held(tmp_path / "trained")
    strategy = training(golden / case, {name: array.shape for name, array in parameters.items()}, states=False)
    cut(strategy, parameters, tmp_path / "shards")
    more = {"config": tmp_path / "hub", "strategy": strategy, "sync": False}
    ms_ckpt_ext.export(tmp_path / "shards", tmp_path / "out", adapter=adapter, **more)
    assert told(held(tmp_path / "out")) == told(with_adapter(weights, tensors, 5 / 3))


def test_export_rounds_once(tmp_path: Path) -> None:
    """The sum is rounded to the chosen dtype, and not to that of the training before."""
    weights = hub_folder(tmp_path / "hub", "qwen3")
    adapter = save_adapter(tmp_path / "lora", products(weights, Q), target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    rules = ms_ckpt_ext.load_rules("qwen3", tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "hub", tmp_path / "trained", rules=rules, digests=False, sync=False)
    more = {"config": tmp_path / "hub", "adapter": adapter, "sync": False}
    ms_ckpt_ext.export(tmp_path / "trained", tmp_path / "out", dtype="float32", **more)
    wide = {name: array.astype(np.float32) for name, array in weights.items()}
    assert told(held(tmp_path / "out")) == told(with_adapter(wide, tensors, 5 / 3))


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe"])
def test_merge_and_reshard_add_it_before_the_rules(family: str, golden: Path, tmp_path: Path) -> None:
    weights = hub_folder(tmp_path / "hub", family)
    tensors = products(weights, MODULES[family])
    adapter = save_adapter(tmp_path / "lora", tensors, target_modules="a pattern")
    truth = with_adapter(weights, tensors, 5 / 3)
    assert told(merged(tmp_path / "hub", adapter, tmp_path / "merged")) == told(truth)
    rules = ms_ckpt_ext.load_rules(family, tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "merged", tmp_path / "trained", rules=rules, digests=False, sync=False)
    parameters = held(tmp_path / "trained")
    strategy = training(golden / "dp2_tp2_pp2_zero", {n: a.shape for n, a in parameters.items()}, states=False)
    cut(strategy, parameters, tmp_path / "expected")
    made = {"rules": rules, "adapter": adapter, "to_strategy": strategy, "digests": False, "sync": False}
    ms_ckpt_ext.reshard(tmp_path / "hub", tmp_path / "shards", **made)
    for file in sorted((tmp_path / "expected").rglob("*.safetensors")):
        (found,) = (tmp_path / "shards" / file.parent.name).glob("*.safetensors")
        assert read_file(found) == read_file(file)
    assert ms_ckpt_ext.verify(
        tmp_path / "hub", tmp_path / "shards", rules=rules, adapter=adapter, strategy_b=strategy
    ).ok
    assert not ms_ckpt_ext.verify(tmp_path / "hub", tmp_path / "shards", rules=rules, strategy_b=strategy).ok
    saved = {
        "format": "safetensors",
        "unified_safetensors_dir": tmp_path / "hub",
        "dst_safetensors_dir": tmp_path / "dst",
    }
    ms_ckpt_ext.load_distributed_checkpoint(None, predict_strategy=strategy, rules=rules, adapter=adapter, **saved)
    for file in sorted((tmp_path / "expected").rglob("*.safetensors")):
        (found,) = (tmp_path / "dst" / file.parent.name).glob("*.safetensors")
        assert read_file(found) == read_file(file)


@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("mindpet_delta_lora_a", "mindpet_delta_lora_b")])
def test_a_training_of_products_by_its_own_names(ends: tuple[str, str], golden: Path, tmp_path: Path) -> None:
    """What MindFormers trains beside fused weights: added by a merge, whose result is exported."""
    hub_folder(tmp_path / "hub", "qwen3")
    rules = ms_ckpt_ext.load_rules("qwen3", tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "hub", tmp_path / "plain", rules=rules, digests=False, sync=False)
    parameters = held(tmp_path / "plain")
    fused = [name.rpartition(".")[0] for name in parameters if "linear_qkv" in name]
    trained = {**parameters}
    truth = dict(parameters)
    for name, tensor in products(parameters, fused).items():
        module, half = name[len("base_model.model.") :].split(".lora_")
        trained[f"{module}.{ends[half.startswith('B')]}"] = tensor
        trained[f"adam_m.{module}.{ends[half.startswith('B')]}"] = tensor * 2
    for module in fused:
        a, b = (trained[f"{module}.{end}"] for end in ends)
        truth[f"{module}.weight"] = with_product(parameters[f"{module}.weight"], b, a, 16 / 8)
    strategy = training(golden / "dp2_tp2_pp2_zero", {n: a.shape for n, a in trained.items()}, states=False)
    cut(strategy, trained, tmp_path / "shards")
    names = ["decoder.{*}.weight", *(f"decoder.{{*}}.{end}" for end in ends[::-1])]
    added = AddProduct(names, "decoder.{*}.weight", factor=16 / 8)
    more = {"digests": False, "sync": False}
    job = {"strategy": strategy, "rules": [added], "exclude": "adam_*", **more}
    ms_ckpt_ext.merge(tmp_path / "shards", tmp_path / "merged", **job)
    assert told(held(tmp_path / "merged")) == told(truth)
    ms_ckpt_ext.export(tmp_path / "merged", tmp_path / "out", config=tmp_path / "hub", **more)
    ms_ckpt_ext.merge(tmp_path / "out", tmp_path / "again", rules=rules, **more)
    assert told(held(tmp_path / "again")) == told(truth)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"use_rslora": True}, 5 / sqrt(3)),
        ({"lora_alpha": 0.5}, 0.5 / 3),
        ({"lora_alpha": -2, "r": None}, -2 / 3),
        ({"alpha_pattern": {"self_attn.q_proj": 7}}, 7 / 3),
        ({"alpha_pattern": {"elf_attn.q_proj": 7, "k_proj": 8}}, 5 / 3),
        ({"rank_pattern": {"q_proj": 3}, "r": 8}, 5 / 3),
    ],
    ids=str,
)
def test_the_factor(config: dict[str, Any], factor: float, tmp_path: Path) -> None:
    weights = hub_folder(tmp_path / "hub", "qwen3")
    tensors = products(weights, Q)
    adapter = save_adapter(tmp_path / "lora", tensors, **{"target_modules": ["q_proj"], **config})
    assert told(merged(tmp_path / "hub", adapter, tmp_path / "out")) == told(with_adapter(weights, tensors, factor))


def test_factors_by_module(tmp_path: Path) -> None:
    """The first pattern that fits counts: ends of names, or with ^ whole names."""
    weights = hub_folder(tmp_path / "hub", "qwen3")
    whole = {name: products(weights, [name], r=2 if "layers.1." in name else 3) for name in Q}
    patterns = {"^model.layers.0.self_attn.q_proj": 1, "layers.1.self_attn.q_proj": 2, "q_proj": 3, "layers.2": 4}
    tensors = {name: tensor for each in whole.values() for name, tensor in each.items()}
    ranks = {"layers.1.self_attn.q_proj": 2}
    named = {"alpha_pattern": patterns, "rank_pattern": ranks, "target_modules": ["q_proj"]}
    adapter = save_adapter(tmp_path / "lora", tensors, **named)
    truth: Weights = dict(weights)
    for name, factor in zip(Q, (1 / 3, 2 / 2, 3 / 3, 3 / 3)):
        truth = with_adapter(truth, whole[name], factor)
    assert told(merged(tmp_path / "hub", adapter, tmp_path / "out")) == told(truth)


def test_embeddings_and_weights_stored_transposed(tmp_path: Path) -> None:
    """An embedding is (words, width), and its A (r, words), B (width, r); Conv1D has weights of shape (in, out)."""
    rng = np.random.default_rng(3)
    weights = {
        "wte.weight": rng.standard_normal((9, 6)),
        "c.weight": rng.standard_normal((6, 8)),
        "ln.weight": rng.random(6),
    }
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    (tmp_path / "hub").mkdir()
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    halves = {
        "wte.lora_embedding_A": (2, 9),
        "wte.lora_embedding_B": (6, 2),
        "c.lora_A.weight": (2, 6),
        "c.lora_B.weight": (8, 2),
    }
    tensors = {f"base_model.model.{n}": rng.standard_normal(s).astype(np.float32) for n, s in halves.items()}
    a, b, a_in, b_out = tensors.values()
    truth = {
        "wte.weight": with_product(weights["wte.weight"], a.T, b.T, 2.5),
        "c.weight": with_product(weights["c.weight"], a_in.T, b_out.T, 2.5),
        "ln.weight": weights["ln.weight"],
    }
    copy = {"base_model.model.wte.base_layer.weight": weights["wte.weight"]}  # as PEFT saves it by default
    for more in ({}, copy):
        named = {"fan_in_fan_out": True, "r": 2, "target_modules": ["wte", "c"]}
        adapter = save_adapter(tmp_path / "lora", {**tensors, **more}, **named)
        assert told(merged(tmp_path / "hub", adapter, tmp_path / f"out{len(more)}")) == told(truth)
    save_adapter(tmp_path / "lora", {**tensors, **{name: array + 1 for name, array in copy.items()}}, **named)
    with pytest.raises(LayoutMismatchError, match="base_layer.weight' .* differs from the model's 'wte.weight'"):
        merged(tmp_path / "hub", adapter, tmp_path / "other")


def test_a_quantised_model_becomes_floats_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    quantised = {
        "l.0.q_proj.weight": Tensor("F8_E4M3", random_items(rng, "F8_E4M3", (8, 6)) & 0x77),
        "l.0.q_proj.weight_scale_inv": Tensor("F32", rng.random((2, 2)).astype(np.float32)),
    }
    save(quantised, tmp_path / "hub" / "model.safetensors")
    shapes = {"l.0.q_proj.weight": np.empty((8, 6))}
    tensors = products(shapes, ["l.0.q_proj"])
    adapter = save_adapter(tmp_path / "lora", tensors, target_modules=["q_proj"])
    floats = Dequantize(["{*}.weight", "{*}.weight_scale_inv"], "{*}.weight", block=(4, 4), dtype="BF16")
    ms_ckpt_ext.merge(tmp_path / "hub", tmp_path / "out", rules=[floats], adapter=adapter, digests=False, sync=False)
    (found,) = (tensor for file in (tmp_path / "out").glob("*.safetensors") for tensor in read_file(file).values())
    elements, scales = quantised.values()
    w = values(Tensor("BF16", dequantised(elements, "F8_E4M3", scales, "F32", (4, 4), "BF16")), "BF16")
    b, a = tensors["base_model.model.l.0.q_proj.lora_B.weight"], tensors["base_model.model.l.0.q_proj.lora_A.weight"]
    assert found.dtype == "BF16" and found.data == rounded(with_product(w, b, a, 5 / 3), "BF16").tobytes()


def test_another_alpha_is_another_result(tmp_path: Path) -> None:
    """A rerun keeps what is there; a configuration that was changed since begins anew."""
    weights = hub_folder(tmp_path / "hub", "qwen3")
    tensors = products(weights, Q)
    for alpha in (5, 6):
        adapter = save_adapter(tmp_path / "lora", tensors, target_modules=["q_proj"], lora_alpha=alpha)
        found = merged(tmp_path / "hub", adapter, tmp_path / "out")
        assert told(found) == told(with_adapter(weights, tensors, alpha / 3))
