"""Layouts that are supplied beside a strategy that lacks them: what they list is cut, merged and read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import (
    CheckpointError,
    load,
    transform_checkpoint_by_rank,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from tests.support.outside import listed
from tests.support.outside_jobs import (
    FROZEN,
    Recut,
    held_by,
    lora,
    merges,
    recuts,
    strategy_file,
)

LAYOUT = ((4,), (0, -1))
FORMS = {
    "short": lambda _: {"frozen": LAYOUT},
    "nested": lambda _: {"frozen": ([2, 2], [[1, 0], [-1]])},
    "of a network": lambda _: {"frozen": ([4], [0, -1], [2, 6], 0, True, "", [8, 6])},
    "another file": lambda root: strategy_file(
        Strategy.from_items([LayoutItem("frozen", 0, Layout((4,), ((0,), ())))], "it"), root / "second.ckpt"
    ),
    "json": lambda root: strategy_file(
        Strategy.from_items([LayoutItem("frozen", 0, Layout((4,), ((0,), ())))], "it"), root / "second.json"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@recuts
def test_what_is_supplied_is_cut_exactly(recut: Recut, form: str, tmp_path: Path) -> None:
    held = lora(tmp_path)
    supplied = held._replace(strategy=[held.strategy, FORMS[form](tmp_path)])  # type: ignore[arg-type]
    wanted: Any = [strategy_file(listed(2), tmp_path / "dst.ckpt"), {"frozen": ((2,), (-1, 0))}]
    if "by_rank" in recut.__name__:
        for rank in range(2):
            one = tmp_path / "out" / f"rank_{rank}/net.safetensors"
            files = {r: held.file(r) for r in range(4)}
            transform_checkpoint_by_rank(rank, files, one, supplied.strategy, wanted)
    else:
        recut(supplied, tmp_path / "out", wanted)
    for rank in range(2):
        assert held_by(tmp_path / "out", rank)["frozen"] == FROZEN[:, 3 * rank : 3 * rank + 3].tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_supplied_is_merged_and_read_whole(form: str, tmp_path: Path) -> None:
    held = lora(tmp_path)
    both = [held.strategy, FORMS[form](tmp_path)]
    supplied = held._replace(strategy=both)  # type: ignore[arg-type]
    for number, merge in enumerate(merges(supplied, tmp_path / "out")[:4]):
        merge()
        with load(tmp_path / "out") as found:
            assert found["frozen"][...].tobytes() == FROZEN.tobytes(), number
        if number:
            assert ms_ckpt_ext.verify(held.shards, tmp_path / "out", strategy=both).ok
    with load(held.shards, both) as found:
        assert found["frozen"][3:7].tobytes() == FROZEN[3:7].tobytes()
    assert "frozen" not in ms_ckpt_ext.training_scalars(held.shards, both)


def test_messages_and_repeated_options_supply_too(tmp_path: Path) -> None:
    from ms_ckpt_ext.cli.main import main

    held = lora(tmp_path)
    second = FORMS["another file"](tmp_path)
    target = tmp_path / "out"
    code = main(["merge", str(held.shards), str(target), "--strategy", str(held.strategy), "--strategy", str(second)])
    assert code == 0
    with load(target) as found:
        assert found["frozen"][...].tobytes() == FROZEN.tobytes()


def test_what_is_supplied_may_not_contradict(tmp_path: Path) -> None:
    held = lora(tmp_path)
    for more, told in (
        ({"w0.0": ((4,), (-1, 0))}, r"'w0.0' \(pipeline stage 0\).*src.ckpt.*src_strategy_file\[1\]"),
        ({"frozen": ((8,), (0, -1))}, "'frozen'.*of 8 devices"),
        ({"frozen": 3}, r"src_strategy_file\[1\]: value of 'frozen' must be"),
        (None, r"src_strategy_file\[1\] must be a path or a dict"),
    ):
        with pytest.raises(CheckpointError, match=told):
            unified_safetensors(held.shards, [held.strategy, more], tmp_path / "out")
    with pytest.raises(CheckpointError, match="empty list"):
        unified_safetensors(held.shards, [], tmp_path / "out")
