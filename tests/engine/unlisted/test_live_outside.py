"""What no strategy lists, loaded into Cells: each rank its own or an error by name, in every mode."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import CheckpointError, LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.cells import POISON, fill, load, threads
from tests.support.live_outside import FROZEN, MODES, NAMES, OUTSIDE, TARGET, assert_own, recorded, together, wanting
from tests.support.outside import Content, listed, source, whole

__all__ = ["threads"]
pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("mode", MODES)
def test_each_rank_takes_its_own(mode: str, tmp_path: Path) -> None:
    """All kinds at once: cut, of other shapes, scalars, booleans, without elements, and alike."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    got = fill(together(src), TARGET, wanting(src, NAMES, TARGET), 4, *MODES[mode])
    assert_own(got, src, NAMES)
    assert all(filled.missing == [] and filled.unused == [] for filled in got)
    for rank, filled in enumerate(got):
        box = TARGET.layouts["w0.0"][0].region(rank, whole("w0.0").shape)
        assert filled.held["w0.0"].tobytes() == whole("w0.0")[box.slices].tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [listed(2), listed(4, matrices=[(4, 1)]), None])
def test_other_ranks_are_told_why_not(mode: str, target: Any, tmp_path: Path) -> None:
    """Fewer ranks, as many with other slices, one device: an error by name on all of them, and nothing is changed."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    ranks = target.world if target else 1
    full = wanting(src, ("frozen",), target) if target else lambda _: {"w0.0": whole("w0.0"), "frozen": FROZEN}
    got = fill(together(src), target, full, ranks, *MODES[mode])
    for filled in got:
        assert isinstance(filled.error, CheckpointError)
        assert "'frozen'" in str(filled.error) and "ranks" in str(filled.error)
        assert all((array == POISON).all() for array in filled.held.values())
    assert any(isinstance(f.error, LayoutMismatchError) and "only_trainable_params" in str(f.error) for f in got)


@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_wants_is_no_obstacle(mode: str, tmp_path: Path) -> None:
    """A network without it takes the rest, on any number of ranks; alike is taken by all, cut where it is listed."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    layouts = {**listed(2).layouts, "shared": {0: Layout((2,), ((0,), ()))}}
    target = listed(2)._replace(layouts=layouts)
    shared = src.held[0]["shared"]

    def wanted(rank: int) -> Mapping[str, Any]:
        mine = shared[150 * rank : 150 * rank + 150]
        return {"shared": mine, "global_step": src.held[0]["global_step"], "w0.0": whole("w0.0")[24 * rank :][:24]}

    got = fill(together(src), target, wanted, 2, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert all(filled.held[name].tobytes() == array.tobytes() for name, array in wanted(rank).items())
        assert sorted(filled.unused) == sorted(set(OUTSIDE) - {"shared", "global_step"})


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_of_another_shape_hears_of_the_cause(mode: str, tmp_path: Path) -> None:
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    got = fill(together(src), TARGET, lambda rank: {"frozen": np.zeros((3, 6), np.float32)}, 4, *MODES[mode])
    told = [str(filled.error) for filled in got if isinstance(filled.error, LayoutMismatchError)]
    assert told and all("'frozen' has shape [3, 6]" in text and "does not list it" in text for text in told)


@pytest.mark.parametrize("mode", MODES)
def test_the_targets_layouts_list_it(mode: str, tmp_path: Path) -> None:
    """As layouts of a network do: a Parameter that is not sliced yet takes the slice, too."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    target = TARGET._replace(layouts={**TARGET.layouts, "frozen": {0: Layout((2, 2), ((0,), ()))}})
    got = fill(together(src), target, lambda rank: {"frozen": FROZEN if rank else FROZEN[:4]}, 4, *MODES[mode])
    assert_own(got, src, ("frozen",))


@pytest.mark.parametrize("mode", MODES)
def test_the_source_lists_it_when_it_is_told(mode: str, tmp_path: Path) -> None:
    """With its layout given it is a parameter like any other: cut for any job, and the copies are read once."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    full = load_strategy(str(src.strategy))
    full = full._replace(layouts={**full.layouts, "frozen": {0: Layout((2, 2), ((0,), ()))}})
    asked = together(src)._replace(strategy=full)
    target = listed(2)._replace(layouts={**listed(2).layouts, "frozen": {0: Layout((2,), ((), (0,)))}})
    got = fill(asked, target, lambda rank: {"frozen": FROZEN[:, 3 * rank :][:, :3]}, 2, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["frozen"].tobytes() == np.ascontiguousarray(FROZEN[:, 3 * rank :][:, :3]).tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("same", [True, False])
def test_the_target_lists_less_than_the_source(mode: str, same: bool, tmp_path: Path) -> None:
    """A target of trainable parameters only: the frozen one is the slice it was, or whole where it is wanted whole."""
    full = Strategy.from_items(
        [LayoutItem(name, 0, Layout((2,), ((0,), ()))) for name in ("w0.0", "w0.1")]
        + [LayoutItem("norm", 0, Layout((2,), ((), ())))],
        "s",
    )
    src = recorded(source(tmp_path / "src", full, {}))
    target = listed(2) if same else listed(1)
    mine = (lambda rank: whole("w0.1")[24 * rank :][:24]) if same else (lambda rank: whole("w0.1"))
    got = fill(together(src), target, lambda r: {"w0.1": mine(r), "norm": whole("norm")}, target.world, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["w0.1"].tobytes() == mine(rank).tobytes()
        assert filled.held["norm"].tobytes() == whole("norm").tobytes()
    half = fill(together(src), listed(1), lambda rank: {"w0.1": whole("w0.1")[:24]}, 1, *MODES[mode])[0].error
    assert isinstance(half, LayoutMismatchError) and "'w0.1'" in str(half) and "predict_strategy does not" in str(half)


@pytest.mark.parametrize("mode", MODES)
def test_stages_have_their_own(mode: str, tmp_path: Path) -> None:
    """Frozen in the second stage only; a Parameter of the first stage that goes by its name gets nothing."""
    two = listed(2, stages=2)
    src = recorded(source(tmp_path / "src", two, {"x": [None, None, FROZEN[:4], FROZEN[4:]]}))  # type: ignore[list-item]
    got = fill(together(src), two, wanting(src, ("x",), two), 4, *MODES[mode])
    for rank in (2, 3):
        assert got[rank].error is None and got[rank].held["x"].tobytes() == src.held[rank]["x"].tobytes()
    got = fill(together(src), two, lambda rank: {"x": FROZEN[:4]}, 4, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None
        assert filled.missing == (["x"] if rank < 2 else [])
        assert (filled.held["x"] == (POISON if rank < 2 else src.held[rank]["x"])).all()


@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_one_stage_each(mode: str, tmp_path: Path) -> None:
    """As networks of a job with pipeline stages give them: every rank knows its own stage."""
    two = listed(2, stages=2)
    src = recorded(source(tmp_path / "src", two, {"x": lambda rank: FROZEN + rank}))

    def of_stage(rank: int) -> Strategy:
        stage = rank // 2
        return two._replace(layouts={n: s for n, s in two.layouts.items() if stage in s}, stages=stage + 1)

    got = fill(together(src), of_stage, wanting(src, ("x",), two), 4, *MODES[mode])
    assert_own(got, src, ("x",))


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize(
    "supplied",
    [
        {"frozen": ((2, 2), (0, -1))},
        {"frozen": Layout((2, 2), ((0,), ()))},
        Strategy.from_items([LayoutItem("frozen", 0, Layout((2, 2), ((0,), ())))], "more"),
    ],
)
def test_layouts_that_are_supplied(mode: str, supplied: Any, tmp_path: Path) -> None:
    """Beside the strategy file, on either side: then it is cut as anything else is."""
    src = source(tmp_path / "src", TARGET, {"frozen": OUTSIDE["frozen"]})
    arguments = {
        "unified_safetensors_dir": src.shards, "train_strategy_filename": [src.strategy, supplied], "mode": mode,
        "predict_strategy": [listed(2), {"frozen": ((2,), (-1, 0))}],
    }  # fmt: skip
    got = load(lambda rank: {"frozen": FROZEN[:, 3 * rank :][:, :3]}, 2, **arguments)
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["frozen"].tobytes() == np.ascontiguousarray(FROZEN[:, 3 * rank :][:, :3]).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_names_that_begin_like_accumulated_gradients(mode: str, tmp_path: Path) -> None:
    """`accu_grads.w` is MindSpore's and ignored; a similar name is a parameter, listed or not."""
    layouts = {"accu_gradsX.v": {0: Layout((2,), ((0,), ()))}, "accu_grads.w0.0": {0: Layout((2,), ((0,), ()))}}
    target = listed(2)._replace(layouts={**listed(2).layouts, **layouts})
    held: dict[str, Content] = {
        "accu_gradsX.w": lambda rank: np.full(4, rank, np.float32),
        "accu_grads_scale": np.full(3, 5, np.float32),
        "accu_grads.other": lambda rank: np.zeros(2, np.float32),
    }
    src = recorded(source(tmp_path / "src", target, held))

    def wanted(rank: int) -> Mapping[str, Any]:
        mine = {n: src.held[rank][n] for n in ("accu_gradsX.w", "accu_grads_scale")}
        return {**mine, "accu_gradsX.v": whole("accu_gradsX.v")[24 * rank :][:24], "accu_grads.w0.0": FROZEN}

    for rank, filled in enumerate(fill(together(src), target, wanted, 2, *MODES[mode])):
        assert filled.error is None, filled.error
        expected = {**wanted(rank), "accu_grads.w0.0": np.full((8, 6), POISON, np.float32)}
        assert all(filled.held[name].tobytes() == array.tobytes() for name, array in expected.items())
        assert filled.missing == []
