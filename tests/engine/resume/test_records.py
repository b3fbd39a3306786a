"""Notes beside a checkpoint: when it is complete, what belongs to it, and which notes contradict themselves."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.engine.resume.records import forget_deleted, read_records
from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import arrays, cut, source
from tests.support.saved import note, save


def test_complete_is_said_when_all_ranks_have_noted(tmp_path: Path) -> None:
    strategy = load_strategy(source(tmp_path / "made", seed=1) / "strategy.ckpt")
    cut(strategy, arrays(1), tmp_path / "c")
    told = [
        note(tmp_path / "c" / f"rank_{rank}" / "net.safetensors", rank, 5, strategy if rank == 0 else None)
        for rank in (2, 0, 3, 1)
    ]
    assert told == [False, False, False, True]
    assert [record.rank for record in read_records(str(tmp_path / "c"), "net.safetensors")] == [0, 1, 2, 3]
    again = tmp_path / "c" / "rank_1" / "net.safetensors"
    assert not note(again, 1, 6, None), "the others have not saved step 6"
    assert not (tmp_path / "c" / "ms_ckpt_ext" / "net.safetensors" / "complete.json").exists()


def test_records_of_deleted_checkpoints_go(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20)
    os.unlink(tmp_path / "c" / "rank_1" / "net-1_3.safetensors")
    forget_deleted(str(tmp_path / "c"), 0)
    assert len(os.listdir(tmp_path / "c" / "ms_ckpt_ext")) == 2
    forget_deleted(str(tmp_path / "c"), 1)
    assert os.listdir(tmp_path / "c" / "ms_ckpt_ext") == ["net-1_20.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 4},
        {"file": "../../etc/passwd"},
        {"file": "/etc/passwd"},
        {"size": "1"},
        {"surprise": 1},
        {"world": None},
    ],
    ids=str,
)
def test_records_that_make_no_sense(change: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    path = tmp_path / "c" / "ms_ckpt_ext" / "net-1_3.safetensors" / "complete.json"
    content = json.loads(path.read_text())
    content["ranks"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="not a checkpoint's record"):
        read_records(str(tmp_path / "c"), "net-1_3.safetensors")
