"""What is exported is what transformers reads: every family, from slices of every kind, to equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.strategy import Strategy
from tests.support.checkpoints import read_file
from tests.support.families import ARCHITECTURES, config_of, shapes_of, training
from tests.support.torch_python import needs_torch, transformers

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ARCHITECTURES},
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True}),
    "mixed": ("qwen3-moe", {"mlp_only_layers": [1]}),
    "without-query-rank": ("deepseek-v3", {"q_lora_rank": None}),
}
"""Folder -> family, and what its config.json says besides."""


def shards(hub: Path, family: str, golden: Path, root: Path) -> Strategy:
    """A training of the model, cut as the golden case; bfloat16, which numpy lacks, moves as it is."""
    ms_ckpt_ext.merge(hub, root / "whole", rules=ms_ckpt_ext.load_rules(family, hub), digests=False)
    held = {n: t for file in (root / "whole").glob("*.safetensors") for n, t in read_file(file).items()}
    strategy = training(golden, {name: tensor.shape for name, tensor in held.items()}, states=False)
    ms_ckpt_ext.reshard(root / "whole", root / "shards", to_strategy=strategy, digests=False)
    return strategy


@needs_torch
def test_transformers_loads_what_was_exported(golden: Path, tmp_path: Path) -> None:
    for name, (family, more) in MODELS.items():
        (tmp_path / name).mkdir()
        config = config_of(family, num_nextn_predict_layers=0, **more)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    made = transformers("make", tmp_path)
    assert made.keys() == MODELS.keys()
    for name, (family, more) in MODELS.items():
        hub = tmp_path / name / "hub"
        stored = {n for file in hub.glob("*.safetensors") for n in read_file(file)}
        shapes = shapes_of(family, config_of(family, num_nextn_predict_layers=0, **more))
        if name not in ("biased", "mixed"):  # the small models of the other tests
            assert {n: tuple(shape) for n, shape in made[name].items() if n in stored} == shapes
        strategy = shards(hub, family, golden / "dp2_tp2_pp2_zero", tmp_path / name)
        ms_ckpt_ext.export(tmp_path / name / "shards", tmp_path / name / "out", config=hub, strategy=strategy)
        before, after = (
            {n: tensor for file in folder.glob("*.safetensors") for n, tensor in read_file(file).items()}
            for folder in (hub, tmp_path / name / "out")
        )
        assert before == after
    found = transformers("compare", tmp_path)
    assert {name: told["equal"] for name, told in found.items()} == dict.fromkeys(MODELS, True)
    assert all(told["spread"] > 0.01 for told in found.values()), found
