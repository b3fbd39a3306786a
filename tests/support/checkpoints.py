"""Small tools of the job tests: reading files without the package, cutting arrays, building sources, merging them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from ms_ckpt_ext import load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import save_strategy

FULL = {
    "dp2_tp2": "full",
    "dp2_tp2_pp2_zero": "full",
    "dp2_tp4": "full",
    "dp2_tp4_layout": "full_layout",
    "dp2_tp4_zero": "full",
    "dp3_tp8": "full",
    "dp4_tp2_zero2": "full",
    "dp8_zero": "full",
    "tp4": "full",
    "tp4_pp2": "full",
}
"""Golden case -> the unsharded truth it was cut from."""
CASES = sorted(FULL)
PAIRS = [(a, b) for a in CASES for b in CASES if FULL[a] == FULL[b]]


class Stored(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_file(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, read with nothing but the format's definition."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        found[name] = Stored(entry["dtype"], tuple(entry["shape"]), raw[8 + length + start : 8 + length + stop])
    return found


def read_merged(target: Path) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """(parameters, scalars) of a merged checkpoint; checks map and parts against each other."""
    index = json.loads(
        (target / "param_name_map.json" if (target / "param_name_map.json").exists() else hf_index(target)).read_text()
    )
    parts = {name: read_file(target / name) for name in set(index["weight_map"].values())}
    assert {n: f for f, part in parts.items() for n in part} == index["weight_map"]
    found = {name: parts[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in found.values())
    hyper = target / "hyper_param.safetensors"
    return found, read_file(hyper) if hyper.exists() else {}


def hf_index(target: Path) -> Path:
    """Hugging Face's index file."""
    return target / "model.safetensors.index.json"


def shard(folder: Path) -> Path:
    """The one .safetensors file of a rank folder."""
    (file,) = folder.glob("*.safetensors")
    return file


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory but for the package's own: hidden ones, and manifests of digests."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    named = {str(p.relative_to(root)): p for p in files}
    return {name: p.read_bytes() for name, p in named.items() if not _hidden(name)}


def _hidden(name: str) -> bool:
    return any(part.startswith((".ms_ckpt_ext", "ms_ckpt_ext.digests")) for part in name.split("/"))


class Case:
    """A copy of a golden case that a test may spoil."""

    def __init__(self, golden: Path, name: str, root: Path) -> None:
        shutil.copytree(golden / name / "shards", root / "shards")
        shutil.copy(golden / name / "strategy.ckpt", root / "strategy.ckpt")
        for path in root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.shards, self.strategy, self.target = root / "shards", root / "strategy.ckpt", root / "out"

    def file(self, rank: int) -> Path:
        return shard(self.shards / f"rank_{rank}")

    def merge(self, **more: Any) -> Any:
        return unified_safetensors(self.shards, self.strategy, self.target, **more)

    def recut(self) -> Any:
        return load_distributed_checkpoint(
            None, None, self.strategy, self.strategy, format="safetensors", unified_safetensors_dir=self.shards,
            dst_safetensors_dir=self.target,
        )  # fmt: skip


def assert_nothing_complete(target: Path) -> None:
    """No file that a loader would take; nothing visible at all."""
    assert not target.exists() or target.is_file() or tree(target) == {}


def cut(strategy: Strategy, full: Mapping[str, np.ndarray], root: Path, extras: Mapping[str, np.ndarray] = {}) -> Path:
    """Write `full` as `strategy` has it: `rank_N/net.safetensors`, and `extras` whole on every rank."""
    for rank in range(strategy.world):
        held = {}
        for name in strategy.names_of(rank):
            layout = strategy.layout(name, rank)
            assert layout is not None
            whole = full[name]
            box = layout.region(rank % strategy.devices_per_stage, whole.shape) if whole.size else None
            # Not ascontiguousarray: it makes an axis for a scalar.
            empty = np.zeros(layout.slice_shape(whole.shape), whole.dtype)
            held[name] = np.array(whole[box.slices], order="C") if box else empty
        folder = root / f"rank_{rank}"
        folder.mkdir(parents=True)
        save_file({**held, **extras}, folder / "net.safetensors", {"format": "ms"})
    return root


def strategy_of(layouts: Mapping[str, Layout], path: Path) -> Strategy:
    """A strategy of one stage, written to `path` as well."""
    strategy = Strategy.from_items([LayoutItem(name, 0, layout) for name, layout in layouts.items()], str(path))
    save_strategy(strategy, path)
    return strategy


def source(root: Path, seed: int = 0, rows: int = 64, names: Sequence[str] = ("a.w", "b.w", "c.w", "d.w")) -> Path:
    """A checkpoint of dp2 tp2 with scalars: `shards/`, `strategy.ckpt`; values depend on `seed` only."""
    if root.exists():
        shutil.rmtree(root)
    root.mkdir(parents=True)
    full = arrays(seed, rows, names)
    cuts = [((0,), ()), ((), (0,)), ((1,), (0,)), ((), ())]
    strategy = strategy_of(
        {n: Layout((2, 2), cuts[i % 4], 1 if i == 0 else 0, -1 if i == 0 else 0) for i, n in enumerate(names)},
        root / "strategy.ckpt",
    )
    cut(strategy, full, root / "shards", scalars(seed))
    return root


def arrays(seed: int, rows: int = 64, names: Sequence[str] = ("a.w", "b.w", "c.w", "d.w")) -> dict[str, np.ndarray]:
    """The parameters of `source`, whole."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((rows, 32), np.float32) for name in names}


def scalars(seed: int) -> dict[str, np.ndarray]:
    """The training scalars of `source`."""
    return {"global_step": np.array([seed + 7], np.int32), "learning_rate": np.array(0.5 + seed, np.float32)}


def merge(root: Path, target: Path, **more: Any) -> Any:
    """Merge what `source` made."""
    return unified_safetensors(root / "shards", root / "strategy.ckpt", target, **more)


def assert_merged(target: Path, seed: int = 0, rows: int = 64, names: Callable[[str], Any] = str) -> None:
    """The merge of what `source` made is whole; `names` gives a parameter's new name, or nothing for none."""
    found, extras = read_merged(target)
    expected = {names(name): array.tobytes() for name, array in arrays(seed, rows).items() if names(name)}
    assert {n: t.data for n, t in found.items()} == expected
    assert {n: t.data for n, t in extras.items()} == {n: a.tobytes() for n, a in scalars(seed).items()}
