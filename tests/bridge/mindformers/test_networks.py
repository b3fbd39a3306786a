"""The rule files beside MindFormers itself: its networks have the names and shapes that the rules make of folders of
Hugging Face's, and where its classes can convert a folder, they make the same bytes of it.

All networks are built in one process. MindFormers 2.0 trains no Qwen2 and no Llama in its newer form: names of these
are those of the network that serves Qwen2, which has the same layers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.engine.huggingface.families import read_family
from ms_ckpt_ext.engine.huggingface.sizes import Config
from tests.support.checkpoints import Stored, read_file
from tests.support.families import HIDDEN, INNER, LAYERS, VOCABULARY, config_of, hub_folder

ROOT = Path(__file__).resolve().parents[3]
if importlib.util.find_spec("mindformers") is None:
    pytest.skip("MindFormers is not installed; scripts/test.sh installs it", allow_module_level=True)
if not importlib.metadata.version("mindformers").startswith("2."):
    pytest.skip("the rule files are for networks of MindFormers 2", allow_module_level=True)

pytestmark = [pytest.mark.slow]


class Case(NamedTuple):
    """A network, and the model that goes into it.

    Attributes:
        network, configuration: classes of MindFormers, "module:name".
        config: what config.json says, beside that of the family's small model.
        switches: of the rule file.
        given: what MindFormers is told besides.
        legacy: the arguments of its older models, which have names of their own for sizes.
    """

    family: str
    network: str
    configuration: str
    config: Mapping[str, Any] = MappingProxyType({})
    switches: Mapping[str, Any] = MappingProxyType({})
    given: Mapping[str, Any] = MappingProxyType({})
    legacy: bool = False


QWEN3 = "models.qwen3.modeling_qwen3_train:TrainingQwen3ForCausalLM", "models.qwen3.configuration_qwen3:Qwen3Config"
MOE = (
    "models.qwen3_moe.modeling_qwen3_moe_train:TrainingQwen3MoeForCausalLM",
    "models.qwen3_moe.configuration_qwen3_moe:Qwen3MoeConfig",
)
DEEPSEEK = (
    "models.deepseek3.modeling_deepseek_v3_train:TrainingDeepseekV3ForCausalLM",
    "models.deepseek3.configuration_deepseek_v3:DeepseekV3Config",
)
QWEN2 = "models.qwen2.modeling_qwen2_infer:InferenceQwen2ForCausalLM", "models.qwen2.configuration_qwen2:Qwen2Config"
LLAMA = "models.llama.llama:LlamaForCausalLM", "models.llama.llama_config:LlamaConfig"
GROUPED = {"moe_grouped_gemm": True}
LATENT = {**GROUPED, "qk_layernorm": True}
"""As the YAML files for DeepSeek-V3 have it."""
SMALL = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_layers": LAYERS, "vocab_size": VOCABULARY}
SIZES = {**SMALL, "num_heads": 8, "n_kv_heads": 4}
HEADS = {"head_dim": HIDDEN // 8}
APART = {"use_contiguous_weight_layout_attention": True, "use_interleaved_weight_layout_mlp": False}
"""An arrangement in which MindFormers' own loader of 2.0 puts weights into wrong rows."""
CASES = {
    "qwen3": Case("qwen3", *QWEN3),
    "qwen3, tied": Case("qwen3", *QWEN3, {"tie_word_embeddings": True}),
    "qwen3, apart": Case("qwen3", *QWEN3, {}, APART, APART),
    "qwen3-moe": Case("qwen3-moe", *MOE, given=GROUPED),
    "qwen3-moe, apart": Case("qwen3-moe", *MOE, {}, APART, {**GROUPED, **APART}),
    "deepseek-v3": Case("deepseek-v3", *DEEPSEEK, given=LATENT),
    "deepseek-v3, apart": Case(
        "deepseek-v3", *DEEPSEEK, {}, {"mla_qkv_concat": False}, {**LATENT, "mla_qkv_concat": False}
    ),
    "deepseek-v3, without query rank": Case("deepseek-v3", *DEEPSEEK, {"q_lora_rank": None}, given=LATENT),
    "deepseek-v3, without both": Case(
        "deepseek-v3",
        *DEEPSEEK,
        {"q_lora_rank": None, "num_nextn_predict_layers": 0},
        {"mla_qkv_concat": False},
        {**LATENT, "mla_qkv_concat": False, "num_nextn_predict_layers": None},
    ),
    "qwen2": Case("qwen2", *QWEN2, given={"attention_bias": True}),
    "qwen2, older": Case("qwen2", *LLAMA, HEADS, {"legacy_names": True}, {**SIZES, "qkv_has_bias": True}, True),
    "qwen2, older, joined": Case(
        "qwen2",
        *LLAMA,
        HEADS,
        {"legacy_names": True, "qkv_concat": True},
        {**SIZES, "qkv_has_bias": True, "qkv_concat": True},
        True,
    ),
    "llama": Case("llama", *LLAMA, HEADS, {}, SIZES, True),
    "llama, joined": Case("llama", *LLAMA, HEADS, {"qkv_concat": True}, {**SIZES, "qkv_concat": True}, True),
    "llama, tied": Case(
        "llama", *LLAMA, {**HEADS, "tie_word_embeddings": True}, {}, {**SIZES, "tie_word_embeddings": True}, True
    ),
    "llama, newer": Case("llama", *QWEN2, {}, {"legacy_names": False}),
}


CONVERTED = [name for name, case in CASES.items() if case.legacy or case.family in ("qwen3", "qwen3-moe")]


class Built(NamedTuple):
    """What MindFormers has of all cases: name -> shape of every parameter; and where its conversions are."""

    shapes: dict[str, dict[str, list[int]]]
    root: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("networks")
    told = {}
    for name, case in CASES.items():
        hub_folder(root / name / "hub", case.family, **case.config)
        config = {} if case.legacy else config_of(case.family, **case.config)
        told[name] = {
            "network": case.network,
            "config class": case.configuration,
            "config": {**config, **case.given},
            "legacy": case.legacy,
            "converts": name in CONVERTED,
        }
    (root / "cases.json").write_text(json.dumps(told))
    worker = Path(__file__).with_name("networks_worker.py")
    command = [sys.executable, str(worker), str(ROOT / "configs/mindformers/qwen3_tiny.yaml"), str(root)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(root)}  # MindFormers leaves files there
    ran = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return Built(json.loads((root / "shapes.json").read_text()), root)


def made(root: Path, name: str) -> dict[str, Stored]:
    """What the rules make of the folder."""
    case = CASES[name]
    rules = ms_ckpt_ext.load_rules(case.family, root / name / "hub", case.switches)
    ms_ckpt_ext.merge(root / name / "hub", root / name / "ours", rules=rules, digests=False, sync=False)
    return held(root / name / "ours")


def held(folder: Path) -> dict[str, Stored]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_file(file).items()}


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_the_networks(name: str, built: Built) -> None:
    """What else the network has is no weight, by the rule file."""
    case = CASES[name]
    config = Config(config_of(case.family, **case.config), "config.json")
    leaves = [Pattern(leaf) for leaf in read_family(case.family, config, case.switches).leaves]
    network = {n: tuple(s) for n, s in built.shapes[name].items() if not any(p.match(n) is not None for p in leaves)}
    assert {n: tensor.shape for n, tensor in made(built.root, name).items()} == network


@pytest.mark.parametrize("name", CONVERTED)
def test_bytes_are_those_of_their_own_conversion(name: str, built: Built) -> None:
    """By the function of the class; and by the rules of its converters, in the arrangement of the network."""
    ours = made(built.root, name)
    assert held(built.root / name / "function") == ours
    if not CASES[name].legacy:
        assert held(built.root / name / "converters") == ours
