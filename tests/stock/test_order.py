"""`.ckpt` files have their parameters in MindSpore's order, so that they are the same files, byte for byte.

Stock's order is not always the same: from safetensors, pipeline stages that become one come in the order in which its
processes end, and training scalars in that of a set of str, so contents are compared there.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.checkpoints import tree
from tests.support.formats import contents

pytestmark = pytest.mark.stock
NAMES = [f"p{number}.w" for number in random.Random(3).sample(range(8), 8)]
WHOLE = {
    name: np.full((8, 8), number, np.float32) + np.arange(8, dtype=np.float32) for number, name in enumerate(NAMES)
}
SCALARS = {"global_step": np.array([3], np.int32), "learning_rate": np.array(0.5, np.float32)}


class Shape(NamedTuple):
    """Pipeline stages, and devices of each."""

    stages: int
    devices: int


SOURCES = [Shape(1, 1), Shape(1, 2), Shape(2, 2), Shape(4, 1)]
TARGETS = [None, Shape(1, 2), Shape(1, 4), Shape(2, 2), Shape(4, 1)]


def strategy(shape: Optional[Shape], path: Path, seed: int) -> Optional[Strategy]:
    """Parameters in any order, each stage's together, cut in any way."""
    if shape is None:
        return None
    chance = random.Random(seed)
    cuts = [((0,), ()), ((), (0,)), ((), ())]
    items = [
        LayoutItem(name, NAMES.index(name) * shape.stages // len(NAMES), Layout((shape.devices,), chance.choice(cuts)))
        for name in chance.sample(NAMES, len(NAMES))
    ]
    made = Strategy.from_items(sorted(items, key=lambda item: item.stage), "random")
    save_strategy(made, path)
    return made


def checkpoint(ms: Any, held: Strategy, root: Path, kind: str, seed: int) -> Path:
    """Files as MindSpore saves them; those of each stage in an order of their own, scalars anywhere among the rest."""
    for rank in range(held.world):
        chance = random.Random(seed + held.stage_of(rank))
        values = dict(SCALARS)
        for name in held.names_of(rank):
            layout = held.layout(name, rank)
            assert layout is not None
            box = layout.region(rank % held.devices_per_stage, (8, 8))
            values[name] = np.array(WHOLE[name][box.slices], order="C")
        order = chance.sample(sorted(values), len(values))
        saved = [{"name": name, "data": ms.Parameter(ms.Tensor(values[name]))} for name in order]
        (root / f"rank_{rank}").mkdir(parents=True)
        ms.save_checkpoint(saved, str(root / f"rank_{rank}" / f"net.{kind}"), format=kind)
    return root


Job = Callable[[Any, Path], None]


def compare(job: Job, ms: Any, root: Path, exact: bool = True) -> None:
    for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
        (root / who).mkdir()
        job(package, root / who)
    stock, ours = (
        {name: data for name, data in tree(root / who).items() if name.endswith(".ckpt")} for who in ("stock", "ours")
    )
    assert stock and ours.keys() == stock.keys()
    for name in stock:
        assert not exact or ours[name] == stock[name], [list(contents(root / who / name)) for who in ("stock", "ours")]
        assert contents(root / "ours" / name) == contents(root / "stock" / name)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_transformed(source: Shape, target: Optional[Shape], ms: Any, tmp_path: Path) -> None:
    trained, wanted = tmp_path / "trained.ckpt", tmp_path / "wanted.ckpt"
    held = strategy(source, trained, 1)
    strategy(target, wanted, 2)
    assert held is not None
    root = checkpoint(ms, held, tmp_path / "held", "ckpt", 5)
    to = None if target is None else str(wanted)
    if target != Shape(4, 1) or source in (Shape(1, 1), Shape(4, 1)):  # else stock asks for ranks that are not there
        compare(lambda m, out: m.transform_checkpoints(str(root), str(out), "x", str(trained), to), ms, tmp_path)
    needed = ms.rank_list_for_transform(0, str(trained), to)
    for seed in range(3):
        (tmp_path / f"by_rank_{seed}").mkdir()
        files = {
            rank: str(root / f"rank_{rank}" / "net.ckpt") for rank in random.Random(seed).sample(needed, len(needed))
        }
        compare(
            lambda m, out, files=files: m.transform_checkpoint_by_rank(0, files, str(out / "x.ckpt"), str(trained), to),
            ms,
            tmp_path / f"by_rank_{seed}",
        )


@pytest.mark.parametrize("target", [None, Shape(1, 2), Shape(1, 4)], ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_transformed_from_safetensors(source: Shape, target: Optional[Shape], ms: Any, tmp_path: Path) -> None:
    trained, wanted = tmp_path / "trained.ckpt", tmp_path / "wanted.ckpt"
    held = strategy(source, trained, 1)
    strategy(target, wanted, 2)
    assert held is not None
    root = checkpoint(ms, held, tmp_path / "held", "safetensors", 5)
    to = None if target is None else str(wanted)
    compare(
        lambda m, out: m.transform_checkpoints(str(root), str(out), "x", str(trained), to, 1, "ckpt"),
        ms,
        tmp_path,
        exact=source.stages == 1,
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_saved_by_a_load_without_network(target: Optional[Shape], ms: Any, tmp_path: Path) -> None:
    trained, wanted = tmp_path / "trained.ckpt", tmp_path / "wanted.ckpt"
    held = strategy(Shape(2, 2), trained, 1)
    strategy(target, wanted, 2)
    assert held is not None
    root = checkpoint(ms, held, tmp_path / "held", "safetensors", 5)
    ms.unified_safetensors(str(root), str(trained), str(tmp_path / "merged"))
    more = {"format": "safetensors", "unified_safetensors_dir": str(tmp_path / "merged"), "output_format": "ckpt"}
    for rank in {0, 0 if target is None else target.stages * target.devices - 1}:
        (tmp_path / str(rank)).mkdir()
        compare(
            lambda m, out, rank=rank: m.load_distributed_checkpoint(
                None,
                predict_strategy=None if target is None else str(wanted),
                dst_safetensors_dir=str(out),
                rank_id=rank,
                **more,
            ),
            ms,
            tmp_path / str(rank),
        )


def test_converted(ms: Any, tmp_path: Path) -> None:
    held = strategy(Shape(2, 1), tmp_path / "s.ckpt", 1)
    assert held is not None
    root = checkpoint(ms, held, tmp_path / "held", "safetensors", 5)
    compare(lambda m, out: m.safetensors_to_ckpt(str(root), str(out), {"p1.w": "a.w"}), ms, tmp_path)
