"""Without a strategy, one rank's file passes for the whole model only when it can be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext import errors, transform_checkpoint_by_rank, unified_safetensors
from ms_ckpt_ext.api.jobs import merge
from tests.support.checkpoints import source


def one(tmp_path: Path, rank: int, notes: dict[str, str]) -> Path:
    """A rank folder that was taken out of many."""
    root = source(tmp_path / "src")
    folder = tmp_path / "alone" / f"rank_{rank}"
    folder.mkdir(parents=True)
    save_file(load_file(root / f"shards/rank_{rank}/net.safetensors"), folder / "net.safetensors", notes)
    return folder.parent


def opened(directory: Path, target: Path) -> list[Any]:
    return [
        lambda: unified_safetensors(directory, None, target),
        lambda: merge(directory, target),
        lambda: ms_ckpt_ext.load(directory),
        lambda: ms_ckpt_ext.inspect(directory),
    ]


@pytest.mark.parametrize("rank", [1, 3])
def test_another_rank_than_the_first(rank: int, tmp_path: Path) -> None:
    directory = one(tmp_path, rank, {"format": "ms"})
    for call in opened(directory, tmp_path / "out"):
        with pytest.raises(errors.DiscoveryError, match=f"only rank folder .*rank_{rank}.*strategy"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_first_rank_without_replicas(tmp_path: Path) -> None:
    directory = one(tmp_path, 0, {"format": "ms", "remove_redundancy": "True"})
    named = {0: directory / "rank_0/net.safetensors"}
    calls = opened(directory, tmp_path / "out")
    for call in [*calls, lambda: transform_checkpoint_by_rank(0, named, tmp_path / "out/net.ckpt")]:
        with pytest.raises(errors.DiscoveryError, match="rank_0.*remove_redundancy, so it lacks .*strategy"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("notes", [{"format": "ms"}, {"format": "ms", "remove_redundancy": "False"}])
def test_a_first_rank_that_holds_everything(notes: dict[str, str], tmp_path: Path) -> None:
    directory = one(tmp_path, 0, notes)
    assert unified_safetensors(directory, None, tmp_path / "out").published
    shutil.rmtree(tmp_path / "out")
    assert merge(directory, tmp_path / "out").published
