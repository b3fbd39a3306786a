"""Several processes into one folder, each with names of its own, as MindSpore advises for speed: all succeed."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, Callable

import pytest

from ms_ckpt_ext import (
    ckpt_to_safetensors,
    convert,
    decrypt,
    encrypt,
    safetensors_to_ckpt,
    transform_checkpoint_by_rank,
    transform_checkpoints,
)
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, load_manifest
from ms_ckpt_ext.storage import publishing
from tests.support.checkpoints import merge, source, tree
from tests.support.formats import KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents

RANKS = range(6)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint of four ranks, and six files in both formats and encrypted."""
    source(tmp_path / "src")
    for rank in RANKS:
        write_ckpt(tmp_path / f"ckpt/rank_{rank}/net{rank}.ckpt")
    convert(tmp_path / "ckpt", tmp_path / "st", to="safetensors")
    encrypt(tmp_path / "ckpt", tmp_path / "sealed", enc_key=KEY)
    return tmp_path


def by_rank(root: Path, rank: int, to: Path) -> Any:
    files = {each: root / f"src/shards/rank_{each}/net.safetensors" for each in range(4)}
    strategy = root / "src/strategy.ckpt"
    return transform_checkpoint_by_rank(rank % 4, files, to / f"net{rank}.ckpt", strategy, strategy)


def prefixed(root: Path, rank: int, to: Path) -> Any:
    strategy = root / "src/strategy.ckpt"
    return transform_checkpoints(root / "src/shards", to, f"epoch{rank}_", strategy, strategy)


CALLS: dict[str, Callable[[Path, int, Path], Any]] = {
    "ckpt_to_safetensors": lambda root, n, to: ckpt_to_safetensors(root / f"ckpt/rank_{n}/net{n}.ckpt", to),
    "safetensors_to_ckpt": lambda root, n, to: safetensors_to_ckpt(root / f"st/rank_{n}/net{n}.safetensors", to),
    "convert": lambda root, n, to: convert(root / f"ckpt/rank_{n}/net{n}.ckpt", to / f"n{n}.ckpt", crc=True),
    "encrypt": lambda root, n, to: encrypt(root / f"ckpt/rank_{n}/net{n}.ckpt", to, enc_key=KEY),
    "decrypt": lambda root, n, to: decrypt(root / f"sealed/rank_{n}/net{n}.ckpt", to, dec_key=KEY),
    "transform_checkpoint_by_rank": by_rank,
    "transform_checkpoints with a prefix each": prefixed,
}


def at_once(jobs: list[Callable[[], Any]]) -> None:
    """Every job on a thread of its own; locks keep threads apart as they do processes."""
    barrier = Barrier(len(jobs))

    def one(job: Callable[[], Any]) -> None:
        barrier.wait()
        job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(one, jobs))


def assert_all_on_record(target: Path, key: Any = None) -> None:
    """Every file is in the manifest and the record, as it is; nothing else is left."""
    files = {name for name in tree(target) if name.endswith((".ckpt", ".safetensors"))}
    held = load_manifest(str(target))
    assert held is not None and held.files.keys() == files
    assert [each for each in check_digests(str(target), held) if each.checked] == []
    known = publishing.read_published(target)
    assert known.files.keys() == files
    assert all(publishing.state_of(target / name) == entry.state for name, entry in known.files.items())
    extra = {p.name for p in target.iterdir() if p.name.startswith(".")}
    assert extra == {publishing.RECORD}


@pytest.mark.parametrize("call", CALLS)
def test_all_at_once(call: str, root: Path, tmp_path: Path) -> None:
    for rank in RANKS:
        CALLS[call](root, rank, tmp_path / "expected")
    at_once([lambda n=n: CALLS[call](root, n, tmp_path / "out") for n in RANKS])  # type: ignore[misc]
    found, expected = tree(tmp_path / "out"), tree(tmp_path / "expected")
    assert found.keys() == expected.keys() and len(found) >= len(RANKS)
    assert call == "encrypt" or found == expected  # which takes a new nonce each time
    assert_all_on_record(tmp_path / "out")


def test_different_jobs_at_once(root: Path, tmp_path: Path) -> None:
    """A merge, a re-cut, conversions of files and of a tree, in one folder; then all of them again, for nothing."""
    target = tmp_path / "out"
    jobs: list[Callable[[], Any]] = [
        lambda: merge(root / "src", target, part_bytes=9000),
        lambda: prefixed(root, 0, target),
        lambda: convert(root / "ckpt", target / "tree", to="safetensors"),
        lambda: convert(root / "ckpt/rank_0", target, to="safetensors"),
        lambda: by_rank(root, 5, target / "rank_0"),
    ]
    at_once(jobs)
    names = {*tree(target)}
    assert {"param_name_map.json", "rank_3/epoch0_3.ckpt", "net0.safetensors", "rank_0/net5.ckpt"} <= names
    assert "tree/rank_5/net5.safetensors" in names
    assert [job().bytes_written for job in jobs] == [0] * len(jobs)
    assert {*tree(target)} == names


def test_a_tree_and_its_folders_at_once(root: Path) -> None:
    """In place: files of one rank, of another, and of the tree but for these two."""
    jobs: list[Callable[[], Any]] = [
        lambda: ckpt_to_safetensors(root / "ckpt/rank_0/net0.ckpt"),
        lambda: convert(root / "ckpt/rank_1", root / "ckpt/rank_1", to="safetensors"),
        lambda: ckpt_to_safetensors(root / "ckpt", file_name_regex="net[2-5]"),
    ]
    at_once(jobs)
    for rank in RANKS:
        path = root / f"ckpt/rank_{rank}/net{rank}.ckpt"
        assert contents(path.with_suffix(".safetensors")) == contents(path)
    assert not list(root.rglob(".ms_ckpt_ext"))
    assert len(list((root / "ckpt").rglob(MANIFEST_NAME))) == 3


def test_processes(root: Path, tmp_path: Path) -> None:
    """As with threads, but in real processes."""
    code = "import sys, ms_ckpt_ext as m; m.ckpt_to_safetensors(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.Popen([*command, str(root / f"ckpt/rank_{rank}/net{rank}.ckpt"), str(tmp_path / "out")])
        for rank in RANKS
    ]
    assert [run.wait(timeout=120) for run in runs] == [0] * len(RANKS)
    assert_all_on_record(tmp_path / "out")
    assert len(tree(tmp_path / "out")) == len(RANKS)
