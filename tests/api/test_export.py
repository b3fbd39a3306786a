"""`export`: from the shards of every layout to the folder that a hub has, and back again, bytes equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.huggingface.families import document_of
from ms_ckpt_ext.errors import ArgumentTypeError, CoverageError, FormatError, LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import QKV, Interleave, Rename, invert
from tests.support.checkpoints import CASES, cut, read_file
from tests.support.families import ARCHITECTURES, LAYERS, config_of, hub_folder, told, training

SCALARS = {
    "global_step": np.array([7], np.int32),
    "learning_rate": np.array(0.1, np.float32),
    "loss_scale": np.ones(1, np.float32),
}
Weights = dict[str, np.ndarray]


def trained(folder: Path, family: str, root: Path, **sizes: Any) -> Weights:
    """The parameters that a training of the folder's model has, by a merge with the family's rules."""
    rules = ms_ckpt_ext.load_rules(family, folder, sizes)
    ms_ckpt_ext.merge(folder, root, rules=rules, digests=False)
    with ms_ckpt_ext.load(root) as found:
        return {name: np.array(array) for name, array in found.arrays().items()}


def saved(weights: Weights, strategy: Strategy, root: Path) -> Path:
    """Shards as a training saves them: weights, optimizer states, scalars."""
    states = {f"{p}.{name}": np.zeros_like(array) for p in ("adam_m", "adam_v") for name, array in weights.items()}
    for number, (name, state) in enumerate(states.items()):
        states[name] = state + np.float16(number)
    return cut(strategy, {**weights, **states}, root, SCALARS)


def exported(folder: Path) -> Weights:
    """What the index lists, from where it says; nothing else is there."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: Weights = {}
    for file in sorted(set(index["weight_map"].values())):
        held = load_file(folder / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == held.keys()
        found.update(held)
        with safe_open(folder / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(set(index["weight_map"].values()))
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Weights, Weights]:
    """Family, folder of the hub, its weights, and what a training of it holds."""
    root = tmp_path_factory.mktemp(request.param)
    weights = hub_folder(root / "hub", request.param)
    return request.param, root / "hub", weights, trained(root / "hub", request.param, root / "trained")


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, model: tuple[str, Path, Weights, Weights], golden: Path, tmp_path: Path) -> None:
    family, hub, weights, parameters = model
    strategy = training(golden / case, {name: array.shape for name, array in parameters.items()})
    shards = saved(parameters, strategy, tmp_path / "shards")
    ms_ckpt_ext.export(shards, tmp_path / "out", rules=family, config=hub, strategy=strategy, sync=False)
    assert told(exported(tmp_path / "out")) == told(weights)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hub / name).read_bytes()


def test_experts_over_all_devices(golden: Path, tmp_path: Path) -> None:
    """Expert parallel over data and tensor parallel ranks at once."""
    weights = hub_folder(tmp_path / "hub", "qwen3-moe")
    parameters = trained(tmp_path / "hub", "qwen3-moe", tmp_path / "trained")
    like = training(golden / "dp2_tp4", {name: array.shape for name, array in parameters.items()}, states=False)
    experts = Layout((2, 4), ((1, 0), ()))
    items = [
        LayoutItem(name, stage, experts if ".experts." in name else layout)
        for name, stages in like.layouts.items()
        for stage, layout in stages.items()
    ]
    strategy = Strategy.from_items(items, "experts")
    cut(strategy, parameters, tmp_path / "shards")
    ms_ckpt_ext.export(tmp_path / "shards", tmp_path / "out", config=tmp_path / "hub", strategy=strategy)
    assert told(exported(tmp_path / "out")) == told(weights)


class Trained:
    """A small training on two ranks: its whole parameters, its shards, and the folder of its model."""

    def __init__(self, root: Path, family: str = "qwen3", **config: Any) -> None:
        self.root, self.family, self.hub = root, family, root / "hub"
        self.weights = hub_folder(self.hub, family, **config)
        self.parameters = trained(self.hub, family, root / "trained")

    def export(self, **more: Any) -> Any:
        """Cut what is held now for two ranks, and export it."""
        rows = {name: Layout((2,), ((0,), *[()] * (array.ndim - 1))) for name, array in self.parameters.items()}
        strategy = Strategy.from_items([LayoutItem(name, 0, layout) for name, layout in rows.items()], "two ranks")
        if not (self.root / "shards").exists():
            cut(strategy, self.parameters, self.root / "shards", SCALARS)
        named = {"rules": self.family, "config": self.hub, "strategy": strategy, "digests": False, **more}
        return ms_ckpt_ext.export(self.root / "shards", self.root / "out", **named)

    def out(self) -> Weights:
        return exported(self.root / "out")


def test_rules_by_architecture_by_file_and_as_a_list(tmp_path: Path) -> None:
    made = Trained(tmp_path, "qwen2")
    own = tmp_path / "own.json"
    own.write_text(json.dumps(document_of("qwen2")))
    for rules in (None, own, str(own), ms_ckpt_ext.load_rules("qwen2", made.hub)):
        made.export(rules=rules)
        assert told(made.out()) == told(made.weights)


def test_sizes_come_first_and_switches_change_the_arrangement(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    made.parameters = trained(made.hub, "qwen3", tmp_path / "apart", use_interleaved_weight_layout_mlp=False)
    made.export(sizes={"use_interleaved_weight_layout_mlp": False})
    assert told(made.out()) == told(made.weights)
    with pytest.raises(UsageError, match="'num_layer' is no key of .*config.json.* check its spelling"):
        made.export(sizes={"num_layer": 3})


def test_shards_of_a_size_as_transformers_says_it(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    largest = max(array.nbytes for array in made.weights.values())
    for size, most in (("20KB", 20000), ("20KiB", 20480), (20000, 20000)):
        made.export(max_shard_size=size)
        files = {file: load_file(file) for file in (tmp_path / "out").glob("*.safetensors")}
        assert len(files) > 1 and largest < most
        assert all(sum(array.nbytes for array in held.values()) <= most for held in files.values())
        assert told(made.out()) == told(made.weights)
    for wrong in ("much", "-5GB", "5PB", 0, True, None):
        with pytest.raises(UsageError, match="max_shard_size|part_bytes"):
            made.export(max_shard_size=wrong)


def test_tied_weights_go_out_once(tmp_path: Path) -> None:
    made = Trained(tmp_path, tie_word_embeddings=True)
    assert "output_layer.weight" not in made.parameters
    made.export()
    assert told(made.out()) == told(made.weights)
    made.parameters["output_layer.weight"] = made.parameters["embedding.word_embeddings.weight"].copy()
    (tmp_path / "shards").rename(tmp_path / "without a head")
    made.export()
    assert told(made.out()) == told(made.weights)
    made.parameters["output_layer.weight"][-1, -1] += 1
    (tmp_path / "shards").rename(tmp_path / "tied")
    before = told(made.out())
    with pytest.raises(LayoutMismatchError, match="'lm_head.weight' and 'model.embed_tokens.weight' differ"):
        made.export()
    assert told(made.out()) == before
    made.export(sizes={"tie_word_embeddings": False})
    assert made.out()["lm_head.weight"].tobytes() == made.parameters["output_layer.weight"].tobytes()


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


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    made = Trained(tmp_path, quantization_config={"quant_method": "fp8"})
    (made.hub / "merges.txt").write_text("a b")
    (made.hub / "README.md").write_text("not copied")
    (made.hub / "modeling_own.py").write_text("pass")
    made.export()
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert names >= {"config.json", "tokenizer.json", "merges.txt", "modeling_own.py"} and "README.md" not in names
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["num_attention_heads"] == 8
    (made.hub / "merges.txt").write_text("a c")
    made.export()
    assert (tmp_path / "out/merges.txt").read_text() == "a c"


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


def test_a_rerun_has_nothing_to_do_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    foreseen = made.export(dry_run=True)
    assert foreseen.bytes_written > 0 and not (tmp_path / "out").exists()
    report = made.export()
    assert (
        report.bytes_written
        == foreseen.bytes_written
        == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    )
    assert sum(array.nbytes for array in made.weights.values()) <= report.bytes_read <= foreseen.bytes_written
    again = made.export()
    assert again.published and not again.files_written and again.bytes_read == 0


def test_what_was_fused_is_read_once(tmp_path: Path) -> None:
    """Rows of gate and up that alternate; queries, keys and values group by group. Long reads, whatever the rows."""
    rng = np.random.default_rng(3)
    fused = {"fc1": rng.integers(0, 99, (256, 4096), np.int16), "qkv": rng.integers(0, 99, (96, 4096), np.int16)}
    save_file(fused, tmp_path / "trained.safetensors")
    rules = [Interleave(["gate", "up"], "fc1"), QKV(["q", "k", "v"], "qkv", groups=8, shares=(4, 1, 1))]
    report = ms_ckpt_ext.export(tmp_path / "trained.safetensors", tmp_path / "out", rules=rules)
    held = exported(tmp_path / "out")
    assert (
        held["gate"].tobytes() == fused["fc1"][::2].tobytes() and held["up"].tobytes() == fused["fc1"][1::2].tobytes()
    )
    groups = np.split(fused["qkv"].reshape(8, 12, 4096), (8, 10), axis=1)
    assert [held[name].tobytes() for name in "qkv"] == [group.tobytes() for group in groups]
    assert report.bytes_read == sum(array.nbytes for array in fused.values()) and report.reads <= 2


def test_shares_of_hosts_appear_together(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    for share in ((1, 2), (2, 2)):
        made.export(share=share, max_shard_size="20KB")
    assert told(made.out()) == told(made.weights)


def test_scalars_and_states_among_the_parameters(tmp_path: Path) -> None:
    """One device: only names and sizes identify them. A single value in a network is ambiguous."""
    made = Trained(tmp_path)
    states = {
        f"{prefix}.{name}": array * 2 for prefix in ("adam_m", "moment1") for name, array in made.parameters.items()
    }
    save_file({**made.parameters, **states, **SCALARS}, tmp_path / "one.safetensors")
    ms_ckpt_ext.safetensors_to_ckpt(str(tmp_path / "one.safetensors"), str(tmp_path / "ckpt"))
    (ckpt,) = (tmp_path / "ckpt").rglob("*.ckpt")
    for file in (tmp_path / "one.safetensors", ckpt):
        ms_ckpt_ext.export(file, tmp_path / "out", config=made.hub)
        assert told(made.out()) == told(made.weights)
    save_file({**made.parameters, "decoder.scale": np.ones(1, np.float32)}, tmp_path / "one.safetensors")
    with pytest.raises(UsageError, match="no rule names 1 of .*'decoder.scale'"):
        ms_ckpt_ext.export(tmp_path / "one.safetensors", tmp_path / "out", config=made.hub)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    """Rounded to the nearest, whatever the rule that moves it; the routers' corrections stay as they are."""
    made = Trained(tmp_path, "deepseek-v3", torch_dtype="float64")
    made.export(dtype=dtype)
    wanted = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    found = {name: held for file in (tmp_path / "out").glob("*.safetensors") for name, held in read_file(file).items()}
    assert found.keys() == made.weights.keys()
    for name, held in found.items():
        value = made.weights[name]
        kept = name.endswith("e_score_correction_bias")
        assert (held.dtype, held.shape) == ("F32" if kept else wanted, value.shape)
        assert held.data == (value.tobytes() if kept else rounded(value, wanted)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    assert made.export(dtype=dtype).files_written == ()


def rounded(value: np.ndarray, dtype: str) -> bytes:
    """Bytes of a value in another dtype, ties to even."""
    if dtype != "BF16":
        return value.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    for wrong in ("float8", "int8", 16, "F64"):
        with pytest.raises(UsageError, match="dtype must be one of bfloat16, float16 and float32"):
            made.export(dtype=wrong)


def test_a_quantised_model_goes_in_and_comes_out_as_floats(tmp_path: Path) -> None:
    """DeepSeek's blocks of 128 x 128 with their scales: out come the floats that the training has."""
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    weights = hub_folder(tmp_path / "plain", "deepseek-v3")
    stored: dict[str, tuple[str, np.ndarray]] = {}
    floats = {}
    for name, value in weights.items():
        if "_proj" in name and value.ndim == 2:
            bits = (
                np.random.default_rng(len(name)).integers(0, 120, value.shape).astype(np.uint8)
            )  # finite, of any size
            stored[name] = "F8_E4M3", bits
            stored[f"{name}_scale_inv"] = "F32", np.full([-(-extent // 128) for extent in value.shape], 0.5, np.float32)
            floats[name] = np.frombuffer(rounded(e4m3(bits) * np.float32(0.5), "BF16"), np.uint16)
        else:
            stored[name] = {"<f2": "F16", "<f4": "F32"}[value.dtype.str], value
            floats[name] = value
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(config_of("deepseek-v3", **config)))
    write_file(hub / "model.safetensors", stored)
    rules = ms_ckpt_ext.load_rules("deepseek-v3", hub)
    ms_ckpt_ext.merge(hub, tmp_path / "trained", rules=rules)
    ms_ckpt_ext.export(tmp_path / "trained", tmp_path / "out", config=hub)
    found = {name: held for file in (tmp_path / "out").glob("*.safetensors") for name, held in read_file(file).items()}
    assert {name: held.data for name, held in found.items()} == {
        name: value.tobytes() for name, value in floats.items()
    }
    assert {found[name].dtype for name in floats if "_proj" in name} == {"BF16"}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Positive F8_E4M3 as floats."""
    exponent, fraction = (bits >> 3).astype(np.int32), (bits & 7) / np.float32(8)
    return np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7)).astype(np.float32)


def write_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file with dtypes that numpy lacks."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for _, value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


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
