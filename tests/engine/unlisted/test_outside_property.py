"""However a frozen parameter is cut, and whatever the job: exact, or an error that names it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext import load, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.ranks import same_cut
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.support.outside import Source, slices, source
from tests.support.outside_jobs import RECUTS, held_by, strategy_file
from tests.support.strategies import layouts

quick = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
BY_RANK = np.arange(64, dtype=np.int64)


def jobs(devices: int, stages: int) -> st.SearchStrategy[Strategy]:
    """Strategies of one parameter a stage, cut or whole, over any device matrix of so many devices."""
    matrices = [m for m in ((devices,), (2, devices // 2), (devices // 2, 2), (1, devices)) if prod(m) == devices]
    maps = [((), ()), ((0,), ()), ((), (0,))]
    cuts = st.sampled_from([Layout(matrix, cut) for matrix in matrices for cut in maps])
    return st.lists(cuts, min_size=stages, max_size=stages).map(
        lambda held: Strategy.from_items([LayoutItem(f"w{n}", n, layout) for n, layout in enumerate(held)], "it")
    )


@st.composite
def sources(draw: st.DrawFn) -> tuple[Strategy, Layout, np.ndarray]:
    """A strategy, and what it does not list: the layout of a frozen parameter, and the whole of it."""
    hidden = draw(layouts(2, 8))
    stages = draw(st.sampled_from([1, 1, 2]))
    shape = [parts * draw(st.integers(1, 3)) for parts in hidden.parts]
    return draw(jobs(hidden.devices, stages)), hidden, np.arange(prod(shape), dtype=np.float32).reshape(shape)


def saved(root: Path, job: Strategy, hidden: Layout, full: np.ndarray) -> Source:
    outside: dict[str, Any] = {"frozen": slices(hidden, full, hidden.devices), "state": lambda rank: BY_RANK[rank:][:1]}
    return source(root / "src", job, {**outside, "step": BY_RANK[7:8]})


@quick
@given(made=sources(), data=st.data())
@pytest.mark.parametrize("recut", RECUTS, ids=[recut.__name__ for recut in RECUTS])
def test_recut(recut: Any, made: Any, data: st.DataObject, tmp_path_factory: Any) -> None:
    job, hidden, full = made
    root = tmp_path_factory.mktemp("job")
    held = saved(root, job, hidden, full)
    target = data.draw(st.one_of(st.just(job), jobs(job.devices_per_stage, job.stages), jobs(4, job.stages)))
    dropped = data.draw(st.sampled_from([set(), {"state"}, {"state", "frozen"}]))
    differing = {"state", *(["frozen"] if len(set(hidden.cells)) > 1 else [])} if job.world > 1 else set()
    wanted = strategy_file(target, root / "dst.ckpt")
    same = same_cut(job, target)
    try:
        recut(held, root / "out", wanted, choice_func=lambda name: name not in dropped)
    except LayoutMismatchError as error:
        assert not same and any(f"'{name}'" in str(error) for name in differing - dropped)
        return
    assert same or not differing - dropped
    for rank in range(target.world):
        found = held_by(root / "out", rank)
        mine = {n: a.tobytes() for n, a in held.held[rank if same else 0].items() if n not in dropped}
        assert {name: found[name] for name in mine} == mine
        assert found.keys() - mine.keys() == set(target.names_of(rank))


@quick
@given(made=sources(), data=st.data())
def test_merge(made: Any, data: st.DataObject, tmp_path_factory: Any) -> None:
    job, hidden, full = made
    root = tmp_path_factory.mktemp("job")
    held = saved(root, job, hidden, full)
    supplied = data.draw(st.booleans())
    differing = {"state"} if job.world > 1 else set()
    cut = len(set(hidden.cells)) > 1
    if cut and not supplied and job.world > 1:
        differing.add("frozen")
    strategy = [held.strategy, {"frozen": hidden}] if supplied else held.strategy
    dropped = data.draw(st.sampled_from([set(), {"state"}, {"state", "frozen"}]))
    try:
        unified_safetensors(held.shards, strategy, root / "out", choice_func=lambda name: name not in dropped)
    except LayoutMismatchError as error:
        assert any(f"'{name}'" in str(error) for name in differing - dropped)
        return
    assert not differing - dropped
    with load(root / "out") as found:
        if supplied or not cut:
            assert ("frozen" in found) == (not supplied or "frozen" not in dropped)
        if "frozen" in found:
            assert found["frozen"][...].tobytes() == full.tobytes()
        assert found["step"][0] == 7
