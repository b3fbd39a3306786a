"""Killed at any moment, the target is the old result, whole, or does not load; the next run finishes the job."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Optional

import pytest

from ms_ckpt_ext import CheckpointError, load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import load_manifest
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from tests.support import dying
from tests.support.checkpoints import Stored, read_file, source, strategy_of, tree
from tests.support.dying import any_call, killed, nth
from tests.support.formats import contents

SEALED = b"0123456789ABCDEF"


def run_job(job: str, root: Path, target: Path) -> Any:
    """The job that is killed: a merge in parts, synced or not or encrypted, or a re-cut for every rank."""
    shards, strategy = root / "shards", root / "strategy.ckpt"
    if job == "sealed":
        more = {"output_format": "ckpt", "enc_key": SEALED, "crc": True}
        return unified_safetensors(shards, strategy, target, part_bytes=9000, max_process_num=2, **more)
    if job in ("merge", "unsynced"):
        return unified_safetensors(shards, strategy, target, part_bytes=9000, max_process_num=2, sync=job == "merge")
    return load_distributed_checkpoint(
        None, None, root / "target.ckpt", strategy, format="safetensors", unified_safetensors_dir=shards,
        dst_safetensors_dir=target, max_process_num=2,
    )  # fmt: skip


def run_killed(job: str, kill_at: int, root: Path, target: Path) -> None:
    killed(lambda: run_job(job, root, target), nth(kill_at, any_call))


def calls_of(job: str, root: Path, target: Path) -> int:
    return dying.calls_of(lambda: run_job(job, root, target))


def loaded(target: Path, scratch: Path) -> Optional[dict[str, Stored]]:
    """All that a loader gets out of a merged target; None when it refuses."""
    try:
        load_distributed_checkpoint(
            None, None, None, format="safetensors", unified_safetensors_dir=target, dst_safetensors_dir=scratch
        )
    except CheckpointError:
        return None
    return read_file(scratch / "rank_0" / "net.safetensors")


def points(calls: int, last: int, some: int) -> list[int]:
    """`some` calls of the whole run, and `some` of its `last` calls, where the result is published."""
    rng = random.Random(3)
    return sorted({*rng.sample(range(1, calls - last), some), *rng.sample(range(calls - last, calls + 1), some)})


@pytest.mark.parametrize(
    ("job", "before"), [("merge", "nothing"), ("merge", "an older result"), ("unsynced", "an older result")]
)
def test_merge_killed_at_random_points(job: str, before: str, tmp_path: Path) -> None:
    old, new = source(tmp_path / "old", 1, names=("a.w", "b.w")), source(tmp_path / "new", 2)
    run_job("merge", new, tmp_path / "expected")
    if before != "nothing":
        run_job("merge", old, tmp_path / "older")
        run_job("merge", old, tmp_path / "counted")  # what is there decides how many calls there are
    calls = calls_of(job, new, tmp_path / "counted")
    complete = {None: loaded(tmp_path / "expected", tmp_path / "scratch")}
    complete["old"] = loaded(tmp_path / "older", tmp_path / "scratch_old") if before != "nothing" else None

    def one(kill_at: int) -> None:
        target = tmp_path / f"out_{kill_at}"
        if before != "nothing":
            run_job("merge", old, target)
        run_killed(job, kill_at, new, target)
        state = loaded(target, tmp_path / f"scratch_{kill_at}") if target.exists() else None
        assert state is None or state in complete.values(), f"killed before call {kill_at}: loads, but is wrong"
        # MindSpore takes a folder with one .safetensors file for a whole checkpoint, whatever its index says.
        files = list(target.glob("*.safetensors"))
        assert len(files) != 1 or files[0].stat().st_size == 0
        finished = {p.name: p.stat().st_ino for p in target.glob(".ms_ckpt_ext/*/*.safetensors")}
        report = run_job(job, new, target)
        assert report.published and (report.bytes_written == 0 or set(finished) <= set(report.files_kept))
        assert {name: (target / name).stat().st_ino for name in finished} == finished, "finished parts written again"
        assert tree(target) == tree(tmp_path / "expected")
        assert load_manifest(str(target)) == load_manifest(str(tmp_path / "expected"))
        assert not list(target.glob(".ms_ckpt_ext")) or report.bytes_written == 0

    for kill_at in points(calls, last=20, some=10):
        one(kill_at)


def test_recut_killed_at_random_points(tmp_path: Path) -> None:
    """Without an index, no rank's file is ever a mixture, and old and new files are never there together."""
    old, new = source(tmp_path / "old", 1), source(tmp_path / "new", 2)
    for root in (old, new):
        strategy_of({n: Layout((3, 2), ((0,), ())) for n in ("a.w", "b.w", "c.w", "d.w")}, root / "target.ckpt")
    run_job("recut", new, tmp_path / "expected")
    run_job("recut", old, tmp_path / "older")
    run_job("recut", old, tmp_path / "counted")
    calls = calls_of("recut", new, tmp_path / "counted")

    def one(kill_at: int) -> None:
        target = tmp_path / f"out_{kill_at}"
        run_job("recut", old, target)
        run_killed("recut", kill_at, new, target)
        found = tree(target)
        expected, older = tree(tmp_path / "expected"), tree(tmp_path / "older")
        assert found.items() <= expected.items() or found.items() <= older.items()
        manifest = load_manifest(str(target))
        assert manifest is None or check_digests(str(target), manifest) == []
        run_job("recut", new, target)
        assert tree(target) == expected
        assert load_manifest(str(target)) == load_manifest(str(tmp_path / "expected"))

    for kill_at in points(calls, last=20, some=4):
        one(kill_at)


@pytest.mark.parametrize("change", ["source", "strategy"])
def test_what_changed_meanwhile_is_done_again(change: str, tmp_path: Path) -> None:
    """Parts that a killed run finished are of no use to another job; its folder goes."""
    root, target = source(tmp_path / "src", 1), tmp_path / "out"
    calls = calls_of("merge", root, tmp_path / "counted")
    run_killed("merge", calls - 12, root, target)
    assert list(target.glob(".ms_ckpt_ext/*/*.safetensors")) or list(target.glob("part*"))
    if change == "source":
        source(tmp_path / "src", 2)
    else:
        names = ("a.w", "b.w", "c.w", "d.w")
        # The same slice shapes everywhere, other places: dp2 tp2 with every device axis exchanged.
        swapped = [((1,), ()), ((), (1,)), ((0,), (1,)), ((), ())]
        strategy_of(
            {n: Layout((2, 2), m, int(not i), -int(not i)) for i, (n, m) in enumerate(zip(names, swapped))},
            root / "strategy.ckpt",
        )
    report = run_job("merge", root, target)
    assert report.files_kept == () and report.bytes_written > 0
    run_job("merge", root, tmp_path / "expected")
    assert tree(target) == tree(tmp_path / "expected")
    assert not list(target.glob(".ms_ckpt_ext"))


def test_the_counted_calls_are_the_ones_in_use(tmp_path: Path) -> None:
    """A run makes some of each important call, so that the points above are where they should be."""
    root = source(tmp_path / "src")
    assert calls_of("merge", root, tmp_path / "out") > 40
    assert {"rename", "replace", "unlink", "fsync", "pwrite"} <= set(dying.CALLS)


def test_encrypted_merge_killed_at_random_points(tmp_path: Path) -> None:
    """Finished files are recognised by their key; what was begun is begun again, under new nonces."""
    root = source(tmp_path / "src", 2)
    calls = calls_of("sealed", root, tmp_path / "expected")
    access = Access(Key(SEALED), crc_check=True)
    names = sorted(name for name in tree(tmp_path / "expected") if name.endswith(".ckpt"))
    expected = {name: contents(tmp_path / "expected" / name, access) for name in names}

    def one(kill_at: int) -> None:
        target = tmp_path / f"out_{kill_at}"
        run_killed("sealed", kill_at, root, target)
        finished = {p.name: p.read_bytes() for p in target.glob(".ms_ckpt_ext/*/*.ckpt")}
        report = run_job("sealed", root, target)
        assert report.published and (report.bytes_written == 0 or set(finished) <= set(report.files_kept))
        assert all((target / name).read_bytes() == data for name, data in finished.items())
        assert {name: contents(target / name, access) for name in names} == expected

    for kill_at in points(calls, last=20, some=4):
        one(kill_at)
