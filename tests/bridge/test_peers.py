"""Ranks that lost what their Parameters held, among others that did not: dp 2, tp 2, two parameters cut four ways."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import resume
from ms_ckpt_ext.api.resume import Restored
from ms_ckpt_ext.errors import CheckpointError, DisagreementError, DiscoveryError, LayoutMismatchError, UsageError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.cells import HERE, cell, threads  # noqa: F401 - a fixture
from tests.support.checkpoints import read_file
from tests.support.parameters import held_by
from tests.support.saved import RANKS, save

pytestmark = pytest.mark.usefixtures("threads")
STEP = 3
_NUMPY = {"F32": np.float32, "I32": np.int32}
SLICE = 64 * 32 * 4 // 4
"""Bytes of a quarter of a parameter. A rank has one of `a.w` and of `c.w`, which no other has, and half of `b.w`; of
that ranks 0 and 2 have the same, and so have 1 and 3. `d.w` is whole everywhere."""


class Ended(NamedTuple):
    """What a rank ended with."""

    held: Mapping[str, bytes]
    restored: Optional[Restored]
    error: Optional[CheckpointError]


def saved(root: Path, rank: int, step: int = STEP) -> dict[str, np.ndarray]:
    """What the job that saved held, as arrays."""
    held = read_file(root.parent / f"made_{step}" / "shards" / f"rank_{rank}" / "net.safetensors")
    return {name: np.frombuffer(t.data, _NUMPY[t.dtype]).reshape(t.shape) for name, t in held.items()}


def contents(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def go_on(
    root: Path,
    lost: Collection[int],
    step: Callable[[int], Optional[int]] = lambda rank: STEP,
    alive: Callable[[bool], Optional[bool]] = bool,
    leave: Collection[str] = (),
    **more: Any,
) -> list[Ended]:
    """`resume` on every rank; those that are lost hold wrong values. `leave`: Parameters that no network has."""

    def rank(transport: LocalTransport) -> Ended:
        HERE.transport = transport
        good = transport.rank not in lost
        values = {n: a for n, a in saved(root, transport.rank).items() if n not in leave}
        made = cell(values)
        if good:
            for parameter in made.get_parameters():
                parameter.asnumpy()[...] = values[parameter.name]
        restored, error = None, None
        try:
            restored = resume(
                made,
                checkpoint_dir=root,
                predict_strategy=root.parent / f"made_{STEP}" / "strategy.ckpt",
                alive=alive(good),
                alive_step=step(transport.rank) if good else None,
                **more,
            )
        except CheckpointError as problem:
            error = problem
        return Ended(contents(held_by(made)), restored, error)

    return LocalWorld(RANKS, timeout=20).run(rank)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "ckpt", STEP)
    return tmp_path / "ckpt"


@pytest.mark.parametrize(
    ("lost", "nowhere"),
    [
        ({2}, {2: 2}),
        ({0, 1}, {0: 2, 1: 2}),
        ({0, 2}, {0: 4, 2: 4}),
        ({1, 2, 3}, {1: 4, 2: 2, 3: 4}),
    ],
)
@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_only_what_no_rank_holds_is_read(
    lost: set[int], nowhere: Mapping[int, int], mode: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`nowhere`: by rank, how many quarters of it no rank holds. What others hold is wrong in the files."""
    caplog.set_level(logging.INFO, "ms_ckpt_ext")
    for path in root.glob("rank_*/*.safetensors"):
        held = {name: np.frombuffer(t.data, _NUMPY[t.dtype]).reshape(t.shape) for name, t in read_file(path).items()}
        wrong = {name: np.full_like(held[name], 99) for name in ("d.w", "learning_rate")}
        save_file({**held, **wrong}, path, {"format": "ms"})
    ended = go_on(root, lost, mode=mode)
    for rank, (got, restored, error) in enumerate(ended):
        assert error is None
        assert got == contents(saved(root, rank))
        assert restored is not None and restored.step == STEP and not restored.not_loaded
        whole = sum(len(data) for data in got.values())
        assert restored.bytes_from_peers == (whole - nowhere[rank] * SLICE if rank in lost else 0)
        if mode == "direct":
            assert (restored.bytes_read > 0) == (rank in lost)
    told = f"all ranks {sum(e.restored.bytes_from_peers for e in ended if e.restored)} and "
    assert told + str(sum(e.restored.bytes_read for e in ended if e.restored)) in caplog.text


def test_the_network_says_its_step(root: Path) -> None:
    """`global_step` is 7 more than what the file's name says, and the records count."""
    ended = go_on(root, {2}, step=lambda rank: None)
    assert all("of step 10" in str(each.error) and "is of step 3" in str(each.error) for each in ended)
    assert all(isinstance(each.error, LayoutMismatchError) for each in ended)


def test_a_checkpoint_of_another_step_is_not_mixed_in(root: Path) -> None:
    ended = go_on(root, {2}, step=lambda rank: 5)
    for rank, (held, _, error) in enumerate(ended):
        assert isinstance(error, LayoutMismatchError)
        assert "'a.w'" in str(error) and "rank 2" in str(error) and "step 5" in str(error) and "step 3" in str(error)
        assert (held == contents(saved(root, rank))) == (rank != 2)
        assert rank != 2 or set(held["d.w"]) == set(np.float32(77).tobytes()), "nothing was changed"


def test_what_others_hold_needs_no_checkpoint(root: Path) -> None:
    """Without the two that are cut four ways all is held by others: no file is looked at, whatever its step is."""
    for path in root.glob("rank_*/*.safetensors"):
        path.unlink()
    for rank, (held, restored, error) in enumerate(go_on(root, {0, 1}, step=lambda rank: 5, leave={"a.w", "c.w"})):
        expected = {name: data for name, data in contents(saved(root, rank)).items() if name not in ("a.w", "c.w")}
        assert error is None and held == expected
        assert restored is not None and (restored.mode, restored.step) == ("peers", 5) and restored.checkpoint is None


def test_what_is_lost_everywhere_needs_a_checkpoint(root: Path) -> None:
    for path in root.glob("rank_*/*.safetensors"):
        path.unlink()
    ended = go_on(root, {2})
    assert all(isinstance(each.error, DiscoveryError) and "'a.w'" in str(each.error) for each in ended)


def test_survivors_of_different_steps_are_refused(root: Path) -> None:
    ended = go_on(root, {2}, step=lambda rank: 3 + rank // 3)
    for rank, (held, _, error) in enumerate(ended):
        assert isinstance(error, LayoutMismatchError)
        assert "ranks 0, 1: step 3; rank 3: step 4" in str(error)
        assert (held == contents(saved(root, rank))) == (rank != 2)


def test_a_step_that_nothing_tells_is_asked_for(root: Path) -> None:
    ended = go_on(root, {2}, step=lambda rank: None, leave={"global_step"})
    assert any(isinstance(each.error, UsageError) and "alive_step" in str(each.error) for each in ended)
    assert all(each.error is not None for each in ended)


def test_all_are_asked_or_none(root: Path) -> None:
    ended = go_on(root, {2}, step=lambda rank: None, alive=lambda good: None if good else False)
    assert all(isinstance(each.error, DisagreementError) and "alive" in str(each.error) for each in ended)


def test_no_rank_is_good(root: Path) -> None:
    for rank, (held, restored, error) in enumerate(go_on(root, range(RANKS))):
        assert error is None and held == contents(saved(root, rank))
        assert restored is not None and restored.step == STEP and restored.bytes_from_peers == 0


def test_all_are_good(root: Path) -> None:
    for rank, (held, restored, error) in enumerate(go_on(root, ())):
        assert error is None and held == contents(saved(root, rank))
        assert restored is not None and (restored.mode, restored.bytes_read, restored.bytes_from_peers) == (
            "peers",
            0,
            0,
        )


@pytest.mark.parametrize(
    ("more", "told"),
    [({"alive": "yes"}, "alive"), ({"alive": True, "alive_step": -1}, "alive_step"), ({"alive_step": 3}, "alive=True")],
)
def test_wrong_words(more: dict[str, Any], told: str, root: Path) -> None:
    def rank(transport: LocalTransport) -> None:
        HERE.transport = transport
        with pytest.raises(CheckpointError, match=told):
            resume(cell(saved(root, 0)), checkpoint_dir=root, **more)

    LocalWorld(1, timeout=20).run(rank)
