"""The manifest that jobs write: true, there whenever its files are, and gone when they are replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from ms_ckpt_ext import (
    load_distributed_checkpoint,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import (
    MANIFEST_NAME,
    FileDigests,
    Manifest,
    load_manifest,
    opened,
    recorded_digests,
    write_manifest,
)
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import DecryptionError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import read_file, source, strategy_of, tree
from tests.support.dying import begun
from tests.support.machine import ReadMade, copies_by_itself

KEY = bytes(range(32))
SEALS = [("ckpt", mode) for mode in ("AES-GCM", "AES-CBC", "SM4-CBC", "chunked")] + [("safetensors", "AES-GCM")]


def merge(root: Path, target: Path, **more: Any) -> Any:
    return unified_safetensors(root / "shards", root / "strategy.ckpt", target, **{"part_bytes": 9000, **more})


def recut(root: Path, target: Path, **more: Any) -> None:
    load_distributed_checkpoint(
        None, None, root / "target.ckpt", root / "strategy.ckpt", format="safetensors",
        unified_safetensors_dir=root / "shards", dst_safetensors_dir=target, **more,
    )  # fmt: skip


def manifest_of(target: Path) -> Manifest:
    found = load_manifest(str(target))
    assert found is not None
    return found


def assert_true(target: Path) -> None:
    """Every tensor of every file is on record, as it lies in the file."""
    found = manifest_of(target)
    files = {str(p.relative_to(target)): p for p in sorted(target.rglob("*.safetensors"))}
    assert set(found.files) == set(files)
    for name, path in files.items():
        assert found.files[name].size == path.stat().st_size
        assert found.files[name].tensors == {n: xxhash.xxh3_128_hexdigest(t.data) for n, t in read_file(path).items()}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_merge_records_what_it_writes(workers: int, tmp_path: Path) -> None:
    root = source(tmp_path / "src", rows=1 << 15, names=("a", "b", "c"))  # slices for direct copies and for tiles
    merge(root, tmp_path / "out", max_process_num=workers, part_bytes=8 << 20)
    assert_true(tmp_path / "out")


def test_nothing_is_read_twice_by_one_worker(reads: list[ReadMade], tmp_path: Path) -> None:
    """Arrays are filled from front to back, so no digest waits for bytes and reads them back."""
    root = source(tmp_path / "src", rows=1 << 15, names=("a", "b", "d"))
    merge(root, tmp_path / "out", max_process_num=1)
    assert_true(tmp_path / "out")
    assert reads and not any(read.path.endswith(".partial") for read in reads)


def test_of_many_arrays_each_worker_takes_whole_ones(reads: list[ReadMade], tmp_path: Path) -> None:
    """Also of those that are more than it takes at once, and that fill their last tile: eight of 16 KiB."""
    root = source(tmp_path / "src", rows=1 << 10, names=tuple("abcdefghijklmnopqrst"))
    catalog = open_catalog(str(root / "shards"), load_strategy(root / "strategy.ckpt"))
    job = merge_job(catalog, str(tmp_path / "out"), MergeOptions(part_bytes=9000))
    execute(job, str(tmp_path / "out"), 2, Limits(tile=16 << 10, share=4096))
    assert_true(tmp_path / "out")
    assert reads and not any(read.path.endswith(".partial") for read in reads)


def test_what_the_file_system_copies_is_digested_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "copy_file_range"):
        pytest.skip("no copy_file_range here")
    copies_by_itself(monkeypatch)
    root = source(tmp_path / "src", rows=1 << 15, names=("a", "b"))
    merge(root, tmp_path / "out")
    assert_true(tmp_path / "out")


def test_a_recut_records_every_rank(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    strategy_of({n: Layout((4, 2), ((1,), (0,))) for n in ("a.w", "b.w", "c.w", "d.w")}, root / "target.ckpt")
    recut(root, tmp_path / "out")
    assert_true(tmp_path / "out")
    recut(root, tmp_path / "out", rank_id=3)
    assert_true(tmp_path / "out" / "rank_3")
    path = tmp_path / "out" / "rank_3" / "net.safetensors"
    listed = manifest_of(tmp_path / "out").files
    assert set(listed) == {f"rank_{rank}/net.safetensors" for rank in range(8) if rank != 3}, "rank 3 was written anew"
    beside = manifest_of(path.parent).files["net.safetensors"]
    assert recorded_digests(str(path)) == (str(path.parent), "net.safetensors", beside)
    recut(root, tmp_path / "out", digests=False)
    assert not list(tmp_path.rglob(MANIFEST_NAME))


def test_shares_are_recorded_together(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    for share in (2, 3, 1):
        merge(root, tmp_path / "out", split_dst_file=(share, 3))
        there = {name for name in tree(tmp_path / "out") if name.endswith(".safetensors")}
        assert manifest_of(tmp_path / "out").files.keys() == there
    assert_true(tmp_path / "out")
    merge(root, tmp_path / "whole")
    assert manifest_of(tmp_path / "whole") == manifest_of(tmp_path / "out")


def test_a_rerun_keeps_what_was_recorded(tmp_path: Path) -> None:
    """A finished part whose record is torn is written again."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    begun(lambda: merge(root, target, split_dst_file=(2, 2)))
    of_the_other = {*target.glob(".ms_ckpt_ext/*/*.note")}
    merge(root, target, split_dst_file=(1, 2))
    notes = sorted({*target.glob(".ms_ckpt_ext/*/*.note")} - of_the_other)
    assert len(notes) >= 2
    notes[0].write_bytes(notes[0].read_bytes()[:-1])
    report = merge(root, target, split_dst_file=(1, 2))
    assert report.files_written == (notes[0].name[: -len(".note")],)
    merge(root, target, split_dst_file=(2, 2))
    assert_true(target)


def test_with_and_without(tmp_path: Path) -> None:
    """Another setting is another job; what an older result left never stays beside the new one."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    assert merge(root, target, digests=False).files_written
    assert load_manifest(str(target)) is None
    assert merge(root, target).files_written
    assert_true(target)
    (target / MANIFEST_NAME).unlink()
    assert merge(root, target).files_written, "a result that lost its manifest is made again"
    assert merge(root, target).files_written == ()
    merge(source(tmp_path / "other", 1), target, digests=False)
    assert load_manifest(str(target)) is None


def test_other_files_stay_on_record(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    target.mkdir()
    (target / "mine.bin").write_bytes(b"abc")
    other = FileDigests(3, {"w": "0" * 32})
    gone = {"part0.safetensors": other, "lost.bin": other}
    write_manifest(str(target), Manifest({"mine.bin": other, **gone}))
    merge(root, target)
    found = dict(manifest_of(target).files)
    assert found.pop("mine.bin") == other and "lost.bin" not in found
    assert check_digests(str(target), Manifest(found)) == []
    merge(root, target, digests=False)
    assert manifest_of(target) == Manifest({"mine.bin": other})


def test_one_rank_anew_leaves_the_others_on_record(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    strategy = root / "strategy.ckpt"
    transform_checkpoints(root / "shards", target, "net_", strategy, strategy, output_format="safetensors")
    before = dict(manifest_of(target).files)
    files = {rank: root / f"shards/rank_{rank}/net.safetensors" for rank in range(4)}
    for rank in (1, 3, 0, 2):
        assert manifest_of(target).files == before
        name = f"rank_{rank}/net_{rank}.safetensors"
        transform_checkpoint_by_rank(rank, files, target / name, strategy, strategy, digests=rank != 3)
        del before[name]
    assert load_manifest(str(target)) is None


def test_other_formats_and_checksums(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, crc_check=True)
    assert_true(target)
    tensors = {n: d for f in manifest_of(target).files.values() for n, d in f.tensors.items()}
    merge(root, target, output_format="ckpt", crc_check=True)
    found = manifest_of(target)
    assert {n: d for f in found.files.values() for n, d in f.tensors.items()} == tensors
    assert all(name.endswith(".ckpt") for name in found.files) and check_digests(str(target), found) == []


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("form, mode", SEALS)
def test_digests_of_encrypted_files_are_encrypted(form: str, mode: str, workers: int, tmp_path: Path) -> None:
    """With the key they are those of the same merge without encryption; without it, only sizes show."""
    root = source(tmp_path / "src", rows=1 << 12, names=("a", "b", "c"))
    options = {"output_format": form, "max_process_num": workers, "part_bytes": 1 << 20}
    plain, target = tmp_path / "plain", tmp_path / "out"
    merge(root, plain, crc=form == "ckpt" and mode != "chunked", **options)
    merge(root, target, enc_key=KEY[:16], enc_mode=mode, **options)
    found = manifest_of(target)
    assert found.files.keys() == {name for name in tree(target) if name.endswith(form)}
    assert all(held[:3] == (os.stat(target / name).st_size, {}, None) for name, held in found.files.items())
    readable, faults = opened(found, Key(KEY[:16]))
    truth = manifest_of(plain).files
    assert {name: held[1:3] for name, held in readable.files.items()} == {n: held[1:3] for n, held in truth.items()}
    access = Access(Key(KEY[:16]))
    assert check_digests(str(target), readable, None, workers, access) == faults == []
    told = (target / MANIFEST_NAME).read_bytes()
    for held in truth.values():
        for name, digest in (*held.tensors.items(), ("framing", str(held.framing))):
            assert digest.encode() not in told and f'"{name}"'.encode() not in told


def test_sealed_digests_belong_to_their_file(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target, enc_key=KEY)
    found = dict(manifest_of(target).files)
    one, two = sorted(found)[:2]
    assert found[one].sealed is not None and found[one] != found[two]
    for changed in (
        {one: found[one]._replace(sealed=found[two].sealed)},
        {one: found[one]._replace(size=found[one].size + 1)},
        {one: found[one]._replace(sealed="not base64!")},
        {one: found[one]._replace(sealed="AAAA")},
    ):
        _, faults = opened(Manifest({**found, **changed}), Key(KEY))
        assert [fault.file for fault in faults] == [one] and "do not open" in faults[0].found
        with pytest.raises(DecryptionError, match="sealed digests of .* do not open .*check the key"):
            changed[one].opened_by(Key(KEY), one)
    _, faults = opened(Manifest(found), Key(bytes(32)))
    assert len(faults) == len(found)


@pytest.mark.parametrize("alter", [False, True])
def test_what_an_interrupted_run_encrypted_is_compared(alter: bool, tmp_path: Path) -> None:
    """By digests, which are encrypted while they wait; in CBC nothing else reveals an altered byte."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    options = {"output_format": "ckpt", "enc_key": KEY, "enc_mode": "AES-CBC"}
    begun(lambda: merge(root, target, split_dst_file=(2, 2), **options))
    merge(root, target, split_dst_file=(1, 2), **options)
    (folder,) = filter(Path.is_dir, target.glob(".ms_ckpt_ext/*"))
    held = sorted(path for path in folder.iterdir() if path.name.endswith(".ckpt"))
    assert held
    notes = [path.read_bytes() for path in folder.iterdir() if path.name.startswith(held[0].name) and path not in held]
    assert notes and all(b'"sealed"' in note and b"framing" not in note for note in notes)
    if alter:
        raw = bytearray(held[0].read_bytes())
        raw[-100] ^= 1
        held[0].write_bytes(raw)
    merge(root, target, split_dst_file=(1, 2), **options)
    report = merge(root, target, split_dst_file=(2, 2), **options)
    assert report.published
    readable, _ = opened(manifest_of(target), Key(KEY))
    access = Access(Key(KEY))
    assert check_digests(str(target), readable, access=access) == []


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    merge(root, target)
    found = manifest_of(target)
    path = target / "part0.safetensors"
    raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
    raw[-1] ^= 4
    path.write_bytes(raw.tobytes())
    (fault,) = check_digests(str(target), found, workers=2)
    assert fault.file == "part0.safetensors" and fault.tensor in found.files["part0.safetensors"].tensors
