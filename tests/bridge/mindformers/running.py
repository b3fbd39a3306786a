"""Trainings of MindFormers in processes of their own, and what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
YAML = ROOT / "configs/mindformers/qwen3_tiny.yaml"


class Run(NamedTuple):
    """A training: its exact losses, digests of all it began with, who loaded, and where its output is.

    `stock` counts networks filled by MindSpore's own functions, `read` the bytes that this package read.
    """

    losses: list[str]
    begun: dict[str, str]
    ours: bool
    stock: int
    read: int
    output: Path

    def saved(self, step: int) -> dict[str, bytes]:
        """Parameters and optimizer states of a step, by name."""
        files = sorted((self.output / f"checkpoint/iteration_{step:08d}").glob("*.safetensors"))
        assert len(files) == 2, files
        return {name: array.tobytes() for file in files for name, array in load_file(file).items()}


def result_of(result: Path, output: Path) -> Run:
    """What `train_worker.py` wrote of a training."""
    return Run(**json.loads(result.read_text()), output=output)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What MindFormers runs in. The network is the same in all trainings, so it is compiled once."""
    plugins = subprocess.run(
        [sys.executable, "-m", "ms_ckpt_ext.plugins"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_", "DEVICE_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(tmp_path_factory.mktemp("compiled"))}
    cache["TMPDIR"] = str(tmp_path_factory.mktemp("temporary"))  # MindFormers leaves files there
    return {**env, **cache, "REGISTER_PATH": plugins, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(command: Sequence[str], env: Mapping[str, str], where: Path) -> str:
    """Run to its end; returns what it said."""
    ran = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def train(where: Path, env: Mapping[str, str], **changes: Sequence[str]) -> dict[str, Run]:
    """Train as the YAML says, once for each set of changes, one after another."""
    words: list[str] = []
    for name, changed in changes.items():
        words += ["--", f"{where}/{name}.json", f"output_dir={where}/{name}", *changed]
    run([sys.executable, str(HERE / "train_worker.py"), str(YAML), *words[1:]], env, where)
    return {name: result_of(where / f"{name}.json", where / name) for name in changes}
