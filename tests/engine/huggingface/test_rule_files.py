"""Rule files: those of the package against MindFormers' own converters, and what is said of wrong ones."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.engine.huggingface.families import document_of, family_for, family_names, read_family
from ms_ckpt_ext.engine.huggingface.rule_file import KINDS, family_of
from ms_ckpt_ext.engine.huggingface.sizes import Config
from ms_ckpt_ext.errors import CheckpointError, FormatError, StorageError, UsageError
from ms_ckpt_ext.rules import QKV, Concat, Crop, Dequantize, Experts, Interleave, Pad, Rename, Scale, invert
from tests.support.families import ARCHITECTURES, config_of, shapes_of

ROOT = Path(ms_ckpt_ext.__file__).parent.parent


def config(family: str, **more: Any) -> Config:
    return Config(config_of(family, **more), "config.json")


def test_every_family_is_there_and_linked_from_configs() -> None:
    assert family_names() == sorted(ARCHITECTURES)
    assert {path.stem for path in (ROOT / "configs/rules").glob("*.json")} == set(ARCHITECTURES)
    assert {name: family_for(config(name)) for name in ARCHITECTURES} == {name: name for name in ARCHITECTURES}


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("switch", [True, False])
def test_all_names_of_a_model_are_taken_in_every_arrangement(family: str, switch: bool) -> None:
    """Each of Hugging Face's tensors once, and the way back makes each once."""
    switches = [name for name, default in document_of(family)["defaults"].items() if isinstance(default, bool)]
    given = {name: switch for name in switches if name not in ("tie_word_embeddings", "legacy_names")}
    for tied in (False, True):
        found = read_family(family, config(family, tie_word_embeddings=tied), given)
        shapes = shapes_of(family, config_of(family, tie_word_embeddings=tied))
        taken: list[str] = []
        for rule in found.rules:
            for source in rule.sources:
                taken += [name for name in shapes if Pattern(source).match(name) is not None]
        assert sorted(taken) == sorted(shapes)
        assert len(invert(found.rules)) == len(found.rules)
        assert found.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


def converters(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(class, Hugging Face's names, MindFormers' names) of `weight_converters`, read without importing MindFormers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("ConvertOp"):
            told = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            names = [told[key] if isinstance(told[key], list) else [told[key]] for key in ("hf_names", "mf_names")]
            yield node.func.id, names[0], names[1]


@pytest.mark.skipif(importlib.util.find_spec("mindformers") is None, reason="MindFormers is not installed")
@pytest.mark.parametrize(("family", "model"), [("qwen3", "qwen3"), ("qwen3-moe", "qwen3_moe")])
def test_the_names_are_those_of_mindformers_converters(family: str, model: str) -> None:
    spec = importlib.util.find_spec("mindformers")
    assert spec is not None and spec.origin is not None
    theirs = {
        (_KIND_OF[kind], tuple(hf), tuple(mf))
        for kind, hf, mf in converters(Path(spec.origin).parent / f"models/{model}/utils.py")
    }
    ours = {
        (type(rule), tuple(map(_plain, rule.sources)), (_plain(rule.target),))
        for rule in read_family(family, config(family), {}).rules
    }
    assert theirs and theirs <= ours


_KIND_OF = {
    "RenameConvertOp": Rename,
    "QKVConvertOp": QKV,
    "ConcatConvertOp": Interleave,
    "ExpertsConvertOp": Experts,
}


def _plain(name: str) -> str:
    """A name with nothing in its placeholders."""
    return "".join(part if number % 2 == 0 else "{}" for number, part in enumerate(name.replace("}", "{").split("{")))


def test_sizes_are_resolved() -> None:
    given = {"q_lora_rank": None, "mla_qkv_concat": True}
    (fused,) = (r for r in read_family("deepseek-v3", config("deepseek-v3"), given).rules if "layers.4" in r.sources[0]
                and r.target.endswith("linear_qkv.weight"))  # fmt: skip
    assert fused == Concat(
        [f"model.layers.4.self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa")],
        "mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight",
        shares=(8 * 32, 24 + 16),
    )
    moe = read_family("qwen3-moe", config("qwen3-moe"), {"num_experts": 7}).rules
    assert {rule.experts for rule in moe if isinstance(rule, Experts)} == {7}
    without_groups = {name: value for name, value in config_of("llama").items() if name != "num_key_value_heads"}
    found = read_family("llama", Config(without_groups, "c"), {"qkv_concat": True}).rules
    assert {rule.groups for rule in found if isinstance(rule, QKV)} == {8}


def test_layers_are_bounded() -> None:
    """The layer of multi-token prediction is not one of the decoder's layers."""
    sources = [
        source for rule in read_family("deepseek-v3", config("deepseek-v3"), {}).rules for source in rule.sources
    ]
    assert "model.layers.{layer<4}.input_layernorm.weight" in sources
    assert "model.layers.{1<=layer<4}.mlp.gate.weight" in sources
    assert "model.layers.4.mlp.gate.weight" in sources


def test_rules_that_compute_may_be_in_a_file() -> None:
    entries = [
        {"rule": "Dequantize", "sources": ["{*}.w", "{*}.s"], "target": "{*}.w", "block": [1, 32], "dtype": "F16"},
        {"rule": "Scale", "sources": "q", "target": "q", "factor": 0.5},
        {"rule": "Pad", "sources": "e", "target": "e", "size": "vocab_size", "value": -1.5, "source_size": 5},
        {"rule": "Crop", "sources": "h", "target": "h", "size": 3, "axis": 1},
    ]
    found = family_of({"rules": entries}, "f", Config({"vocab_size": 8}, "config.json"), {}).rules
    assert list(found) == [
        Dequantize(["{*}.w", "{*}.s"], "{*}.w", block=(1, 32), dtype="F16"),
        Scale("q", "q", 0.5),
        Pad("e", "e", 8, value=-1.5, source_size=5),
        Crop("h", "h", 3, axis=1),
    ]


RENAME = {"rule": "Rename", "sources": "a", "target": "b"}
HEADS = {"rule": "QKV", "sources": ["q", "k", "v"], "target": "t", "groups": 2}


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ([], "an object with a list of 'rules' is expected, got \\[\\]"),
        ({}, "an object with a list of 'rules' is expected"),
        ({"rules": {}}, "'rules' must be a list of rules, got {}"),
        ({"rules": [], "rule": 1}, "has no key 'rule'; it may have title, architectures"),
        ({"rules": [], "tied": {"a": 1}}, "'tied' must be an object: name -> name"),
        ({"rules": [{**RENAME, "target": "{x<1000000}"}]}, "'target' speaks of '1000000', which is 1000000: more than"),
        ({"rules": [], "shapes": {"a": 1}}, "'shapes': 'a' must be a list of numbers"),
        ({"rules": [{**HEADS, "groups": "3 // 0"}]}, "'3 // 0', which divides by zero"),
        ({"rules": [], "leave": [1]}, "'leave' must be a list of names"),
        ({"rules": [RENAME, 5]}, "rule 2: an object whose 'rule' is one of QKV, Concat.*, got 5"),
        ({"rules": [{**RENAME, "rule": "Move"}]}, "rule 1: .* is one of QKV"),
        ({"rules": [{**RENAME, "sources": []}]}, "rule 1: 'sources' must be a name or a list of names, got \\[\\]"),
        ({"rules": [{**RENAME, "sources": [""]}]}, "rule 1: 'sources' must be a name"),
        ({"rules": [{"rule": "Rename", "sources": "a"}]}, "rule 1: 'target' must be a name, got None"),
        ({"rules": [{**RENAME, "axis": 0}]}, "rule 1: Rename has no 'axis'; it may have optional, rule, sources"),
        ({"rules": [{**RENAME, "when": "x"}]}, "rule 1: 'when' must be an object"),
        ({"rules": [{**RENAME, "when": {"x": 1}}]}, r"rule 1 \(Rename to 'b'\): a condition on 'x', which no config"),
        ({"rules": [{**RENAME, "optional": 3}]}, "rule 1: 'optional' must be true, false, a word or words"),
        ({"rules": [{k: v for k, v in HEADS.items() if k != "groups"}]}, r"rule 1 \(QKV to 't'\): 'groups' is missing"),
        ({"rules": [{**HEADS, "groups": "heads"}]}, "'groups' speaks of 'heads', which no config.json was found"),
        ({"rules": [{**HEADS, "groups": True}]}, "'groups' speaks of True, which is no whole number"),
        ({"rules": [{**HEADS, "groups": 0}]}, r"rule 1 \(QKV to 't'\): .* groups must be at least 1, got 0"),
        ({"rules": [{**HEADS, "shares": 1}]}, "'shares' must be a list of numbers or keys"),
        ({"rules": [{**HEADS, "shares": [1, 1]}]}, "shares must be 3 whole numbers"),
        ({"rules": [{**HEADS, "shares": ["a-b", 1, 1]}]}, "'shares' speaks of 'a-b', which is no key of config.json"),
        ({"rules": [{"rule": "Experts", "sources": "e", "target": "t", "merge": 1}]}, "'merge' must be true, false"),
        ({"rules": [{**RENAME, "sources": "a.{=n}"}]}, "'sources' speaks of 'n', which no config.json"),
        ({"rules": [{**RENAME, "target": "a.{x}.{x}"}]}, "'target' speaks of 'a.{x}.{x}' names a placeholder twice"),
        (
            {"rules": [{**HEADS, "groups": "x"}], "defaults": {"x": "y", "y": "x"}},
            "'groups' speaks of 'x', which no config",
        ),
        ({"rules": [{**RENAME, "target": "{x}"}], "bounds": {"x": "n"}}, "'target' speaks of 'n', which no config"),
    ],
)
def test_what_a_wrong_rule_file_is_told(document: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=f"rule file '.*own.json'.*{told}"):
        ms_ckpt_ext.load_rules(tmp_path / "own.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"rules": [')
    (tmp_path / "config.json").write_text("{")
    wrong: list[tuple[tuple[Any, ...], type[CheckpointError], str]] = [
        ((tmp_path / "torn.json",), UsageError, "is not JSON"),
        ((tmp_path / "nothing.json",), UsageError, "neither one of deepseek-v3, .* nor the path of a rule file"),
        (("qwen9",), UsageError, "no rules 'qwen9'"),
        (("qwen3", tmp_path), FormatError, "configuration '.*' is not JSON"),
        (("qwen3", tmp_path / "other.json"), StorageError, "other.json"),
        (("qwen3", tmp_path / "missing"), UsageError, "there is no '.*missing/config.json'"),
        (("qwen3", None, [1]), UsageError, "sizes must map keys"),
        ((5,), UsageError, "a family's name or the path of a rule file, got int"),
        ((None,), UsageError, "there is no config.json to tell it"),
    ]
    for arguments, error, told in wrong:
        with pytest.raises(error, match=told):
            ms_ckpt_ext.load_rules(*arguments)


def test_random_documents_are_refused_or_read() -> None:
    """Whatever is in the file: UsageError or rules, and no other exception."""
    values: list[Any] = [
        None,
        True,
        -1,
        2.5,
        "x",
        "",
        [],
        [None],
        {},
        {"a": []},
        "{a}",
        "{=b}",
        "{a<=b<c}",
        "{",
        "1*x+2",
    ]
    for key in ("rule", "sources", "target", "groups", "axis", "shares", "when", "unless", "optional", "experts"):
        for kind in KINDS:
            for value in values:
                entry = {"rule": kind, "sources": ["a.{}.q", "a.{}.k"], "target": "t.{}", "groups": 1, key: value}
                for name in ("title", "architectures", "defaults", "bounds", "tied", "leave", "shapes"):
                    try:
                        family_of({"rules": [entry], name: value}, "f", Config({"b": 1}, ""), {})
                        family_of({"rules": [entry]}, "f", Config({"b": 1}, ""), {})
                    except UsageError:
                        pass
