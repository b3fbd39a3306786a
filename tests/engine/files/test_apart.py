"""Results never land where the source's ranks have their files, whichever function writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

from ms_ckpt_ext import (
    ckpt_to_safetensors,
    load_distributed_checkpoint,
    transform_checkpoint_by_rank,
    transform_checkpoints,
)
from ms_ckpt_ext.api.jobs import merge, reshard
from ms_ckpt_ext.errors import UsageError
from tests.support.checkpoints import read_file, source, tree


def files_of(root: Path, ranks: int = 4) -> dict[int, str]:
    return {rank: str(root / f"shards/rank_{rank}/net.safetensors") for rank in range(ranks)}


def by_rank(root: Path, path: Path) -> Any:
    return transform_checkpoint_by_rank(0, files_of(root), path, root / "strategy.ckpt", root / "strategy.ckpt")


def transform(root: Path, target: Path, form: str) -> Any:
    known = root / "strategy.ckpt"
    return transform_checkpoints(root / "shards", target, "net-9_9_", known, known, output_format=form)


CALLS: dict[str, Callable[[Path], Any]] = {
    "transform, same format": lambda root: transform(root, root / "shards", "safetensors"),
    "transform, other format": lambda root: transform(root, root / "shards", "ckpt"),
    "by rank, beside the shard": lambda root: by_rank(root, root / "shards/rank_0/new.ckpt"),
    "by rank, a folder that is not there": lambda root: by_rank(root, root / "shards/rank_9/new.ckpt"),
    "merge": lambda root: merge(root / "shards", root / "shards/rank_7", strategy=root / "strategy.ckpt"),
    "reshard": lambda root: reshard(root / "shards", root / "shards", strategy=root / "strategy.ckpt", rank=0),
}


@pytest.mark.parametrize("call", CALLS)
def test_into_the_rank_folders(call: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    before = tree(root)
    with pytest.raises(UsageError, match="rank_.* is a rank folder of the source, .*choose another target"):
        CALLS[call](root)
    assert tree(root) == before


def one_rank(root: Path) -> Path:
    """A checkpoint that one rank saved whole."""
    made = source(root / "made", names=("a.w",))
    merge(made / "shards", root / "whole", strategy=made / "strategy.ckpt")
    (root / "src/rank_0").mkdir(parents=True)
    (root / "whole/part0.safetensors").rename(root / "src/rank_0/net.safetensors")
    return root / "src"


def test_one_rank_alone(tmp_path: Path) -> None:
    shards = one_rank(tmp_path)
    for target in (shards, tmp_path / "link"):
        if target != shards:
            target.symlink_to(shards)
        with pytest.raises(UsageError, match="rank_0' is a rank folder of the source"):
            load_distributed_checkpoint(
                None, format="safetensors", unified_safetensors_dir=shards, dst_safetensors_dir=target
            )
    with pytest.raises(UsageError, match="rank_1' is a rank folder of the source"):
        transform_checkpoint_by_rank(0, {0: shards / "rank_0/net.safetensors"}, shards / "rank_1/net.ckpt")


def test_a_rank_folder_that_is_a_link(tmp_path: Path) -> None:
    shards = one_rank(tmp_path)
    (shards / "rank_0").rename(tmp_path / "elsewhere")
    (shards / "rank_0").symlink_to(tmp_path / "elsewhere")
    file = {0: shards / "rank_0/net.safetensors"}
    for folder in (shards / "rank_1", shards / "rank_0"):
        with pytest.raises(UsageError, match="is a rank folder of the source"):
            transform_checkpoint_by_rank(0, file, folder / "new.ckpt")


def test_beside_a_source_that_no_rank_owns(tmp_path: Path) -> None:
    """What MindSpore's users do: one file to another beside it, a merge above the rank folders, formats in place."""
    shards = one_rank(tmp_path)
    whole = read_file(shards / "rank_0/net.safetensors")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.safetensors").write_bytes((shards / "rank_0/net.safetensors").read_bytes())
    transform_checkpoint_by_rank(0, {0: tmp_path / "flat/a.safetensors"}, tmp_path / "flat/b.safetensors")
    assert read_file(tmp_path / "flat/b.safetensors") == whole
    transform_checkpoint_by_rank(0, {0: tmp_path / "flat/a.safetensors"}, tmp_path / "flat/b.ckpt")
    ckpt_to_safetensors(tmp_path / "flat/b.ckpt", tmp_path / "flat")
    root = source(tmp_path / "many")
    merge(root / "shards", root / "shards", strategy=root / "strategy.ckpt")
    assert (root / "shards/param_name_map.json").exists()
