"""What a file is: a checkpoint, a strategy, something else, or a pointer to what git-lfs did not fetch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, FormatError, StrategyError
from ms_ckpt_ext.formats.registry import Access, read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.formats.table import CHECKPOINT, FOREIGN, STRATEGY, kind_of
from tests.support.checkpoints import source

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 4976698672\n"


def safetensors(length: int) -> bytes:
    """One tensor under a header of this many bytes."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", length) + header.ljust(length) + bytes(4)


@pytest.mark.parametrize(
    ("name", "contents", "kind"),
    [
        ("a.ckpt", bytes.fromhex("0a0a"), CHECKPOINT),
        ("a.ckpt", b"", CHECKPOINT),
        ("a.ckpt", bytes(9), CHECKPOINT),  # torn
        ("a.ckpt", bytes.fromhex("d85e3a7f"), CHECKPOINT),  # encrypted
        ("a.ckpt", bytes.fromhex("08021204"), STRATEGY),
        ("a.ckpt", bytes.fromhex("08"), STRATEGY),
        ("a.ckpt", b'{"current_stage": 2, "parallel_layout_item": {}}', STRATEGY),
        ("a.ckpt", b"PK\x03\x04rest", FOREIGN),
        ("a.ckpt", b"\x80\x02}q\x00", FOREIGN),
        ("a.ckpt", safetensors(0x108), FOREIGN),
        ("a.ckpt", POINTER.encode(), CHECKPOINT),
        ("a.safetensors", safetensors(0x108), CHECKPOINT),
        ("a.safetensors", bytes.fromhex("08021204"), CHECKPOINT),
        ("a.json", b'{"parallel_layout_item": {}}', STRATEGY),
        ("a.json", b'{"weight_map": {}}', FOREIGN),
    ],
    ids=repr,
)
def test_what_a_file_is(name: str, contents: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    assert kind_of(str(path)) == kind


def test_a_header_of_any_length(tmp_path: Path) -> None:
    """The low byte of its length is that of every format once."""
    for length in range(0x100, 0x200, 8):
        path = tmp_path / f"{length}" / "net.safetensors"
        path.parent.mkdir()
        path.write_bytes(safetensors(length))
        assert list(ms_ckpt_ext.load(path.parent)) == ["w"]
        assert ms_ckpt_ext.inspect(path.parent).kind == "merged"


def test_what_is_no_checkpoint_is_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(safetensors(0x108))
    (tmp_path / "strategy.ckpt").write_bytes((source(tmp_path / "made") / "strategy.ckpt").read_bytes())
    (tmp_path / "v1-5.ckpt").write_bytes(b"PK\x03\x04archive")
    assert list(ms_ckpt_ext.load(tmp_path)) == ["w"]
    with pytest.raises(DiscoveryError, match=r"strategy.ckpt' is a strategy file, which has the same suffix"):
        ms_ckpt_ext.verify(tmp_path / "strategy.ckpt")
    with pytest.raises(FormatError, match=r"v1-5.ckpt' is not .* it is a zip archive, as PyTorch writes it"):
        ms_ckpt_ext.load(tmp_path / "v1-5.ckpt")


@pytest.mark.parametrize("name", ["model.safetensors", "net.ckpt"])
def test_a_pointer_of_git_lfs(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(POINTER)
    told = rf"{name}' is a git-lfs pointer to a file of 4976698672 bytes.*run `git lfs pull`"
    for call in (
        lambda: read_index(str(path)),
        lambda: read_index(str(path), Access(ms_ckpt_ext.load_key(b"k" * 16))),
        lambda: ms_ckpt_ext.load(path),
        lambda: ms_ckpt_ext.load(tmp_path),
        lambda: ms_ckpt_ext.inspect(path),
        lambda: ms_ckpt_ext.verify(path),
        lambda: ms_ckpt_ext.convert(path, tmp_path / "out", to={"net.ckpt": "safetensors"}.get(name, "ckpt")),
    ):
        with pytest.raises(FormatError, match=told):
            call()


def test_a_pointer_in_place_of_something_small(tmp_path: Path) -> None:
    (tmp_path / "strategy.ckpt").write_text(POINTER)
    with pytest.raises(StrategyError, match="is a git-lfs pointer"):
        load_strategy(tmp_path / "strategy.ckpt")
    (tmp_path / "model").mkdir()
    for part in (1, 2):
        (tmp_path / "model" / f"model-0000{part}-of-00002.safetensors").write_text(POINTER)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match="index.json' is a git-lfs pointer"):
        ms_ckpt_ext.load(tmp_path / "model")
