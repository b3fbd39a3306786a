"""`export` of what is no training of the model: refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.errors import ArgumentTypeError, CoverageError, FormatError, LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import Rename, invert
from tests.support.exports import Trained
from tests.support.families import LAYERS, told


def test_what_no_rule_names_is_refused_unless_it_is_left_out(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    made.parameters["decoder.layers.0.adapter.weight"] = np.ones((2, 4), np.float16)
    made.parameters["decoder.layers.9.input_layernorm.weight"] = np.ones(4, np.float16)
    with pytest.raises(UsageError, match="no rule names 2 of .*layers.0.adapter.*layers.9.* left out by exclude"):
        made.export()
    assert not (tmp_path / "out").exists()
    made.export(exclude=["*.adapter.*", "decoder.layers.9.*"])
    assert told(made.out()) == told(made.weights)


@pytest.mark.parametrize(
    "name", ["decoder.layers.2.self_attention.linear_qkv.weight", "decoder.final_layernorm.weight"]
)
def test_a_parameter_that_is_not_there(name: str, tmp_path: Path) -> None:
    made = Trained(tmp_path)
    del made.parameters[name]
    with pytest.raises(CoverageError, match=f"lacks 1 of the model's parameters: '{name}'"):
        made.export()
    assert not (tmp_path / "out").exists()


def test_a_layer_without_a_mixture_nor_a_plain_one(tmp_path: Path) -> None:
    made = Trained(tmp_path, "qwen3-moe")
    made.parameters = {name: array for name, array in made.parameters.items() if "layers.3.mlp" not in name}
    with pytest.raises(CoverageError, match="lacks 3 of .*'decoder.layers.3.mlp"):
        made.export()


def test_parameters_of_a_training_that_are_no_weights(tmp_path: Path) -> None:
    made = Trained(tmp_path, "deepseek-v3")
    for layer in range(1, LAYERS):
        made.parameters[f"decoder.layers.{layer}.mlp.router.expert_load"] = np.ones(4, np.float32)
    made.export()
    assert told(made.out()) == told(made.weights)


def test_rules_in_the_wrong_direction_or_of_another_model(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    with pytest.raises(UsageError, match="export takes a training's checkpoint"):
        made.export(rules=invert(ms_ckpt_ext.load_rules("qwen3", made.hub)))
    with pytest.raises(UsageError, match="no rule names a parameter of the checkpoint, which holds .*norm"):
        made.export(rules=[Rename("a", "b")])
    with pytest.raises(UsageError, match="no rule names .*k_layernorm"):
        made.export(rules="qwen2")
    for wrong in (5, [5], {"a": "b"}):
        with pytest.raises(ArgumentTypeError, match="rules"):
            made.export(rules=wrong)


def test_a_model_that_no_family_has(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    config = json.loads((made.hub / "config.json").read_text())
    (made.hub / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    with pytest.raises(UsageError, match=r"OtherForCausalLM.* Give rules: one of deepseek-v3, llama"):
        made.export(rules=None)
    made.export(rules="qwen3")
    (made.hub / "config.json").unlink()
    with pytest.raises(UsageError, match=r"there is no .*config.json"):
        made.export()
    (made.hub / "config.json").write_text("[1]")
    with pytest.raises(FormatError, match="no JSON object"):
        made.export()


def test_a_configuration_of_others_in_the_target(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_bytes((made.hub / "config.json").read_bytes())
    (tmp_path / "out/tokenizer.json").write_text("by hand")
    with pytest.raises(UsageError, match="tokenizer.json' is not of an earlier export"):
        made.export()
    assert (tmp_path / "out/tokenizer.json").read_text() == "by hand" and len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "out/tokenizer.json").unlink()
    made.export()
    assert told(made.out()) == told(made.weights)


@pytest.mark.parametrize(
    ("family", "changed", "told"),
    [
        ("qwen3", {"num_key_value_heads": 2, "num_attention_heads": 4}, r"q_proj.weight' would .* \[32, 32\]"),
        ("qwen2", {"num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": None}, "q_proj"),
        ("llama", {"vocab_size": 60}, r"'.*' would have shape \[64, 32\], and by config.json .* Crop"),
        ("qwen3-moe", {"num_experts": 2}, "mlp.gate.weight"),
        ("deepseek-v3", {"kv_lora_rank": 8, "q_lora_rank": 24}, "rows cannot be shared out|would have shape"),
    ],
)
def test_the_configuration_of_another_model(family: str, changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    """Numbers that divide as well would mix weights up."""
    made = Trained(tmp_path, family)
    config = {**json.loads((made.hub / "config.json").read_text()), **changed}
    (made.hub / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutMismatchError, match=told):
        made.export()
    assert not (tmp_path / "out").exists()


def test_a_key_to_encrypt_with_is_not_used_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = Trained(tmp_path)
    monkeypatch.setenv("MS_CKPT_EXT_ENC_KEY", "0123456789ABCDEF")
    made.export()
    assert told(made.out()) == told(made.weights)
    assert "MS_CKPT_EXT_ENC_KEY is set, and what is exported is plain" in caplog.text
