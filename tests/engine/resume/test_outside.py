"""`resume` and `load_for_inference` where ranks have things of their own outside the layouts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Union

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.api.resume import Restored
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import CheckpointError, LayoutMismatchError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.cells import HERE, POISON, cell, threads
from tests.support.outside import Source, listed, slices, source, whole
from tests.support.parameters import held_by

__all__ = ["threads"]
pytestmark = pytest.mark.usefixtures("threads")
FROZEN = np.arange(48, dtype=np.float32).reshape(8, 6)
OUTSIDE = {
    "frozen": slices(Layout((2,), ((0,), ())), FROZEN, 2),
    "seed": lambda rank: np.array(rank + 5, np.int64),
    "global_step": np.array([7], np.int32),
    "vector": lambda rank: np.arange(3, dtype=np.float32) + rank,
}
TWO = listed(2)


def saved(root: Path) -> Source:
    """What two ranks leave at step 7, as `ModelCheckpoint` names it."""
    made = source(root / "made", TWO, OUTSIDE)
    for rank in (0, 1):
        target = root / f"c/rank_{rank}/net-1_7.safetensors"
        target.parent.mkdir(parents=True)
        shutil.copy(made.file(rank), target)
    return made


def on_ranks(
    root: Path, target: Strategy, wanted: Callable[[int], Mapping[str, Any]], ranks: int, **options: Any
) -> list[tuple[Union[Restored, CheckpointError], Mapping[str, np.ndarray]]]:
    """Every rank's result and what its network holds then."""
    serve = options.pop("serve", False)
    function = ms_ckpt_ext.load_for_inference if serve else ms_ckpt_ext.resume

    def rank(transport: LocalTransport) -> Any:
        HERE.transport = transport
        made = cell(wanted(transport.rank))
        try:
            state: Any = function(
                made, checkpoint_dir=root / "c", predict_strategy=target, train_strategy_filename=root / "made.ckpt",
                timeout=20.0, **options,
            )  # fmt: skip
        except CheckpointError as error:
            state = error
        return state, held_by(made)

    return LocalWorld(ranks, timeout=20.0).run(rank)


def of_two(made: Source, *names: str) -> Callable[[int], Mapping[str, Any]]:
    def wanted(rank: int) -> Mapping[str, Any]:
        return {"w0.0": whole("w0.0")[24 * rank :][:24], **{name: made.held[rank][name] for name in names}}

    return wanted


@pytest.mark.parametrize("mode", ["direct", "cooperative", "auto"])
@pytest.mark.parametrize("serve", [False, True])
def test_the_same_ranks_go_on_with_their_own(mode: str, serve: bool, tmp_path: Path) -> None:
    made = saved(tmp_path)
    wanted = of_two(made, *OUTSIDE)
    for rank, (state, held) in enumerate(on_ranks(tmp_path, TWO, wanted, 2, mode=mode, serve=serve)):
        assert isinstance(state, Restored), state
        assert {name: array.tobytes() for name, array in held.items()} == {
            name: np.ascontiguousarray(array).tobytes() for name, array in wanted(rank).items()
        }
        assert state.step == 7 and state.scalars["seed"] == rank + 5
        assert set(state.scalars) == {"seed", "global_step"}, "no matrices, no vectors"


def test_other_ranks_hear_of_it(tmp_path: Path) -> None:
    saved(tmp_path)
    for state, held in on_ranks(tmp_path, listed(1), lambda _: {"w0.0": whole("w0.0"), "frozen": FROZEN}, 1):
        assert isinstance(state, LayoutMismatchError) and "'frozen'" in str(state)
        assert all((array == POISON).all() for array in held.values())


def test_other_ranks_that_do_not_want_it_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the step, which is alike, and a warning for the seed, which is not."""
    saved(tmp_path)
    wanted = lambda _: {"w0.0": whole("w0.0"), "global_step": np.array([0], np.int32)}  # noqa: E731
    ((state, held),) = on_ranks(tmp_path, listed(1), wanted, 1)
    assert isinstance(state, Restored), state
    assert state.step == 7 and set(state.scalars) == {"global_step"} and held["global_step"] == 7
    assert held["w0.0"].tobytes() == whole("w0.0").tobytes()
    assert any("['seed']" in message for message in caplog.messages)


def test_layouts_that_the_network_has(tmp_path: Path) -> None:
    """`frozen` listed by the target: a whole Parameter takes the slice, and a lost one is told."""
    made = saved(tmp_path)
    target = TWO._replace(layouts={**TWO.layouts, "frozen": {0: Layout((2,), ((0,), ()))}})
    got = on_ranks(tmp_path, target, lambda rank: {**of_two(made)(rank), "frozen": FROZEN}, 2)
    for rank, (state, held) in enumerate(got):
        assert isinstance(state, Restored), state
        assert held["frozen"].tobytes() == made.held[rank]["frozen"].tobytes()
    got = on_ranks(tmp_path, TWO, lambda rank: {**of_two(made)(rank), "lost": FROZEN}, 2)
    assert all("'lost'" in str(state) for state, _ in got)
