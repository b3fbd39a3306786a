"""Files of torch's distributed checkpoint: one rank's slices are not taken for whole tensors, by any function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, encrypt, load, load_distributed_checkpoint, unified_safetensors, verify
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, FormatError
from tests.support.checkpoints import assert_nothing_complete, strategy_of

RANK_1, RANK_2 = (f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2))
WHOLE = "model-00001-of-00001.safetensors"
SLICE = r"{}': tensor 'b' is a slice, which begins behind the beginning"
MAYBE = r"{}': tensor 'a.w' may be a slice, by the name of the file"


def save(path: Path, b: Sequence[int], info: Optional[str] = None, key: str = "DCP_SHARDING_INFO") -> Path:
    """Tensors `a.w` and `b` of [2, 3], of which `b` begins there in the whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    offsets = {"a.w": {"saved_offsets": [0, 0]}, "b": {"saved_offsets": b}}
    notes = {key: json.dumps(offsets) if info is None else info, "DCP_VERSION": "1.0", "format": "pt"}
    save_file({name: np.ones((2, 3), np.float32) for name in offsets}, path, notes)
    return path


@pytest.mark.parametrize(
    ("name", "offsets", "said"),
    [
        (RANK_2, [2, 0], SLICE),
        (RANK_2, [0, 30], SLICE),
        ("model.safetensors", [2, 0], SLICE),
        ("net-1_10.safetensors", [0, 1], SLICE),
        (RANK_1, [0, 0], MAYBE),
        (RANK_2, [0, 0], MAYBE),
    ],
)
def test_a_slice_is_no_tensor(name: str, offsets: list[int], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "in" / name, offsets)
    out = tmp_path / "out"
    calls: Mapping[str, Any] = {
        "load a file": lambda: load(path),
        "load a directory": lambda: load(path.parent),
        "cut": lambda: load_distributed_checkpoint(
            None, format="safetensors", unified_safetensors_dir=path.parent, dst_safetensors_dir=out
        ),
        "convert": lambda: convert(path, out / "x.ckpt", to="ckpt"),
        "verify": lambda: verify(path, path),
    }
    for call in calls.values():
        with pytest.raises(FormatError, match=said.format(name)) as caught:
            call()
        assert "consolidate_safetensors_files" in str(caught.value)
    assert_nothing_complete(out)


def test_nor_is_it_in_the_folder_of_a_rank(tmp_path: Path) -> None:
    """Whatever a strategy says of it: no MindSpore wrote this."""
    save(tmp_path / "in" / "rank_0" / "net.safetensors", [2, 0])
    strategy_of({name: Layout((1,), ((), ())) for name in ("a.w", "b")}, tmp_path / "strategy.ckpt")
    with pytest.raises(FormatError, match="tensor 'b' is a slice"):
        unified_safetensors(tmp_path / "in", tmp_path / "strategy.ckpt", tmp_path / "out")


def test_nor_where_an_index_lists_it(tmp_path: Path) -> None:
    save(tmp_path / RANK_1, [0, 0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"b": RANK_1, "a.w": RANK_1}}))
    with pytest.raises(FormatError, match="may be a slice"):
        load(tmp_path)


def test_several_ranks_are_told_to_be_joined(tmp_path: Path) -> None:
    for name, offsets in ((RANK_1, [0, 0]), (RANK_2, [2, 0])):
        save(tmp_path / name, offsets)
    with pytest.raises(DiscoveryError, match="by their names slices of torch's distributed checkpoint: join the files"):
        load(tmp_path)


@pytest.mark.parametrize("name", [WHOLE, "model.safetensors", "net-1_10.safetensors"])
def test_whole_tensors_are_read(name: str, tmp_path: Path) -> None:
    """As torch writes them from one process, or joins them."""
    path = save(tmp_path / name, [0, 0])
    for source in (path, path.parent):
        with load(source) as held:
            assert {key: value.shape for key, value in held.items()} == {"a.w": (2, 3), "b": (2, 3)}
    convert(path, tmp_path / "x.ckpt", to="ckpt")


def test_the_same_name_without_the_note_is_any_file(tmp_path: Path) -> None:
    with load(save(tmp_path / RANK_1, [2, 0], key="other")) as held:
        assert set(held) == {"a.w", "b"}


def test_what_is_copied_as_it_is_stays_what_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / RANK_2, [2, 0])
    encrypt(path, tmp_path / "sealed.safetensors", enc_key=bytes(16))
    with pytest.raises(FormatError, match="tensor 'b' is a slice"):
        load(tmp_path / "sealed.safetensors", dec_key=bytes(16))


@pytest.mark.parametrize(
    "info",
    [
        '{"b" : {\n"saved_offsets" : [ 0 ,\t2 ] } }',
        '{"b":{"more":1,"saved_offsets":[0,2]}}',
        '{"q\\"b":{"saved_offsets":[10]}}',
        '{"' + "[" * 100_000 + '":{"saved_offsets":[' + "0," * 100_000 + "2]}}",
    ],
)
def test_notes_in_any_form(info: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a slice, which begins behind"):
        load(save(tmp_path / "model.safetensors", [], info))
