"""`sync`: results on disk, or left to the kernel; and what a boot in between makes of the latter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import (
    convert,
    decrypt,
    encrypt,
    load_distributed_checkpoint,
    merge,
    reshard,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage import linux
from tests.support.checkpoints import source, tree
from tests.support.dying import killed, notes_what_to_publish
from tests.support.machine import booted, c_library

KEY = bytes(range(32))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return source(tmp_path / "src")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever something is synced, or its way to disk begins."""
    calls: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(fd), real(fd))[1])
    c_library(monkeypatch, sync_file_range=lambda fd, *_: calls.append(fd) or 0)
    return calls


def run(root: Path, target: Path, **more: Any) -> Any:
    return unified_safetensors(root / "shards", root / "strategy.ckpt", target, part_bytes=9000, **more)


def every_job(root: Path, target: Path, sync: bool) -> None:
    shards, strategy, name = root / "shards", root / "strategy.ckpt", "net.safetensors"
    files = {rank: shards / f"rank_{rank}" / name for rank in range(4)}
    run(root, target / "unified", sync=sync)
    merge(shards, target / "merge", strategy=strategy, sync=sync)
    reshard(shards, target / "reshard", strategy=strategy, sync=sync)
    transform_checkpoints(shards, target / "transform", "p", strategy, sync=sync)
    transform_checkpoint_by_rank(0, files, target / "one.ckpt", strategy, sync=sync)
    convert(shards, target / "convert", to="ckpt", sync=sync)
    encrypt(shards, target / "encrypt", enc_key=KEY, sync=sync)
    decrypt(target / "encrypt", target / "decrypt", dec_key=KEY, sync=sync)
    load_distributed_checkpoint(
        None, None, strategy, strategy, format="safetensors", unified_safetensors_dir=shards,
        dst_safetensors_dir=target / "load", sync=sync,
    )  # fmt: skip


def test_every_job_writes_the_same_either_way(root: Path, tmp_path: Path, synced: list[int]) -> None:
    every_job(root, tmp_path / "left to the kernel", sync=False)
    assert synced == []
    every_job(root, tmp_path / "on disk", sync=True)
    assert len(synced) > 50
    expected, found = tree(tmp_path / "on disk"), tree(tmp_path / "left to the kernel")
    assert {name for name in expected if not name.startswith("encrypt/")} == {
        name for name in found if found[name] == expected[name]
    }  # encryption takes a new nonce each time


def test_a_result_of_this_boot_is_kept(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "out", sync=False).bytes_written > 0
    assert run(root, tmp_path / "out", sync=False).bytes_written == 0


@pytest.mark.parametrize("published", [True, False])
def test_nothing_of_an_earlier_boot_is_taken_for_done(
    published: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the machine may leave files of the right size with holes where their bytes were."""
    target, expected = tmp_path / "out", tmp_path / "expected"
    run(root, expected)
    booted(monkeypatch, b"before")
    if published:
        run(root, target, sync=False)
    else:
        killed(lambda: run(root, target, sync=False), notes_what_to_publish)
    parts = sorted(target.glob("*.safetensors") if published else target.glob(".ms_ckpt_ext/*/part*.safetensors"))
    assert len(parts) > 1
    for part in parts:
        status = part.stat()
        held = part.read_bytes()
        part.write_bytes(held[: len(held) // 2] + bytes(len(held) - len(held) // 2))
        os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
    booted(monkeypatch, b"after")
    report = run(root, target, sync=False)
    assert report.files_kept == () and tree(target) == tree(expected)
    assert not list(target.glob(".ms_ckpt_ext"))


@pytest.mark.parametrize("first", [True, False])
def test_a_synced_run_does_not_trust_one_that_was_not(first: bool, root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out", sync=first)
    assert run(root, tmp_path / "out", sync=not first).files_kept == ()
    assert run(root, tmp_path / "out", sync=not first).bytes_written == 0


def test_shares_must_be_synced(root: Path, tmp_path: Path) -> None:
    """The boot of another host says nothing about this one's files."""
    with pytest.raises(UsageError, match="sync=False is for a result that one task writes"):
        run(root, tmp_path / "out", sync=False, split_dst_file=(1, 2))
    assert not (tmp_path / "out").exists()


def test_the_boot_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linux.boot_id() == linux.boot_id()
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert linux.boot_id() != linux.boot_id()
