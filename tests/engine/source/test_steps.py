"""A save that was cut short leaves ranks whose newest files are of different steps: no model, and an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import convert, load, load_distributed_checkpoint, transform_checkpoints, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import DiscoveryError
from tests.support.checkpoints import cut, read_merged, strategy_of


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """(shards, strategy, the whole) of two ranks; both saved step 10, one step 20."""
    strategy = strategy_of({"w": Layout((2,), ((0,),))}, tmp_path / "strategy.ckpt")
    whole = np.arange(8, dtype=np.float32)
    for name, value in (("net-1_20", -whole), ("net-1_10", whole)):
        cut(strategy, {"w": value}, tmp_path / name)
        for rank in (0, 1):
            (tmp_path / "src" / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
            saved = tmp_path / name / f"rank_{rank}" / "net.safetensors"
            saved.rename(tmp_path / "src" / f"rank_{rank}" / f"{name}.safetensors")
    (tmp_path / "src" / "rank_1" / "net-1_20.safetensors").unlink()
    return tmp_path / "src", tmp_path / "strategy.ckpt", whole


def merge(source: Path, strategy: Path, target: Path, **more: Any) -> None:
    unified_safetensors(source, strategy, target, **more)


def recut(source: Path, strategy: Path, target: Path, **more: Any) -> None:
    kinds = {"format": "safetensors", "unified_safetensors_dir": source, "dst_safetensors_dir": target}
    load_distributed_checkpoint(None, None, None, strategy, **kinds, **more)


def transform(source: Path, strategy: Path, target: Path, **more: Any) -> None:
    transform_checkpoints(source, target, "net", strategy, None, **more)


@pytest.mark.parametrize("job", [merge, recut, transform])
def test_a_mixture_is_refused(job: Callable[..., None], halves: tuple[Path, Path, Any], tmp_path: Path) -> None:
    source, strategy, _ = halves
    with pytest.raises(DiscoveryError, match=r"1_20 \(rank 0: .*\), 1_10 \(rank 1: .*of one step"):
        job(source, strategy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    job(source, strategy, tmp_path / "out", file_suffix="1_10")
    assert (tmp_path / "out").exists()


def test_files_by_name(halves: tuple[Path, Path, Any], tmp_path: Path) -> None:
    source, strategy, _ = halves
    convert(source, tmp_path / "ckpt", to="ckpt")
    files = [tmp_path / "ckpt" / "rank_0" / "net-1_20.ckpt", tmp_path / "ckpt" / "rank_1" / "net-1_10.ckpt"]
    out = {"dst_safetensors_dir": tmp_path / "out"}
    with pytest.raises(DiscoveryError, match="different epochs and steps"):
        load_distributed_checkpoint(None, files, None, strategy, **out)
    files[0] = files[0].with_name("net-1_10.ckpt")
    assert load_distributed_checkpoint(None, files, None, strategy, **out)


def test_a_prefix_that_ends_as_a_step_does(halves: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    source, strategy, whole = halves
    transform_checkpoints(source, tmp_path / "cut", "net-3_", strategy, strategy, file_suffix="1_10")
    assert (tmp_path / "cut" / "rank_1" / "net-3_1.ckpt").exists()
    merge(tmp_path / "cut", strategy, tmp_path / "out")
    assert read_merged(tmp_path / "out")[0]["w"].data == whole.tobytes()


def test_the_step_that_all_have(halves: tuple[Path, Path, np.ndarray], tmp_path: Path) -> None:
    source, strategy, whole = halves
    merge(source, strategy, tmp_path / "out", file_suffix="1_10")
    assert read_merged(tmp_path / "out")[0]["w"].data == whole.tobytes()
    with pytest.raises(DiscoveryError, match="different epochs and steps"):
        load(source, strategy)
