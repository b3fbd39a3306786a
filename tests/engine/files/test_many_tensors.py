"""More tensors than the header of one file can list: parts are split, and where a file cannot be, nothing is written.

The format allows a header 100,000,000 bytes, a million tensors; here it is a thousandth of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ms_ckpt_ext import convert, load, load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats import safetensors
from tests.support.checkpoints import assert_nothing_complete, cut, read_merged, strategy_of, tree

COUNT = 2000
LIMIT = 100_000
FULL = {f"layer.{n}.wéight": np.full((4, 1), n, np.float32) for n in range(COUNT)}
"""Some 85 bytes in a header each, 170,000 in all."""


@pytest.fixture
def halves(tmp_path: Path) -> Strategy:
    """Two ranks that cut every parameter; in files of a format that has no such limit."""
    layout = Layout((2,), ((0,), ()))
    strategy = strategy_of(dict.fromkeys(FULL, layout), tmp_path / "strategy.ckpt")
    cut(strategy, FULL, tmp_path / "safetensors")
    convert(tmp_path / "safetensors", tmp_path / "shards", to="ckpt")
    return strategy


@pytest.fixture
def small_headers(halves: Strategy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "MAX_HEADER", LIMIT)
        yield


def header_bytes(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("naming", ["mindspore", "huggingface"])
@pytest.mark.parametrize("crc", [False, True])
def test_a_merge_splits_the_part(naming: str, crc: bool, small_headers: None, tmp_path: Path) -> None:
    unified_safetensors(tmp_path / "shards", tmp_path / "strategy.ckpt", tmp_path / "out", naming=naming, crc=crc)
    parts = sorted((tmp_path / "out").glob("*[0-9].safetensors"))
    assert len(parts) == 3 and max(map(header_bytes, parts)) <= LIMIT
    found, _ = read_merged(tmp_path / "out")
    assert {name: tensor.data for name, tensor in found.items()} == {n: a.tobytes() for n, a in FULL.items()}
    loaded = {name: array for part in parts for name, array in load_file(part).items()}
    assert loaded.keys() == FULL.keys()
    with load(tmp_path / "out") as held:
        assert held[f"layer.{COUNT - 1}.wéight"][...].tobytes() == FULL[f"layer.{COUNT - 1}.wéight"].tobytes()


def test_so_it_is_in_shares_and_again(small_headers: None, tmp_path: Path) -> None:
    for task in (1, 2, 2):
        unified_safetensors(tmp_path / "shards", tmp_path / "strategy.ckpt", tmp_path / "out", split_dst_file=(task, 2))
    found, _ = read_merged(tmp_path / "out")
    assert {name: tensor.data for name, tensor in found.items()} == {n: a.tobytes() for n, a in FULL.items()}


def test_a_merge_to_ckpt_has_no_such_limit(small_headers: None, tmp_path: Path) -> None:
    unified_safetensors(tmp_path / "shards", tmp_path / "strategy.ckpt", tmp_path / "out", output_format="ckpt")
    assert sorted(tree(tmp_path / "out")) == ["param_name_map.json", "part0.ckpt"]


def test_what_cannot_be_split_is_refused_before_a_byte_moves(small_headers: None, tmp_path: Path) -> None:
    said = rf"{COUNT} tensors in one safetensors file need a header of \d+ bytes, and the format allows {LIMIT}"
    with pytest.raises(UsageError, match=said):
        load_distributed_checkpoint(
            None, None, None, tmp_path / "strategy.ckpt", format="ckpt", output_format="safetensors",
            unified_safetensors_dir=tmp_path / "shards", dst_safetensors_dir=tmp_path / "out",
        )  # fmt: skip
    assert_nothing_complete(tmp_path / "out")
    unified_safetensors(tmp_path / "shards", tmp_path / "strategy.ckpt", tmp_path / "whole", output_format="ckpt")
    with pytest.raises(UsageError, match=said):
        convert(tmp_path / "whole", tmp_path / "out", to="safetensors")
    assert_nothing_complete(tmp_path / "out")


def test_scalars_of_a_merge_are_refused_too(small_headers: None, tmp_path: Path) -> None:
    """What is outside the strategy goes into one file, of a name that readers know."""
    strategy_of({"layer.0.wéight": Layout((2,), ((0,), ()))}, tmp_path / "one.ckpt")
    with pytest.raises(UsageError, match="tensors in one safetensors file need a header"):
        unified_safetensors(tmp_path / "shards", tmp_path / "one.ckpt", tmp_path / "out")
    assert_nothing_complete(tmp_path / "out")


def test_a_header_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    """The estimate is never too low, and hardly too high."""
    specs = [safetensors.TensorSpec(name, safetensors.DTYPES["F32"], a.shape) for name, a in FULL.items()]
    groups = safetensors.in_headers(specs)
    assert [len(group) for group in groups] == [COUNT]
    for group in (specs[:1], specs):
        laid = safetensors.layout(group, {spec.name: "Int4" for spec in group})
        assert len(laid.literals[0][1]) <= sum(map(safetensors._member_bytes, group)) + safetensors._MEMBER_BYTES
