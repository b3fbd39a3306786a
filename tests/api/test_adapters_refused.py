"""LoRA adapters that cannot be added to a model: refused by name, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import (
    CheckpointError,
    CoverageError,
    DiscoveryError,
    FormatError,
    LayoutMismatchError,
    UsageError,
)
from tests.support.adapters import Q, Weights, held, merged, products, save_adapter
from tests.support.checkpoints import cut, strategy_of
from tests.support.families import hub_folder

FIRST = f"base_model.model.{Q[0]}"
Change = Callable[[Path, Weights], object]


def _said(**config: Any) -> Change:
    return lambda folder, tensors: save_adapter(folder, tensors, **config)


def _without(key: str) -> Change:
    return lambda folder, tensors: save_adapter(folder, tensors, without=[key])


def _changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    whole = f"base_model.model.{name}"
    return lambda folder, tensors: save_adapter(folder, {**tensors, whole: change(tensors[whole])})


def _renamed(old: str, new: str) -> Change:
    return lambda folder, tensors: save_adapter(folder, {n.replace(old, new): array for n, array in tensors.items()})


def _more(name: str) -> Change:
    return lambda folder, tensors: save_adapter(folder, {**tensors, name: np.ones(4, np.float32)})


WRONG: dict[str, tuple[Change, type[CheckpointError], str]] = {
    "no alpha": (_without("lora_alpha"), FormatError, "adapter_config.json' has no lora_alpha"),
    "an alpha of null": (_said(lora_alpha=None), FormatError, "lora_alpha None .* should be a number"),
    "an alpha of text": (_said(lora_alpha="5"), FormatError, "lora_alpha '5' .* should be a number"),
    "an alpha beyond floats": (_said(lora_alpha=10**400), FormatError, "should be a number"),
    "another r": (
        _said(r=4),
        LayoutMismatchError,
        r"\(m, r\) with r 4, by .*adapter_config.json",
    ),
    "an r of text": (_said(r="3"), FormatError, "says r '3' .* whole number"),
    "DoRA": (_said(use_dora=True), UsageError, "use_dora True: the adapter has DoRA"),
    "an unknown variant": (_said(use_tomorrows_lora=True), UsageError, "use_tomorrows_lora True: .* variant"),
    "biases": (_said(bias="all"), UsageError, "bias 'all': the adapter has trained biases"),
    "biases of products": (_said(lora_bias=True), UsageError, "lora_bias True"),
    "whole modules": (_said(modules_to_save=["lm_head"]), UsageError, "modules_to_save .*'lm_head'.* whole modules"),
    "tokens": (_said(trainable_token_indices=[1]), UsageError, "trainable_token_indices"),
    "layers again": (_said(layer_replication=[[0, 1]]), UsageError, "layer_replication"),
    "another start": (_said(init_lora_weights="pissa"), UsageError, "init_lora_weights 'pissa': .* changed before"),
    "another type": (_said(peft_type="IA3"), UsageError, "type 'IA3', and only LORA"),
    "an expression": (_said(alpha_pattern={"layers.(0|1)": 4}), UsageError, "regular expression"),
    "patterns as a list": (_said(rank_pattern=["q_proj"]), FormatError, "rank_pattern .* should be an object"),
    "a flag of text": (_said(use_rslora="yes"), FormatError, "use_rslora 'yes', which should be true or false"),
    "another shape": (
        _changed(f"{Q[0]}.lora_B.weight", lambda b: b[:-1]),
        LayoutMismatchError,
        "adapter is of this model",
    ),
    "halves of two ranks": (
        _changed(f"{Q[0]}.lora_A.weight", lambda a: a[:-1]),
        LayoutMismatchError,
        r"A of shape \[2, 32\]",
    ),
    "a convolution": (
        _changed(f"{Q[0]}.lora_A.weight", lambda a: a[..., None, None]),
        LayoutMismatchError,
        "A of shape",
    ),
    "half of a product": (
        lambda at, held: save_adapter(at, {n: a for n, a in held.items() if n != f"{FIRST}.lora_B.weight"}),
        CoverageError,
        "has A of 'model.layers.0.self_attn.q_proj', and not the other half",
    ),
    "modules of another model": (_renamed("self_attn", "attention"), CoverageError, "changes 4 weights.*attention"),
    "a wrapped base": (
        _renamed("base_model.model.model", "base_model.model"),
        CoverageError,
        "the model does not have",
    ),
    "the names of training": (
        _renamed("lora_A", "lora_A.default"),
        UsageError,
        "lora_A.default.weight', which is none of",
    ),
    "a magnitude": (
        _more(f"{FIRST}.lora_magnitude_vector"),
        UsageError,
        "magnitude_vector', which is none",
    ),
    "a bias": (_more(f"{FIRST}.bias"), UsageError, "q_proj.bias', which is none"),
    "a whole weight": (
        _more(f"{FIRST}.base_layer.weight"),
        UsageError,
        "and nothing to add to it",
    ),
    "braces": (_more("base_model.model.{n}.lora_A.weight"), UsageError, "which is none of"),
    "nothing": (lambda at, held: save_adapter(at, {}), FormatError, "holds no tensors"),
    "a target without products": (
        _said(target_modules=["q_proj", "k_proj"]),
        CoverageError,
        "trained for 'k_proj', .* has nothing for it",
    ),
    "no configuration": (
        lambda at, held: (at / "adapter_config.json").unlink(),
        DiscoveryError,
        "there is no '.*adapter_config.json'",
    ),
    "a list for a configuration": (
        lambda at, held: (at / "adapter_config.json").write_text("[]"),
        FormatError,
        "no JSON object",
    ),
    "torch's format": (
        lambda at, held: (at / "adapter_model.safetensors").rename(at / "adapter_model.bin"),
        DiscoveryError,
        "adapter_model.safetensors, as PEFT's save_pretrained writes it",
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    hub_folder(root / "hub", "qwen3")
    ms_ckpt_ext.merge(root / "hub", root / "trained", rules=ms_ckpt_ext.load_rules(config=root / "hub"), sync=False)
    return root


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_by_name(what: str, hub: Path, tmp_path: Path) -> None:
    """At export as well as at a merge; nothing is written."""
    change, kind, message = WRONG[what]
    tensors = products(held(hub / "hub"), Q)
    change(save_adapter(tmp_path / "lora", tensors, target_modules=["q_proj"]), tensors)
    for job in (
        lambda: merged(hub / "hub", tmp_path / "lora", tmp_path / "out"),
        lambda: ms_ckpt_ext.export(hub / "trained", tmp_path / "out", config=hub / "hub", adapter=tmp_path / "lora"),
    ):
        with pytest.raises(kind, match=message):
            job()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_one_of_two_tied_tensors_is_refused(module: str, golden: Path, tmp_path: Path) -> None:
    weights = hub_folder(tmp_path / "hub", "qwen3", tie_word_embeddings=True)
    shaped = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    adapter = save_adapter(tmp_path / "lora", products(shaped, [module]), target_modules=[module])
    with pytest.raises(UsageError, match=f"'{module}.weight', which is one tensor with another.*tie_word_embeddings"):
        merged(tmp_path / "hub", adapter, tmp_path / "out")
    rules = ms_ckpt_ext.load_rules("qwen3", tmp_path / "hub")
    ms_ckpt_ext.merge(tmp_path / "hub", tmp_path / "trained", rules=rules, digests=False, sync=False)
    with pytest.raises(UsageError, match="which is one tensor with another"):
        ms_ckpt_ext.export(tmp_path / "trained", tmp_path / "out", config=tmp_path / "hub", adapter=adapter)


def test_a_load_of_a_trainings_files_is_refused(hub: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "lora", products(held(hub / "hub"), Q), target_modules=["q_proj"])
    strategy = strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt")
    cut(strategy, {"w": np.arange(8, dtype=np.float32).reshape(4, 2)}, tmp_path / "shards")
    with pytest.raises(UsageError, match="the files of a training: give the adapter when they are exported"):
        ms_ckpt_ext.load_distributed_checkpoint(
            None,
            train_strategy_filename=tmp_path / "s.ckpt",
            format="safetensors",
            unified_safetensors_dir=tmp_path / "shards",
            dst_safetensors_dir=tmp_path / "out",
            adapter=adapter,
        )
    with pytest.raises(CoverageError, match="changes 4 weights that the model does not have"):
        merged(hub / "trained", adapter, tmp_path / "out")
