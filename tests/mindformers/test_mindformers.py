"""MindFormers through this package: a real tiny Qwen3, trained, saved, resumed; its folders on several ranks.

Everything runs in processes of its own, since MindFormers patches what it imports. What it lacks on the CPU is replaced
in `standin.py`: operators and two collectives, no checkpoint code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext.core.reads import Limits
from ms_ckpt_ext.engine.catalog import open_catalog
from ms_ckpt_ext.engine.jobs import MergeOptions, merge_job
from ms_ckpt_ext.engine.offline import execute
from tests.docs.test_pages import blocks
from tests.harness.msrun import run_msrun

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
YAML = ROOT / "configs/mindformers/qwen3_tiny.yaml"
STOCK = "without=Resharding"
"""Drops the one entry of the YAML that brings this package in."""

if importlib.util.find_spec("mindformers") is None:
    if os.environ.get("MS_CKPT_EXT_REQUIRE_MINDFORMERS"):
        raise RuntimeError("MindFormers should be installed here (scripts/test.sh does it), but is not")
    pytest.skip("MindFormers is not installed; scripts/test.sh installs it", allow_module_level=True)

pytestmark = [pytest.mark.slow]


class Run(NamedTuple):
    """A training: its exact losses, whose loader served it, and where its output is."""

    losses: list[str]
    ours: bool
    output: Path

    def saved(self, step: int) -> dict[str, bytes]:
        """Parameters and optimizer states of a step, by name."""
        files = sorted((self.output / f"checkpoint/iteration_{step:08d}").glob("*.safetensors"))
        assert len(files) == 2, files
        return {name: array.tobytes() for file in files for name, array in load_file(file).items()}


def environment() -> dict[str, str]:
    plugins = subprocess.run(
        [sys.executable, "-m", "ms_ckpt_ext.plugins"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_", "DEVICE_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**env, "REGISTER_PATH": plugins, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(where: Path, *changes: str) -> Run:
    """Train as the YAML says, with changes, in a process and a folder of its own."""
    where.mkdir()
    result = where / "result.json"
    command = [sys.executable, str(HERE / "train_worker.py"), str(YAML), str(result)]
    ran = subprocess.run(
        [*command, f"output_dir={where}/out", *changes],
        cwd=where,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    told = json.loads(result.read_text())
    return Run(told["losses"], told["ours"], where / "out")


def train_both(root: Path, *changes: str) -> tuple[Run, Run]:
    """(by the stock loader, by ours), at the same time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        stock = pool.submit(train, root / "stock", STOCK, *changes)
        ours = pool.submit(train, root / "ours", *changes)
        return stock.result(), ours.result()


class Page(NamedTuple):
    """What the commands of the page made: a training from scratch, and its resume through this package."""

    first: Run
    second: Run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The commands of docs/mindformers.md, in one shell: what is exported in one is used in the next."""
    root = tmp_path_factory.mktemp("page")
    script = "\n".join(block.text for block in blocks("docs/mindformers.md") if block.language == "bash")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env={**environment(), "PATH": path, "TMPDIR": str(root), "REGISTER_PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert len(list(root.glob("*/merged/param_name_map.json"))) == 1
    told = {path.stem: (path, json.loads(path.read_text())) for path in root.glob("*/*.json")}
    return Page(*(Run(run["losses"], run["ours"], path.parent / name)
                  for name, (path, run) in ((name, told[name]) for name in ("first", "second"))))  # fmt: skip


def test_resume_by_yaml_alone(page: Page, tmp_path: Path) -> None:
    """As the page does it; a resume from the same checkpoint by the stock loader ends with the same bits."""
    ours = page.second
    stock = train(
        tmp_path / "stock",
        STOCK,
        f"load_checkpoint={page.first.output}/checkpoint",
        "resume_training=True",
        "runner_config.epochs=2",
    )
    assert (stock.ours, ours.ours) == (False, True)
    assert len(ours.losses) == 4
    assert ours.losses == stock.losses
    assert not set(ours.losses) & set(page.first.losses)
    for step in (6, 8):
        assert ours.saved(step) == stock.saved(step)
    assert len(ours.saved(8)) == 58  # 19 parameters, two states of each, the step


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


def test_a_hugging_face_directory_by_yaml_alone(tmp_path: Path) -> None:
    stock, ours = train_both(tmp_path, f"load_checkpoint={hugging_face(tmp_path / 'hf')}")
    assert (stock.ours, ours.ours) == (False, True)
    assert len(ours.losses) == 4
    assert ours.losses == stock.losses
    assert ours.saved(4) == stock.saved(4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MindFormers saves on (2, 2): with replicas, without, and a Hugging Face directory."""
    root = tmp_path_factory.mktemp("folders")
    run_msrun(HERE / "folder_worker.py", "save", "2x2", root, root / "saved", ranks=4, tmp_path=root)
    return root


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


def test_converters_and_the_legacy_way(golden: Path, tmp_path: Path) -> None:
    """MindFormers' operators against the rules made of them, and its legacy functions against ours."""
    ran = subprocess.run(
        [sys.executable, str(HERE / "functions_worker.py"), str(golden), str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "all right"
