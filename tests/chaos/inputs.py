"""The checkpoints that all runs work on, a MiB each, made once. Two of everything, with the same names: A and B."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.checkpoints import cut, source, strategy_of
from tests.support.families import hub_folder, training
from tests.support.saved import save

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
NAMES = ("a.w", "b.w", "c.w", "d.w")
ROWS = 1024
KEY = b"0123456789ABCDEF"
SCALARS = {"global_step": np.array([7], np.int32)}


def make_inputs(root: Path) -> None:
    """`A/` and `B/`, each with a folder for every kind of source, and what goes with it in `with/`."""
    root.mkdir()
    for seed, name in enumerate("AB"):
        _kinds(root / name, seed)


def _kinds(root: Path, seed: int) -> None:
    beside = root / "with"
    beside.mkdir(parents=True)
    made = source(root / "made", seed, ROWS, NAMES)
    shutil.move(made / "shards", root / "shards")
    shutil.move(made / "strategy.ckpt", beside / "strategy.ckpt")
    layouts = {name: Layout((4,), ((0,), ()) if number % 2 else ((), (0,))) for number, name in enumerate(NAMES)}
    strategy_of(layouts, beside / "target.ckpt")
    (beside / "key").write_bytes(KEY)
    ms_ckpt_ext.convert(root / "shards", root / "ckpt", to="ckpt", digests=False)
    ms_ckpt_ext.encrypt(root / "shards", root / "sealed", enc_key=KEY, digests=False)
    ms_ckpt_ext.merge(root / "shards", root / "merged", strategy=beside / "strategy.ckpt")
    _trained(root, seed)
    for step in (20 + seed, 100 + seed):
        save(root / "saves", step)
    for left in root.glob("made*"):
        shutil.rmtree(left)


def _trained(root: Path, seed: int) -> None:
    """A training of a family's small model, and the configuration it is exported with."""
    hub = root / "with" / "hub"
    hub_folder(hub, "qwen3")
    rules = ms_ckpt_ext.load_rules("qwen3", hub, {})
    ms_ckpt_ext.merge(hub, root / "made_weights", rules=rules, digests=False)
    with ms_ckpt_ext.load(root / "made_weights") as found:
        weights = {name: np.array(array) + array.dtype.type(seed) for name, array in found.arrays().items()}
    strategy = training(GOLDEN / "dp2_tp2", {name: array.shape for name, array in weights.items()}, states=False)
    cut(strategy, weights, root / "trained", SCALARS)
    save_strategy(strategy, root / "with" / "trained.ckpt")
    shutil.rmtree(root / "made_weights")
