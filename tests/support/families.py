"""Small models of every family as Hugging Face's folders hold them, and trainings of them as golden cases cut them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import load_strategy

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
}
HIDDEN, INNER, EXPERT_INNER, LAYERS, VOCABULARY, EXPERTS = 32, 48, 16, 4, 64, 4
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}


def config_of(family: str, **more: Any) -> dict[str, Any]:
    """What `config.json` of the small model says."""
    found: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family.replace("-", "_"),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if family == "qwen3-moe":
        found.update(num_experts=EXPERTS, moe_intermediate_size=EXPERT_INNER, num_experts_per_tok=2)
    if family == "deepseek-v3":
        found.update(_MLA, n_routed_experts=EXPERTS, moe_intermediate_size=EXPERT_INNER, first_k_dense_replace=1)
        found.update(n_shared_experts=1, num_nextn_predict_layers=1, num_key_value_heads=8, num_experts_per_tok=2)
        found.update(n_group=1, topk_group=1, head_dim=_MLA["qk_rope_head_dim"])
    return {**found, **more}


def shapes_of(family: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that transformers' model has, and of DeepSeek's layer beyond it."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    extra = config.get("num_nextn_predict_layers") or 0
    for layer in range(LAYERS + extra):
        here = f"model.layers.{layer}."
        found.update({f"{here}{name}": shape for name, shape in _layer(family, config, layer).items()})
    if extra:
        last = f"model.layers.{LAYERS}."
        found.update({f"{last}{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "shared_head.norm")})
        found[f"{last}eh_proj.weight"] = (HIDDEN, 2 * HIDDEN)
        found.update({f"{last}{n}.weight": (VOCABULARY, HIDDEN) for n in ("embed_tokens", "shared_head.head")})
    found["model.norm.weight"] = (HIDDEN,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return found


def _layer(family: str, config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    if family == "deepseek-v3":
        found.update(_latent(config))
    else:
        width = config["head_dim"]
        rows = {"q": config["num_attention_heads"] * width, "k": config["num_key_value_heads"] * width}
        for name, count in {**rows, "v": rows["k"]}.items():
            found[f"self_attn.{name}_proj.weight"] = (count, HIDDEN)
            if family == "qwen2":
                found[f"self_attn.{name}_proj.bias"] = (count,)
        found["self_attn.o_proj.weight"] = (HIDDEN, rows["q"])
        if family.startswith("qwen3"):
            found.update({f"self_attn.{name}_norm.weight": (width,) for name in "qk"})
    if family == "qwen3-moe" or (family == "deepseek-v3" and layer >= config["first_k_dense_replace"]):
        found["mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            found.update(_gated(f"mlp.experts.{expert}.", EXPERT_INNER))
        if family == "deepseek-v3":
            found["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
            found.update(_gated("mlp.shared_experts.", EXPERT_INNER))
    else:
        found.update(_gated("mlp.", INNER))
    return found


def _gated(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (inner, HIDDEN), "up": (inner, HIDDEN), "down": (HIDDEN, inner)}
    return {f"{prefix}{name}_proj.weight": shape for name, shape in shapes.items()}


def _latent(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    heads, rank, compressed = config["num_attention_heads"], config["q_lora_rank"], config["kv_lora_rank"]
    keys = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    found: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (compressed + config["qk_rope_head_dim"], HIDDEN),
        "kv_a_layernorm.weight": (compressed,),
        "kv_b_proj.weight": (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), compressed),
        "o_proj.weight": (HIDDEN, heads * config["v_head_dim"]),
    }
    if rank is None:
        found["q_proj.weight"] = (heads * keys, HIDDEN)
    else:
        found.update({"q_a_proj.weight": (rank, HIDDEN), "q_a_layernorm.weight": (rank,)})
        found["q_b_proj.weight"] = (heads * keys, rank)
    return {f"self_attn.{name}": shape for name, shape in found.items()}


def weights_of(family: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Contents by name: half precision, but for what transformers keeps in full. Second copies are copies."""
    found = {}
    for name, shape in shapes_of(family, config).items():
        rng = np.random.default_rng(sum(map(ord, name)) * 31 + len(name))
        full = name.endswith(("e_score_correction_bias", "norm.weight"))
        found[name] = rng.standard_normal(shape).astype(np.float32 if full else np.float16)
    for name, first in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        second = f"model.layers.{LAYERS}.{name}.weight"
        if second in found:
            found[second] = found[f"{first}.weight"]
    return found


def hub_folder(root: Path, family: str, **more: Any) -> dict[str, np.ndarray]:
    """Write the small model as a folder of the hub; gives its weights."""
    config = config_of(family, **more)
    weights = weights_of(family, config)
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config, indent=2))
    (root / "tokenizer.json").write_text('{"version": "1.0"}')
    (root / "tokenizer_config.json").write_text("{}")
    names = sorted(weights)
    halves = names[::2], names[1::2]
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for file, half in zip(files, halves):
        save_file({name: weights[name] for name in half}, root / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, half in zip(files, halves) for name in half}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


def training(golden: Path, shapes: Mapping[str, tuple[int, ...]], states: bool = True) -> Strategy:
    """How the golden case would cut these parameters and their optimizer states."""
    like = load_strategy(golden / "strategy.ckpt")
    rows, columns = (like.layout(f"layers.0.{name}.weight", 0) for name in ("wqkv", "w2"))
    stages = like.world // like.devices_per_stage
    items = []
    for name, shape in shapes.items():
        layout = _cut(rows if "linear_proj" not in name and "fc2" not in name else columns, shape)
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if name.startswith("embedding") or ".tok_embeddings." in name:
            stage = 0
        elif layer is None or name.startswith("mtp"):
            stage = stages - 1
        else:
            stage = layer * stages // LAYERS
        for prefix in ("", "adam_m.", "adam_v.") if states else ("",):
            items.append(LayoutItem(prefix + name, stage, layout))
    return Strategy.from_items(items, str(golden))


def _cut(like: Layout, shape: tuple[int, ...]) -> Layout:
    """The golden layout where it divides the shape; else without its optimizer shard, or without cuts."""
    split = tuple(like.tensor_map[axis] if axis < len(like.tensor_map) else () for axis in range(len(shape)))
    whole: tuple[tuple[int, ...], ...] = ((),) * len(shape)
    for tensor_map in (split, whole):
        for step, size in ((like.opt_shard_step, like.opt_shard_size), (0, 0)):
            made = Layout(like.dev_matrix, tensor_map, step, size)
            if all(extent % parts == 0 for extent, parts in zip(shape, made.parts)):
                return made
    raise AssertionError(shape)


def told(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of each, to be compared."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()}
