"""`export`: from the shards of every layout to the folder that a hub has, and back again, bytes equal."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.huggingface.families import document_of
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError
from ms_ckpt_ext.rules import QKV, Interleave
from tests.support.checkpoints import CASES, cut
from tests.support.exports import SCALARS, Trained, Weights, exported, saved, trained
from tests.support.families import ARCHITECTURES, hub_folder, told, training


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
