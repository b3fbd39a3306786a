"""Killed while publishing: the next job of any kind finishes that first, and no result is ever a mixture."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import pytest

from ms_ckpt_ext import CheckpointError, convert, training_scalars, transform_checkpoint_by_rank, unified_safetensors
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import load_manifest
from ms_ckpt_ext.errors import StorageError
from ms_ckpt_ext.storage.publishing import OBSTACLE, is_unfinished
from tests.support.checkpoints import assert_merged, merge, read_merged, source, tree
from tests.support.dying import (
    Before,
    behind,
    changes_names,
    killed,
    never,
    notes_what_to_publish,
    nth,
    puts_on_record,
    removes,
    survives,
)
from tests.support.formats import write_ckpt
from tests.support.machine import booted

PARTS = {"part_bytes": 9000}


def moves_into(target: Path) -> Before:
    """A file of a result is about to have its place in this very folder."""
    return lambda name, args: name == "rename" and Path(args[1]).parent == target


def cut(root: Path, target: Path, **more: Any) -> Any:
    strategy = root / "strategy.ckpt"
    return reshard(root / "shards", target, strategy=strategy, to_strategy=strategy, **more)


def by_rank(root: Path, target: Path, rank: int) -> Any:
    files = {each: root / f"shards/rank_{each}/net.safetensors" for each in range(4)}
    strategy = root / "strategy.ckpt"
    return transform_checkpoint_by_rank(rank, files, target / f"r{rank}.safetensors", strategy, strategy)


def killed_while_moving(root: Path, target: Path, moves: int, **more: Any) -> None:
    """A merge that dies after `moves` of its files are in place."""
    killed(lambda: merge(root, target, **PARTS, **more), nth(moves + 1, moves_into(target)))
    assert (target / OBSTACLE).exists() and is_unfinished(target / "param_name_map.json")
    with pytest.raises(CheckpointError):
        training_scalars(target)


OTHERS: dict[str, Callable[[Path, Path], Any]] = {
    "a re-cut": cut,
    "one rank": lambda root, target: by_rank(root, target, 2),
    "a conversion": lambda root, target: convert(root / "shards/rank_0/net.safetensors", target, to="ckpt"),
    "the same": lambda root, target: merge(root, target, **PARTS),
}


@pytest.mark.parametrize("moves", [0, 1, 3])
@pytest.mark.parametrize("other", OTHERS)
def test_another_job_finishes_what_was_begun(other: str, moves: int, tmp_path: Path) -> None:
    """The merge is whole, nothing of the older one is left, and the other job's files are there as well."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target, part_bytes=4500)
    merge(root, tmp_path / "expected", **PARTS)
    killed_while_moving(root, target, moves)
    OTHERS[other](root, target)
    OTHERS[other](root, tmp_path / "alone")
    assert tree(target) == {**tree(tmp_path / "alone"), **tree(tmp_path / "expected")}
    assert not (target / ".ms_ckpt_ext").exists()
    assert check_digests(str(target), load_manifest(str(target)) or pytest.fail("no manifest")) == []
    assert merge(root, target, **PARTS).bytes_written == 0


def test_a_merge_under_other_names(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 2)
    merge(root, target, naming="huggingface")
    merge(root, tmp_path / "expected", naming="huggingface")
    assert tree(target) == tree(tmp_path / "expected")


def test_what_nobody_knows_does_not_load(tmp_path: Path) -> None:
    """The hidden folder is gone, so who moved what cannot be told: the obstacle stays until there is a new merge."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 1)
    shutil.rmtree(target / ".ms_ckpt_ext")
    cut(root, target)
    assert (target / OBSTACLE).exists()
    merge(root, target)
    assert not (target / OBSTACLE).exists() and read_merged(target)


@pytest.mark.parametrize("lost", ["a file", "a boot"])
def test_a_set_that_cannot_be_completed_goes(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file was removed by other hands; or the machine crashed, and what was not synced may have holes."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    (target / "mine").mkdir(parents=True)
    (target / "mine/part0.safetensors").write_bytes(b"mine")
    killed_while_moving(root, target, 2, sync=lost != "a boot")
    moved = [name for name in tree(target) if name.startswith("part")]
    assert len(moved) >= 1
    if lost == "a file":
        next(target.glob(".ms_ckpt_ext/*/*.safetensors")).unlink()
    else:
        booted(monkeypatch, b"another")
    by_rank(root, target, 1)
    assert {"mine/part0.safetensors", "r1.safetensors"} <= tree(target).keys()
    assert not {name for name in tree(target) if name.startswith(("part", "hyper"))} - {"param_name_map.json"}
    with pytest.raises(CheckpointError):
        training_scalars(target)
    merge(root, target)
    assert_merged(target)
    assert not (target / ".ms_ckpt_ext").exists() and not (target / OBSTACLE).exists()


def test_an_old_result_that_still_loads_is_left(tmp_path: Path) -> None:
    """Killed before anything was decided, or when all was done: both results are whole, and stay."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(source(tmp_path / "old", 1), target)
    before = tree(target)
    killed(lambda: merge(root, target), notes_what_to_publish)
    cut(root, target)
    assert {name: data for name, data in tree(target).items() if not name.startswith("rank_")} == before
    shutil.rmtree(target)
    killed(lambda: merge(root, target), behind(removes(".journal")))
    before = tree(target)
    (target / "part0.safetensors").write_bytes(b"changed since, which is not the dead job's business")
    cut(root, target)
    after = {name: data for name, data in tree(target).items() if not name.startswith("rank_")}
    assert after == {**before, "part0.safetensors": tree(target)["part0.safetensors"]}


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_what_lacks_only_its_record_gets_it(form: str, tmp_path: Path) -> None:
    """And is replaced as a result on record is: by the same in another format."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed(lambda: cut(root, target), puts_on_record)
    cut(root, target, to=form)
    assert sorted(tree(target)) == [f"rank_{rank}/net.{form}" for rank in range(4)]


def test_a_model_that_lacks_only_its_record_is_ours(tmp_path: Path) -> None:
    """Merging again, with other options or as a dry run, does not report the files as somebody else's."""
    root = source(tmp_path / "src")
    for naming, part_bytes in (("huggingface", 9000), ("huggingface", 20_000), ("mindspore", 9000)):
        target, expected = tmp_path / f"{naming}_{part_bytes}", tmp_path / f"expected_{naming}_{part_bytes}"
        killed(lambda to=target: merge(root, to, naming="huggingface"), puts_on_record)
        options = {"naming": naming, "part_bytes": part_bytes}
        unified_safetensors(root / "shards", root / "strategy.ckpt", target, **options)
        merge(root, expected, **options)
        assert tree(target) == tree(expected)


def test_a_rank_in_a_flat_folder(tmp_path: Path) -> None:
    """What one rank had finished, and what it had begun to publish, is no loss when another comes."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed(lambda: by_rank(root, target, 0), puts_on_record)
    killed(lambda: by_rank(root, target, 1), notes_what_to_publish)
    by_rank(root, target, 2)
    assert sorted(tree(target)) == ["r0.safetensors", "r2.safetensors"]
    assert by_rank(root, target, 0).bytes_written == 0
    report = by_rank(root, target, 1)
    assert report.files_kept == ("r1.safetensors",) and report.bytes_written == 0
    assert set(load_manifest(str(target)).files) == {f"r{rank}.safetensors" for rank in range(3)}  # type: ignore[union-attr]
    assert not (target / ".ms_ckpt_ext").exists()


def test_ranks_of_a_flat_folder_killed_anywhere(tmp_path: Path) -> None:
    """Wherever one stops: those before it are untouched, those after it succeed, and run again it goes on."""
    for stop_at in range(1, 60):
        root = tmp_path / str(stop_at)
        for rank in range(3):
            write_ckpt(root / f"in/net{rank}.ckpt")
        convert(root / "in/net0.ckpt", root / "out", to="safetensors")
        first = tree(root / "out")
        stop = nth(stop_at, changes_names)
        finished = survives(lambda at=root: convert(at / "in/net1.ckpt", at / "out", to="safetensors"), stop)
        convert(root / "in/net2.ckpt", root / "out", to="safetensors")
        found = tree(root / "out")
        assert first.items() <= found.items() and found.keys() >= {"net0.safetensors", "net2.safetensors"}
        held = load_manifest(str(root / "out"))
        assert held is not None and held.files.keys() == found.keys() and check_digests(str(root / "out"), held) == []
        convert(root / "in/net1.ckpt", root / "out", to="safetensors")
        assert tree(root / "out").keys() == {f"net{rank}.safetensors" for rank in range(3)}
        if finished:
            return
    raise AssertionError("never came to its end")


def test_a_recut_that_was_half_moved(tmp_path: Path) -> None:
    """Also when the next job's target is one of its rank folders, or is the folder above."""
    root = source(tmp_path / "src")
    for name, following in (("same", ""), ("rank", "rank_1"), ("above", "..")):
        target = tmp_path / name / "out"

        def moves(call: str, args: Sequence[Any], to: Path = target) -> bool:
            return call == "rename" and args[1].parent.parent == to and ".ms_ckpt_ext" not in str(args[1])

        killed(lambda to=target: cut(root, to), nth(3, moves))
        assert len(tree(target)) == 2
        by_rank(root, target / following, 1)
        if name == "above":  # nothing of that job lies where the other's files do, so it is left to its own rerun
            assert len(tree(target)) == 2
            cut(root, target)
        there = {os.path.normpath(os.path.join(following, "r1.safetensors"))} - {"../r1.safetensors"}
        assert set(tree(target)) == {f"rank_{rank}/net.safetensors" for rank in range(4)} | there


@pytest.mark.parametrize("sync", [True, False])
def test_folders_on_other_file_systems(sync: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's folder may be a link to another disk: there files are copied, also when that is interrupted."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    strategy = root / "strategy.ckpt"
    for rank in range(4):
        (tmp_path / f"disk{rank}").mkdir()
        target.mkdir(exist_ok=True)
        (target / f"rank_{rank}").symlink_to(tmp_path / f"disk{rank}")
    real, copied = os.rename, multiprocessing.Value("i", 0)

    def rename(old: Path, new: Path) -> None:
        if ".ms_ckpt_ext" not in str(new):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(old, new)

    def copy(old: Path, new: Path) -> None:
        copied.value += 1
        if copied.value == 2:
            Path(new).write_bytes(Path(old).read_bytes()[:9])
            os.kill(os.getpid(), signal.SIGKILL)
        shutil.copyfile(old, new)
        shutil.copystat(old, new)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "copy2", copy)
    killed(lambda: reshard(root / "shards", target, strategy=strategy, to_strategy=strategy, sync=sync), never)
    report = reshard(root / "shards", target, strategy=strategy, to_strategy=strategy, sync=sync)
    assert report.bytes_written == 0 and copied.value == 5
    cut(root, tmp_path / "expected")
    found = {
        f"rank_{rank}/{path.name}": path.read_bytes()
        for rank in range(4)
        for path in (tmp_path / f"disk{rank}").iterdir()
    }
    assert found == tree(tmp_path / "expected")
    assert not (target / ".ms_ckpt_ext").exists()


@pytest.mark.parametrize("stop_at", ["journal", "folder", "claims"])
def test_killed_when_all_was_in_place(stop_at: str, tmp_path: Path) -> None:
    """The same job has nothing to do, and leaves nothing of it."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    stops = {"journal": removes(".journal"), "folder": behind(removes(".journal")), "claims": removes("claims")}
    killed(lambda: merge(root, target), stops[stop_at])
    assert (target / ".ms_ckpt_ext").exists()
    assert merge(root, target).bytes_written == 0
    assert not (target / ".ms_ckpt_ext").exists()
    assert_merged(target)


@pytest.mark.parametrize("needed", [True, False])
def test_what_cannot_be_finished(needed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's files, for instance. Only a job that would write the same names is affected."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    killed_while_moving(root, target, 1)
    real = os.rename

    def rename(old: Path, new: Path) -> None:
        if Path(new).name.startswith("part") and Path(new).parent == target:
            raise PermissionError(13, "Permission denied")
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        if needed:
            with pytest.raises(StorageError, match="cannot finish what an earlier run was publishing .*have its owner"):
                merge(root, target)
        else:
            by_rank(root, target, 0)
            assert (target / "r0.safetensors").exists() and (target / OBSTACLE).exists()
    merge(root, target)
    assert_merged(target)


def test_a_record_of_an_earlier_release(tmp_path: Path) -> None:
    """It was that of one job, without the job's name at each file."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target)
    held = json.loads((target / ".ms_ckpt_ext.json").read_bytes())
    (job,) = {entry[2] for entry in held["files"].values()}
    old = {"job": job, "files": {name: entry[:2] for name, entry in held["files"].items()}}
    (target / ".ms_ckpt_ext.json").write_text(json.dumps(old))
    assert merge(root, target).bytes_written == 0
    merge(root, target, naming="huggingface")
    assert "part0.safetensors" not in tree(target)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {"part0.safetensors": []}}', "null"])
def test_a_record_that_is_none(text: str, tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target)
    (target / ".ms_ckpt_ext.json").write_text(text)
    assert merge(root, target).bytes_written > 0
    assert_merged(target)
