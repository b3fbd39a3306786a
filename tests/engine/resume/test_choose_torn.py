"""Checkpoints that are torn in any way are passed over, with the reason."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Callable

import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext.formats.registry import read_index
from tests.support.checkpoints import source
from tests.support.saved import look, no_note, save, step_of

Tear = Callable[[Path], None]


def cut_short(root: Path) -> None:
    path = root / "rank_2" / "net-1_20.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_short_and_noted(root: Path) -> None:
    cut_short(root)
    for held in (root / "ms_ckpt_ext" / "net-1_20.safetensors").glob("*.json"):
        content = json.loads(held.read_text())
        for record in content["ranks"]:
            record["size"] = (root / record["file"]).stat().st_size
        held.write_text(json.dumps(content))


def no_file(root: Path) -> None:
    (root / "rank_1" / "net-1_20.safetensors").unlink()


def no_note_and_no_file(root: Path) -> None:
    no_note(root)
    (root / "rank_3" / "net-1_20.safetensors").unlink()


def broken_note(root: Path) -> None:
    (root / "ms_ckpt_ext" / "net-1_20.safetensors" / "complete.json").write_text('{"format": 1}')


def no_layouts(root: Path) -> None:
    shutil.rmtree(root / "ms_ckpt_ext" / "net-1_20.safetensors" / "strategy")


def broken_layouts(root: Path) -> None:
    (root / "ms_ckpt_ext" / "net-1_20.safetensors" / "strategy" / "stage_0.ckpt").write_bytes(b"\x08\xff\xff")


def other_layouts(root: Path) -> None:
    small = source(root.parent / "small", names=("other.w", "more.w"))
    target = root / "ms_ckpt_ext" / "net-1_20.safetensors" / "strategy" / "stage_0.ckpt"
    shutil.copy(small / "strategy.ckpt", target)


def older_note_of_a_rank(root: Path) -> None:
    folder = root / "ms_ckpt_ext" / "net-1_20.safetensors"
    (folder / "complete.json").unlink()
    held = json.loads((folder / "rank_1.json").read_text())
    held["ranks"][0]["step"] = 10
    (folder / "rank_1.json").write_text(json.dumps(held))


def a_slice_is_nowhere(root: Path) -> None:
    """`b.w` is cut in two by tensor parallelism: ranks 0 and 2 hold the same half."""
    for rank in (0, 2):
        path = root / f"rank_{rank}" / "net-1_20.safetensors"
        save_file({name: array for name, array in load_file(path).items() if name != "b.w"}, path)
        for held in (root / "ms_ckpt_ext" / "net-1_20.safetensors").glob("*.json"):
            content = json.loads(held.read_text())
            for record in content["ranks"]:
                record["size"] = (root / record["file"]).stat().st_size
            held.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("tear", "reason"),
    [
        (cut_short, "rank_2/net-1_20.safetensors.* bytes, and .* was saved with"),
        (cut_short_and_noted, "rank_2.*net-1_20.safetensors"),
        (no_file, "files of rank 1 are gone"),
        (no_note_and_no_file, "files of rank 3 are gone|files of rank 3 of 4 are missing"),
        (broken_note, "not a checkpoint's record"),
        (no_layouts, "no layouts"),
        (broken_layouts, "stage_0.ckpt"),
        (other_layouts, "no parameter in common"),
        (older_note_of_a_rank, "different steps"),
        (a_slice_is_nowhere, "no file holds the slices of parameter 'b.w' that ranks 0, 2"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_torn_ones_are_skipped_and_the_reason_is_told(
    tear: Tear, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20)
    tear(tmp_path / "c")
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 3
    assert [name for name, _ in skipped] == ["net-1_20.safetensors"]
    assert re.search(reason, skipped[0].reason), skipped
    told = [r.getMessage() for r in caplog.records if "is skipped" in r.getMessage()]
    assert len(told) == 1 and skipped[0].reason in told[0]


def test_a_flipped_byte_shows_in_the_digests(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20)
    path = tmp_path / "c" / "rank_1" / "net-1_20.safetensors"
    raw = bytearray(path.read_bytes())
    raw[read_index(str(path)).tensors["a.w"].extents[0].offset] ^= 1
    path.write_bytes(raw)
    assert step_of(look(tmp_path / "c")[0]) == 20
    chosen, skipped = look(tmp_path / "c", digests=True)
    assert step_of(chosen) == 3
    assert "the manifest says" in skipped[0].reason and "net-1_20" in skipped[0].reason
