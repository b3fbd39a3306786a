"""Trainings of a small model, and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from tests.support.checkpoints import cut
from tests.support.families import hub_folder

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
