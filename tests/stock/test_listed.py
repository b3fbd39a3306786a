"""Into a network from the files of ranks: what the strategies list and no more, beside stock; and schedules."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.support.checkpoints import cut, strategy_of
from tests.support.parameters import bytes_of

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LISTED = {"a.w": np.arange(8, dtype=np.float32).reshape(4, 2), "b.w": np.arange(4, dtype=np.float32)}
OUTSIDE = {
    "learning_rate": np.linspace(0.5, 0.1, 5, dtype=np.float32),
    "opt.learning_rate_group_1": np.array(0.5, np.float32),
    "global_step": np.array([7], np.int32),
    "frozen": np.arange(3, dtype=np.float32),
}
WHOLE = ([1], [-1, -1], [], 0, True, "")
SHAPES = {name: array.shape for name, array in {**LISTED, **OUTSIDE}.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that cut `a.w` and list `b.w`; what lies outside is alike, but for the halves of a frozen matrix."""
    root = tmp_path_factory.mktemp("listed")
    strategy = strategy_of({"a.w": Layout((2,), ((0,), ())), "b.w": Layout((2,), ((),))}, root / "strategy.ckpt")
    cut(strategy, LISTED, root / "safetensors", OUTSIDE)
    ms_ckpt_ext.convert(root / "safetensors", root / "ckpt", to="ckpt")
    ms_ckpt_ext.unified_safetensors(root / "safetensors", root / "strategy.ckpt", root / "merged")
    halves = {rank: {**LISTED, **OUTSIDE, "frozen": np.full(3, rank, np.float32)} for rank in range(2)}
    for rank, held in halves.items():
        cut(strategy, held, root / f"half{rank}", {n: held[n] for n in OUTSIDE})
        (root / "own" / f"rank_{rank}").mkdir(parents=True)
        name = f"rank_{rank}/net.safetensors"
        (root / "own" / name).write_bytes((root / f"half{rank}" / name).read_bytes())
    ms_ckpt_ext.convert(root / "own", root / "own_ckpt", to="ckpt")
    return root


def network(ms: Any, **shapes: tuple[int, ...]) -> Any:
    """Parameters of -7, of the shapes that the checkpoint has."""
    cell = ms.nn.Cell()
    for number, (name, shape) in enumerate({**SHAPES, **shapes}.items()):
        dtype = {**LISTED, **OUTSIDE}[name].dtype
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(ms.Tensor(np.full(shape, -7, dtype)), name=name), False)
    return cell


def files(root: Path, folder: str = "ckpt") -> list[str]:
    return [str(root / folder / f"rank_{rank}" / "net.ckpt") for rank in range(2)]


@pytest.mark.parametrize("mode", [None, "direct", "cooperative"])
@pytest.mark.parametrize("folder", ["ckpt", "own_ckpt"])
@pytest.mark.parametrize("predict", [None, {"a.w": WHOLE}], ids=["no layouts", "layouts of one"])
@pytest.mark.parametrize("table", [5, 9])
def test_what_no_strategy_lists_stays(mode: Any, folder: str, predict: Any, table: int, ms: Any, root: Path) -> None:
    """Another schedule, or other halves of a frozen matrix, are no reason to refuse what is listed."""
    theirs, ours = network(ms, learning_rate=(table,)), network(ms, learning_rate=(table,))
    arguments = (files(root, folder), predict, str(root / "strategy.ckpt"))
    assert ms.load_distributed_checkpoint(theirs, *arguments) is True
    told = ms_ckpt_ext.load_distributed_checkpoint(ours, *arguments, mode=mode)
    assert bytes_of(ours) == bytes_of(theirs)
    assert bytes_of(ours)["a.w"] == LISTED["a.w"].tobytes() and bytes_of(ours)["frozen"] != OUTSIDE["frozen"].tobytes()
    kept = [*OUTSIDE] if predict is None else ["b.w", *OUTSIDE]
    assert told is True if mode is None else (sorted(told[0]), sorted(told[1])) == (sorted(kept), sorted(kept))


def test_the_log_names_what_stays(ms: Any, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        ms_ckpt_ext.load_distributed_checkpoint(network(ms), files(root), None, str(root / "strategy.ckpt"))
    assert "4 parameters keep the network's values, as the strategies do not list them: ['learning_rate'" in caplog.text


def test_what_a_map_names_is_asked_for(ms: Any, root: Path) -> None:
    cell = network(ms)
    cell.insert_param_to_cell("step", ms.Parameter(ms.Tensor([0], ms.int32), name="step"), False)
    arguments = (files(root), None, root / "strategy.ckpt")
    ms_ckpt_ext.load_distributed_checkpoint(cell, *arguments, name_map={"step": "global_step"}, mode="direct")
    assert bytes_of(cell)["step"] == OUTSIDE["global_step"].tobytes()
    assert bytes_of(cell)["global_step"] == bytes_of(network(ms))["global_step"]


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_merged_files_give_all_they_have(mode: str, ms: Any, root: Path) -> None:
    theirs, ours = network(ms), network(ms)
    source = {"format": "safetensors", "unified_safetensors_dir": str(root / "merged")}
    assert ms.load_distributed_checkpoint(theirs, **source) == ([], [])
    assert ms_ckpt_ext.load_distributed_checkpoint(ours, **source, mode=mode) == ([], [])
    assert (
        bytes_of(ours) == bytes_of(theirs) == {name: array.tobytes() for name, array in {**LISTED, **OUTSIDE}.items()}
    )


SCHEDULES = {"learning_rate": (9,), "opt.learning_rate_group_1": (2,)}


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_load_is_refused_for_a_schedule(
    mode: str, name: str, ms: Any, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A number or a table, longer or shorter: the network's stays, and the rest of the state is loaded."""
    shapes = {name: SCHEDULES[name]}
    expected = {n: a.tobytes() for n, a in {**LISTED, **OUTSIDE}.items()} | {
        name: bytes_of(network(ms, **shapes))[name]
    }
    merged, sharded = network(ms, **shapes), network(ms, **shapes)
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        told = ms_ckpt_ext.load_distributed_checkpoint(
            merged, format="safetensors", unified_safetensors_dir=root / "merged", mode=mode
        )
        state = ms_ckpt_ext.resume(
            sharded, None, root / "ckpt", train_strategy_filename=root / "strategy.ckpt", mode=mode
        )
    assert told == ([name], [name])
    assert (state.not_loaded, state.unused) == ((name,), (name,))
    assert bytes_of(merged) == bytes_of(sharded) == expected
    assert caplog.text.count(f"parameter {name!r} keeps the network's value") == 2


def test_other_shapes_are_refused_as_ever(ms: Any, root: Path) -> None:
    for name in ("frozen", "b.w"):
        cell = network(ms, **{name: (5,)})
        with pytest.raises(LayoutMismatchError, match=rf"{name!r} has shape \[5\]"):
            ms_ckpt_ext.load_distributed_checkpoint(
                cell, format="safetensors", unified_safetensors_dir=root / "merged", mode="direct"
            )
        assert bytes_of(cell) == bytes_of(network(ms, **{name: (5,)}))


def test_a_resume_says_what_it_restored(ms: Any, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ms_ckpt_ext"):
        ms_ckpt_ext.resume(network(ms), None, root / "ckpt", train_strategy_filename=root / "strategy.ckpt")
    assert "loaded as well, from outside the strategy: ['frozen', 'global_step', 'learning_rate', " in caplog.text
