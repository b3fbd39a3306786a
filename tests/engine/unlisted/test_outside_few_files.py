"""What no strategy lists, where not all ranks' files are given: compared where that tells, else refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import (
    load,
    transform_checkpoint_by_rank,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.support.checkpoints import read_file
from tests.support.outside import Source, listed, slices, source
from tests.support.outside_jobs import (
    RNG,
    STEP,
    reshard,
    strategy_file,
    transform,
)


def one_of(root: Path, frozen: Any) -> tuple[Source, dict[int, Path], Path]:
    """All that is listed is whole, so one file has it; of a large tensor that is not listed one file tells nothing."""
    whole = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2, 2), ((), ())))], "it")
    table = np.linspace(0, 1, 9, dtype=np.float32)
    held = source(root / "src", whole, {"frozen": frozen, "global_step": STEP, "learning_rate": table})
    copies = {rank: root / f"copy_of_{'abcd'[rank]}.safetensors" for rank in range(4)}
    for rank, path in copies.items():
        path.write_bytes(held.file(rank).read_bytes())
    return held, copies, strategy_file(listed(2), root / "dst.ckpt")


LARGE = RNG.standard_normal((4096, 6), np.float32)


@pytest.mark.parametrize(
    ("given", "more"),
    [([0], "ranks 1, 2"), ([0, 1], "rank 2"), ([0, 2], "rank 1"), ([1, 3], "ranks 0, 2"), ([0, 1, 2], "")],
)
def test_too_few_files_to_tell(given: list[int], more: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, copies, wanted = one_of(tmp_path, LARGE)
    arguments: Any = {rank: copies[rank] for rank in given}, tmp_path / "net.safetensors", held.strategy, wanted
    if more:
        told = f"'frozen'.*too few ranks' files.*give the file of {more} as well"
        with pytest.raises(LayoutMismatchError, match=told):
            transform_checkpoint_by_rank(0, *arguments)
        transform_checkpoint_by_rank(0, *arguments, choice_func=lambda name: name != "frozen")
        assert "'learning_rate'" in caplog.text and "taken for all" in caplog.text
    else:
        transform_checkpoint_by_rank(0, *arguments)
        assert read_file(tmp_path / "net.safetensors")["frozen"].data == LARGE.tobytes()
    assert read_file(tmp_path / "net.safetensors")["global_step"].data == STEP.tobytes()
    assert "global_step" not in caplog.text


@pytest.mark.parametrize("given", [[0], [0, 1], [3]])
def test_files_beside_tell(given: list[int], tmp_path: Path) -> None:
    """Files of other ranks lie where the names of the given ones say: they are compared, and nothing else."""
    held, _, wanted = one_of(tmp_path, LARGE)
    arguments: Any = {r: held.file(r) for r in given}, tmp_path / "net.safetensors", held.strategy, wanted
    transform_checkpoint_by_rank(0, *arguments)
    assert read_file(tmp_path / "net.safetensors")["frozen"].data == LARGE.tobytes()
    for cut in (((1,), ()), ((0,), ())):  # along an axis on which the given ones are alike, or differ
        held, _, wanted = one_of(tmp_path / str(cut), slices(Layout((2, 2), cut), LARGE, 4))
        arguments = {r: held.file(r) for r in given}, tmp_path / "cut.safetensors", held.strategy, wanted
        with pytest.raises(LayoutMismatchError, match="'frozen' is not in .*files differ"):
            transform_checkpoint_by_rank(0, *arguments)
    held.file(2).write_bytes(b"no checkpoint")
    with pytest.raises(LayoutMismatchError, match="'frozen'"):
        transform_checkpoint_by_rank(0, *arguments)


def test_a_lone_folder_of_several_ranks(tmp_path: Path) -> None:
    import shutil

    held, _, wanted = one_of(tmp_path, LARGE)
    for rank in (1, 2, 3):
        shutil.rmtree(held.shards / f"rank_{rank}")
    for job in (
        lambda: unified_safetensors(held.shards, held.strategy, tmp_path / "out"),
        lambda: transform(held, tmp_path / "out", wanted),
        lambda: reshard(held, tmp_path / "out", wanted),
    ):
        with pytest.raises(LayoutMismatchError, match="'frozen'.*ranks 1, 2 as well"):
            job()
    unified_safetensors(held.shards, held.strategy, tmp_path / "out", choice_func=lambda name: name != "frozen")
    both: Any = [held.strategy, {"frozen": ((4,), (-1, -1))}]
    unified_safetensors(held.shards, both, tmp_path / "out")
    with load(tmp_path / "out") as found:
        assert found["frozen"][...].tobytes() == LARGE.tobytes()
