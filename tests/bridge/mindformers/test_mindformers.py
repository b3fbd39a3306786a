"""MindFormers through this package: a real tiny Qwen3, trained, saved, resumed; its folders on several ranks.

Everything runs in processes of its own, since MindFormers patches what it imports. What it lacks on the CPU is replaced
in `standin.py`: operators and two collectives, no checkpoint code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.source.catalog import open_catalog
from tests.bridge.mindformers.running import HERE, ROOT, YAML, Run, environment, result_of, run, train
from tests.docs.test_pages import blocks
from tests.harness.msrun import run_msrun
from tests.support.torch_python import needs_torch, transformers

__all__ = ["environment"]
STOCK = "without=Resharding"
"""Drops the one entry of the YAML that brings this package in."""

if importlib.util.find_spec("mindformers") is None:
    if os.environ.get("MS_CKPT_EXT_REQUIRE_MINDFORMERS"):
        raise RuntimeError("MindFormers should be installed here (scripts/test.sh does it), but is not")
    pytest.skip("MindFormers is not installed; scripts/test.sh installs it", allow_module_level=True)

yaml = pytest.importorskip("yaml", reason="comes with MindFormers")
pytestmark = [pytest.mark.slow]


FIRST = importlib.metadata.version("mindformers").startswith("1.8.")
"""MindFormers 1.8 has no weight converters yet, and loads folders into networks of its own classes only."""
LEFT_IN_WRAPPER = 4 if FIRST else 5
"""What the last step leaves in the train cell, beside parameters, their states and the step."""
since_1_9 = pytest.mark.skipif(
    FIRST, reason="MindFormers 1.8 has neither weight converters nor folders for any network"
)


class Page(NamedTuple):
    """What the commands of the page made: a training from scratch, and its resume through this package."""

    first: Run
    second: Run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Page:
    """The commands of docs/mindformers.md, in one shell: what is exported in one is used in the next."""
    root = tmp_path_factory.mktemp("page")
    script = "\n".join(block.text for block in blocks("docs/mindformers.md") if block.language == "bash")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    here = {"PATH": path, "TMPDIR": str(root), "REGISTER_PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    run(["bash", "-euo", "pipefail", "-c", script], {**environment, **here}, ROOT)
    assert len(list(root.glob("*/merged/param_name_map.json"))) == 1
    (work,) = (path.parent for path in root.glob("*/first.json"))
    return Page(*(result_of(work / f"{name}.json", work / name) for name in ("first", "second")))


class Trained(NamedTuple):
    """Three trainings that begin with nothing: the legacy way, and from a Hugging Face directory by both loaders."""

    legacy: Run
    stock: Run
    ours: Run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    source = f"load_checkpoint={hugging_face(root / 'hf')}"
    legacy = ("use_legacy_format=True",)
    return Trained(**train(root, environment, legacy=legacy, stock=(STOCK, source), ours=(source,)))


@pytest.fixture(scope="module")
def resumed(
    page: Page, trained: Trained, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]
) -> dict[str, Run]:
    """Resumes: of the page's checkpoint by the stock loader, of the legacy one, in both formats, by both loaders."""
    root = tmp_path_factory.mktemp("resumed")
    saved = trained.legacy.output / "checkpoint/rank_0/qwen3_rank_0-1_4.safetensors"
    whole, ranks = root / "whole", root / "ranks"
    whole.mkdir()
    (whole / "qwen3.safetensors").symlink_to(saved)
    scalars = {name: array for name, array in load_file(saved).items() if not array.shape}
    save_file(scalars, whole / "hyper_param.safetensors")
    ms_ckpt_ext.convert(saved, ranks / f"rank_0/{saved.stem}.ckpt")
    resume = ("resume_training=True", "runner_config.epochs=2")
    legacy = (*resume, "use_legacy_format=True", f"load_checkpoint={whole}")
    ckpt = (*resume, "use_legacy_format=True", f"load_checkpoint={ranks}", "load_ckpt_format=ckpt")
    return train(
        root,
        environment,
        stock=(STOCK, *resume, f"load_checkpoint={page.first.output}/checkpoint"),
        legacy_stock=(STOCK, *legacy),
        legacy_ours=legacy,
        ckpt_stock=(STOCK, *ckpt),
        ckpt_ours=ckpt,
    )


def test_resume_by_yaml_alone(page: Page, resumed: dict[str, Run]) -> None:
    """As the page does it; a resume from the same checkpoint by the stock loader ends with the same bits."""
    stock, ours = resumed["stock"], page.second
    assert (stock.ours, ours.ours) == (False, True)
    assert len(ours.losses) == 4
    assert ours.losses == stock.losses
    assert ours.begun == stock.begun
    assert not set(ours.losses) & set(page.first.losses)
    for step in (6, 8):
        assert ours.saved(step) == stock.saved(step)
    assert len(ours.saved(8)) == 58  # 19 parameters, two states of each, the step


@pytest.mark.parametrize("form", ["legacy", "ckpt"])
def test_the_legacy_way_by_yaml_alone(form: str, page: Page, resumed: dict[str, Run], trained: Trained) -> None:
    """One device, safetensors and .ckpt: we read every byte, MindSpore's functions none, and the end is the same."""
    stock, ours = resumed[f"{form}_stock"], resumed[f"{form}_ours"]
    held = load_file(trained.legacy.output / "checkpoint/rank_0/qwen3_rank_0-1_4.safetensors")
    assert (ours.stock, stock.read) == (0, 0)
    assert stock.stock >= 1
    wanted = sum(array.nbytes for name, array in held.items() if name in ours.begun)
    assert wanted <= ours.read <= wanted + (128 << 10)  # tables of contents, and the step once more
    assert ours.begun == stock.begun
    assert len(ours.begun.keys() & held.keys()) == 58 + LEFT_IN_WRAPPER
    assert ours.losses == stock.losses == page.second.losses
    last = [load_file(run.output / "checkpoint/rank_0/qwen3_rank_0-2_4.safetensors") for run in (ours, stock)]
    assert _whole(last[0]) == _whole(last[1])


@pytest.mark.msrun
def test_a_rank_folder_by_yaml_alone(
    trained: Trained, resumed: dict[str, Run], environment: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    """`use_parallel`, a world of one rank: its own file of `rank_0/`, as the legacy way saved it."""
    for name in ("REGISTER_PATH", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(tmp_path)
    words = ["use_legacy_format=True", "resume_training=True", "runner_config.epochs=2", "use_parallel=True"]
    words += [f"load_checkpoint={trained.legacy.output}/checkpoint", f"output_dir={tmp_path}/out"]
    run_msrun(
        HERE / "train_worker.py", YAML, tmp_path / "out.json", *words, ranks=1, tmp_path=tmp_path, supervised=True
    )
    ours, stock = result_of(tmp_path / "out.json", tmp_path / "out"), resumed["legacy_stock"]
    assert (ours.stock, ours.begun, ours.losses) == (0, stock.begun, stock.losses)
    assert ours.read > 1 << 20


def hugging_face(root: Path) -> Path:
    """A Hugging Face directory for the model of the YAML, in two files with an index."""
    rng = np.random.RandomState(1)
    hidden, inner, vocabulary, heads, groups, depth = 64, 128, 256, 4, 2, 16

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    held = {"model.embed_tokens.weight": draw(vocabulary, hidden), "lm_head.weight": draw(vocabulary, hidden)}
    held["model.norm.weight"] = draw(hidden)
    for layer in range(2):
        shapes = {"q": (heads * depth, hidden), "k": (groups * depth, hidden), "v": (groups * depth, hidden)}
        shapes["o"] = (hidden, heads * depth)
        lead = f"model.layers.{layer}."
        held |= {f"{lead}self_attn.{name}_proj.weight": draw(*shape) for name, shape in shapes.items()}
        held |= {f"{lead}self_attn.{name}_norm.weight": draw(depth) for name in "qk"}
        held |= {f"{lead}mlp.{name}_proj.weight": draw(inner, hidden) for name in ("gate", "up")}
        held[f"{lead}mlp.down_proj.weight"] = draw(hidden, inner)
        held |= {f"{lead}{name}_layernorm.weight": draw(hidden) for name in ("input", "post_attention")}
    root.mkdir()
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: held[name] for name in chosen}, root / file, {"format": "pt"})
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    return root


def test_a_hugging_face_directory_by_yaml_alone(trained: Trained) -> None:
    stock, ours = trained.stock, trained.ours
    assert (stock.ours, ours.ours) == (False, True)
    assert len(ours.losses) == 4
    assert ours.losses == stock.losses
    assert ours.begun == stock.begun
    assert ours.saved(4) == stock.saved(4)


@pytest.fixture(scope="module")
def exported(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's training as Hugging Face's libraries read it."""
    root = tmp_path_factory.mktemp("exported")
    model = yaml.safe_load(YAML.read_text())["model"]["model_config"]
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") + (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "tie_word_embeddings",
        "architectures",
        "model_type",
    )
    config = {**{key: model[key] for key in keys}, "torch_dtype": "float32", "hidden_act": "silu"}
    (root / "config.json").write_text(json.dumps(config))
    ms_ckpt_ext.export(page.first.output / "checkpoint/iteration_00000004", root / "model", config=root / "config.json")
    return root / "model"


def test_what_was_trained_goes_back_to_hugging_face(page: Page, exported: Path) -> None:
    """Weights alone; taken apart by hand, they are what the training holds."""
    held = {name: array for file in exported.glob("*.safetensors") for name, array in load_file(file).items()}
    saved = page.first.saved(4)
    assert held.keys() == hugging_face_names()
    groups, depth, hidden = 2, 16, 64
    for layer in range(2):
        here, there = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        parts = (held[f"{here}self_attn.{p}_proj.weight"].reshape(groups, -1, hidden) for p in "qkv")
        fused = np.concatenate(list(parts), axis=1)
        assert fused.shape == (groups, 4 * depth, hidden)
        assert fused.tobytes() == saved[f"{there}self_attention.linear_qkv.weight"]
        rows = np.stack([held[f"{here}mlp.{p}_proj.weight"] for p in ("gate", "up")], axis=1)
        assert rows.tobytes() == saved[f"{there}mlp.linear_fc1.weight"]
        assert held[f"{here}mlp.down_proj.weight"].tobytes() == saved[f"{there}mlp.linear_fc2.weight"]
    assert held["lm_head.weight"].tobytes() == saved["output_layer.weight"]
    assert held["model.embed_tokens.weight"].tobytes() == saved["embedding.word_embeddings.weight"]


@needs_torch
def test_transformers_generates_with_what_was_trained(exported: Path) -> None:
    tokens = transformers("generate", exported)
    assert len(tokens) == 12 and all(0 <= token < 256 for token in tokens)


def hugging_face_names() -> set[str]:
    """The tensors of transformers' model of the YAML."""
    with tempfile.TemporaryDirectory() as root:
        return {name for file in hugging_face(Path(root, "hf")).glob("*.safetensors") for name in load_file(file)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MindFormers saves on (2, 2): with replicas, without, and a Hugging Face directory."""
    root = tmp_path_factory.mktemp("folders")
    run_msrun(HERE / "folder_worker.py", "save", "2x2", root, root / "saved", ranks=4, tmp_path=root)
    return root


@since_1_9
@pytest.mark.msrun
def test_folders_of_four_ranks_on_two(folders: Path, tmp_path: Path) -> None:
    """(2, 2) to (1, 2), in all three forms; a rank reads its own bytes, together they read every byte once."""
    run_msrun(HERE / "folder_worker.py", "load", "1x2", folders, tmp_path / "loaded", ranks=2, tmp_path=tmp_path)
    by_rank = [json.loads((tmp_path / f"loaded.{rank}").read_text()) for rank in range(2)]
    for found in by_rank:
        assert len(found) == 9
        for case, told in found.items():
            assert told["right"], case
            assert all(told["right"].values()), (case, told)
    headers = 64 << 10
    for source in ("full", "lean", "hf"):
        for found in by_rank:
            assert found[f"{source} direct"]["read"] <= found[f"{source} direct"]["wanted"] + headers
        together = [found[f"{source} cooperative"]["read"] for found in by_rank]
        assert [found[f"{source} direct"]["listed"] for found in by_rank] == [1, 1]
        assert sum(found[f"{source} cooperative"]["listed"] for found in by_rank) == 1  # by one rank of the host
        assert sum(together) <= sum(found[f"{source} direct"]["wanted"] for found in by_rank) + 2 * headers
    assert by_rank[0]["hf stock"]["read"] > 3 * by_rank[0]["hf direct"]["wanted"]


def test_a_folder_can_be_opened_and_merged_without_mindformers(folders: Path, tmp_path: Path) -> None:
    contents = []
    for source in ("full", "lean"):
        catalog = open_catalog(str(folders / source), None)
        target = tmp_path / source
        execute(merge_job(catalog, str(target), MergeOptions()), str(target), 2, Limits())
        contents.append(_whole(load_file(target / "part0.safetensors")))
    assert contents[0] == contents[1]
    drawn = np.random.RandomState(sum(map(ord, "l0.row.weight"))).standard_normal((64, 256)).astype(np.float32)
    assert contents[0]["l0.row.weight"] == drawn.tobytes()
    assert len(contents[0]) == 5


def _whole(held: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in held.items()}


@since_1_9
def test_converters_and_the_legacy_way(golden: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    """MindFormers' operators against the rules made of them, and its legacy functions against ours."""
    worker = [sys.executable, str(HERE / "functions_worker.py"), str(golden), str(tmp_path)]
    assert run(worker, environment, tmp_path).splitlines()[-1] == "all right"
