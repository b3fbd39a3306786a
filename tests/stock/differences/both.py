"""Calls of stock MindSpore and of ours on equal inputs, for the rows of docs/differences.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.stock.fuzz import sides
from tests.support.checkpoints import cut, read_file, strategy_of
from tests.support.formats import contents

ROWS, COLUMNS, WHOLE = Layout((2,), ((0,), ())), Layout((2,), ((), (0,))), Layout((2,), ((), ()))


def by_stock(name: str, *args: Any, helped: bool = True, **named: Any) -> tuple[Any, list[BaseException]]:
    """Call a function of stock MindSpore, its processes inside this one: what it returns, and errors it hides."""
    silent: list[BaseException] = []
    paths = [str(value) if isinstance(value, Path) else value for value in args]
    named = {key: str(value) if isinstance(value, Path) else value for key, value in named.items()}
    with sides.stock(silent, helped) as functions, sides.quiet():
        return functions(name)(*paths, **named), silent


def staged(items: list[tuple[str, int, Layout]], path: Path) -> Strategy:
    """A strategy of several stages, written to `path` as well."""
    strategy = Strategy.from_items([LayoutItem(*item) for item in items], str(path))
    save_strategy(strategy, path)
    return strategy


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1


def network(ms: Any, parameters: Mapping[str, tuple[int, ...]]) -> Any:
    cell = ms.nn.Cell()
    for number, (name, shape) in enumerate(parameters.items()):
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(ms.Tensor(np.zeros(shape), ms.float32), name=name))
    return cell


def arrays(path: Path) -> dict[str, np.ndarray]:
    """F32 tensors of a file of either format."""
    found = read_file(path) if path.suffix == ".safetensors" else contents(path)
    return {name: np.frombuffer(t.data, np.float32).reshape(t.shape) for name, t in found.items() if t.dtype == "F32"}


def transformed(root: Path, **named: Any) -> tuple[dict[str, dict[str, np.ndarray]], ...]:
    """What stock and ours make of `src` between the strategies `s.ckpt` and `d.ckpt`: file -> its tensors."""
    for who in ("stock", "ours"):
        call = (root / "src", root / who, "n", root / "s.ckpt", root / "d.ckpt")
        if who == "stock":
            by_stock("transform_checkpoints", *call, **named)
        else:
            ms_ckpt_ext.transform_checkpoints(*call, **{k: v for k, v in named.items() if k != "helped"})
    return tuple(
        {path.parent.name: arrays(path) for path in (root / who).rglob("*") if path.suffix in (".ckpt", ".safetensors")}
        for who in ("stock", "ours")
    )


def loaded(layout: Layout, ms: Any, root: Path) -> tuple[Any, Any, list[str], dict[str, Any]]:
    """Two networks, and the call that loads `.ckpt` files of `layout` into one."""
    strategy = strategy_of({"w": layout}, root / "s.ckpt")
    source = cut(strategy, {"w": numbers(8, 2)}, root / "src")
    ms_ckpt_ext.convert(source, root / "ckpt", to="ckpt")
    files = [str(root / f"ckpt/rank_{rank}/net.ckpt") for rank in range(strategy.world)]
    stock, ours = (network(ms, {"w": (8, 2)}) for _ in range(2))
    return stock, ours, files, {"train_strategy_filename": root / "s.ckpt"}
