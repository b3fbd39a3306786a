"""Encrypted and checksummed output: read by us and by MindSpore, no plaintext on disk, bounded memory, resumable."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ms_ckpt_ext import errors, load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.files import execution
from ms_ckpt_ext.engine.files.crc_sink import SummingSink
from ms_ckpt_ext.engine.files.encrypted_sink import HeldBytes, Seal, SealedSink
from ms_ckpt_ext.engine.files.job import Job
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.reshard import recut_job
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.formats import checksum
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.index import FileIndex, TensorSpec
from ms_ckpt_ext.formats.registry import Access, lay_out, open_reader, read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.digest_sink import DigestingSink, streams_of
from tests.support.checkpoints import Stored, cut, read_file, shard, source, strategy_of, tree
from tests.support.dying import begun
from tests.support.formats import KEY, WRONG, contents, scalars_of

CASE = "formats_dp2_tp4_zero"
OURS = "hyper_param"
OTHER = b"FEDCBA9876543210"
SEALS = [("ckpt", mode) for mode in ("AES-GCM", "AES-CBC", "SM4-CBC", "chunked")]
SEALS += [("safetensors", "AES-GCM"), ("safetensors", "chunked")]


@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("form, mode", [("ckpt", None), ("safetensors", None), *SEALS])
def test_merge_and_recut(form: str, mode: Optional[str], crc: bool, golden: Path, tmp_path: Path) -> None:
    """Every format and container, with and without checksum; merged, and cut from the merged one."""
    enc = {} if mode is None else {"enc_key": KEY, "enc_mode": mode}
    access = Access(None if mode is None else Key(KEY), mode, crc_check=crc)
    unified_safetensors(
        golden / CASE / "safetensors", golden / CASE / "strategy.ckpt", tmp_path / "merged",
        output_format=form, crc=crc, **enc,
    )  # fmt: skip
    assert contents(tmp_path / f"merged/part0.{form}", access) == read_file(golden / "full/model.safetensors")
    assert contents(tmp_path / f"merged/hyper_param.{form}", access) == scalars_of(golden, CASE)
    in_blocks = form == "ckpt" and mode not in (None, "chunked")
    assert ("crc_num" in read_index(str(tmp_path / f"merged/part0.{form}"), access).metadata) is (crc or in_blocks)
    dec = {} if mode is None else {"dec_key": KEY, "dec_mode": mode}
    load_distributed_checkpoint(
        None, None, golden / "tp4/strategy.ckpt", format=form, unified_safetensors_dir=tmp_path / "merged",
        dst_safetensors_dir=tmp_path / "cut", output_format=form, crc=crc, crc_check=crc, **enc, **dec,
    )  # fmt: skip
    for rank in range(4):
        expected = read_file(shard(golden / "tp4/shards" / f"rank_{rank}")) | scalars_of(golden, CASE)
        assert contents(tmp_path / f"cut/rank_{rank}/net.{form}", access) == expected


@pytest.mark.stock
@pytest.mark.parametrize("crc", [False, True])
@pytest.mark.parametrize("mode", [None, "AES-GCM", "AES-CBC", "SM4-CBC"])
def test_mindspore_reads_it(mode: Optional[str], crc: bool, golden: Path, tmp_path: Path) -> None:
    """Its own decryption of blocks shorter than its own, its own check of the checksum inside."""
    import mindspore as ms

    catalog = open_catalog(str(golden / CASE / "ckpt"), load_strategy(golden / CASE / "strategy.ckpt"))
    seal = None if mode is None else Seal(Key(KEY), mode, block=4096)
    job = merge_job(catalog, str(tmp_path), MergeOptions(format="ckpt", crc=crc, seal=seal))
    execution.execute(job, str(tmp_path), 2, Limits())
    told = {} if mode is None else {"dec_key": KEY, "dec_mode": mode}
    found = ms.load_checkpoint(str(tmp_path / "part0.ckpt"), crc_check=crc, **told)
    expected = read_file(golden / "full/model.safetensors")
    assert {name: bytes(p.data.get_bytes()) for name, p in found.items()} == {n: t.data for n, t in expected.items()}
    scalars = ms.load_checkpoint(str(tmp_path / "hyper_param.ckpt"), crc_check=crc, **told)
    truth = ms.load_checkpoint(str(shard_of(golden, "ckpt")))
    for name, parameter in scalars.items():
        assert (parameter.dtype, parameter.shape) == (truth[name].dtype, truth[name].shape)


def shard_of(golden: Path, kind: str) -> Path:
    return next((golden / CASE / kind / "rank_0").iterdir())


@pytest.mark.stock
def test_a_checksum_in_safetensors_is_mindspores(golden: Path, tmp_path: Path) -> None:
    """It tells on loading; its own save makes the same of 0-d integers, of which it sums something else."""
    import mindspore as ms

    unified_safetensors(golden / CASE / "ckpt", golden / CASE / "strategy.ckpt", tmp_path, crc=True)
    found = ms.load_checkpoint(str(tmp_path / "hyper_param.safetensors"), format="safetensors", crc_check=True)
    assert sorted(found) == sorted(scalars_of(golden, CASE))
    ms.save_checkpoint(found, str(tmp_path / "theirs.safetensors"), format="safetensors", crc_check=True)
    theirs, ours = (read_index(str(tmp_path / f"{n}.safetensors"), Access(crc_check=True)) for n in ("theirs", OURS))
    assert theirs.metadata["crc_num"] == ours.metadata["crc_num"]
    data = bytearray((tmp_path / "hyper_param.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="crc check has failed"):
        ms.load_checkpoint(str(tmp_path / "bad.safetensors"), format="safetensors", crc_check=True)


def many(root: Path, count: int = 120, seed: int = 0) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """A checkpoint of many small parameters and some large ones, in an order that is not that of the names."""
    rng = np.random.default_rng(seed)
    names = [f"{rng.integers(1 << 30):08x}.w{n}" for n in range(count)]
    full = {n: rng.standard_normal((4 * int(rng.integers(1, 9)), 64)).astype(np.float32) for n in names}
    full |= {f"{n}.large": rng.standard_normal((1024, 512)).astype(np.float16) for n in names[::40]}
    cuts = [((0,), ()), ((), (0,)), ((1,), (0,)), ((), ())]
    root.mkdir()
    strategy = strategy_of({n: Layout((2, 2), cuts[i % 4]) for i, n in enumerate(full)}, root / "s.ckpt")
    return cut(strategy, full, root / "shards"), root / "s.ckpt", full


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("workers", [1, 4])
def test_memory_is_bounded_by_the_budget(form: str, workers: int, tmp_path: Path) -> None:
    """Six times the budget of plaintext goes through; what waits at any time is counted."""
    shards, strategy, full = many(tmp_path / "src")
    catalog = open_catalog(str(shards), load_strategy(strategy))
    seal = Seal(Key(KEY), "chunked", chunk=16 << 10, tally=HeldBytes(budget=512 << 10, at_once=128 << 10))
    options = MergeOptions(part_bytes=1 << 20, format=form, crc=True, seal=seal)
    merge = merge_job(catalog, str(tmp_path / "merged"), options)
    recut = recut_job(
        catalog, load_strategy(strategy), range(4), lambda rank: f"rank_{rank}/net.{form}", crc=True, seal=seal
    )
    for job, target in ((merge, "merged"), (recut, "cut")):
        report = execution.execute(job, str(tmp_path / target), workers, Limits(tile=64 << 10))
        assert report.bytes_written > 3 << 20 and len(report.files_written) >= 4
        assert 0 < seal.tally.peak <= 512 << 10
        assert seal.tally.held == 0
    found: dict[str, Stored] = {}
    for file in sorted((tmp_path / "merged").glob(f"part*.{form}")):
        found |= contents(file, Access(Key(KEY), crc_check=True))
    assert {name: tensor.data for name, tensor in found.items()} == {n: a.tobytes() for n, a in full.items()}
    for rank in range(4):
        expected = read_file(shards / f"rank_{rank}/net.safetensors")
        assert contents(tmp_path / f"cut/rank_{rank}/net.{form}", Access(Key(KEY), crc_check=True)) == expected


@pytest.mark.parametrize("form, mode", SEALS)
def test_no_plaintext_is_written(
    form: str, mode: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    real = os.pwrite

    def remember(fd: int, buffer: memoryview, offset: int) -> int:
        written.append(bytes(buffer))
        return real(fd, buffer, offset)

    monkeypatch.setattr(os, "pwrite", remember)
    monkeypatch.setattr("os.copy_file_range", None)  # would not be seen
    unified_safetensors(
        golden / CASE / "ckpt",
        golden / CASE / "strategy.ckpt",
        tmp_path,
        output_format=form,
        enc_key=KEY,
        enc_mode=mode,
    )
    disk = b"".join(written) + b"".join(data for name, data in tree(tmp_path).items() if not name.endswith(".json"))
    for name, tensor in read_file(golden / "full/model.safetensors").items():
        assert name.encode() not in disk
        assert all(tensor.data[at : at + 16] not in disk for at in range(0, len(tensor.data) - 16, 256))
    assert KEY not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def interrupted(job: Job, target: Path, after: int) -> None:
    """Run a job that ends, as by a crash, when so many files are complete."""
    begun(lambda: execution.execute(job, str(target), 1, Limits()), after)


@pytest.mark.parametrize("form, mode", SEALS)
def test_a_rerun_keeps_finished_files_of_the_same_key_only(form: str, mode: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    strategy = load_strategy(root / "strategy.ckpt")
    catalog = open_catalog(str(root / "shards"), strategy)

    def job(key: bytes, crc: bool = False) -> Job:
        name = lambda rank: f"rank_{rank}/net.{form}"  # noqa: E731
        return recut_job(catalog, strategy, range(4), name, crc=crc, seal=Seal(Key(key), mode))

    target = tmp_path / "out"
    interrupted(job(KEY), target, after=2)
    assert tree(target) == {}
    report = execution.execute(job(KEY), str(target), 1, Limits())
    assert (len(report.files_kept), len(report.files_written), report.published) == (2, 2, True)
    before = tree(target)
    assert execution.execute(job(KEY), str(target), 1, Limits()).files_written == ()
    assert tree(target) == before
    in_blocks = form == "ckpt" and mode != "chunked"  # these have a checksum in any case
    for other, written in ((job(OTHER), 4), (job(OTHER, crc=True), 0 if in_blocks else 4)):
        assert len(execution.execute(other, str(target), 1, Limits()).files_written) == written
    for rank in range(4):
        file = target / f"rank_{rank}/net.{form}"
        assert contents(file, Access(Key(OTHER))) == read_file(root / f"shards/rank_{rank}/net.safetensors")
        with pytest.raises(errors.DecryptionError):
            contents(file, Access(Key(KEY)))


class Undistinguished(Seal):
    """One whose key the name of the job's folder does not tell."""

    def identity(self) -> str:
        return "the same"


def test_finished_files_that_another_key_wrote_are_not_taken(tmp_path: Path) -> None:
    """Even where the folder of the job would let them pass."""
    root = source(tmp_path / "src")
    strategy = load_strategy(root / "strategy.ckpt")
    catalog = open_catalog(str(root / "shards"), strategy)
    jobs = [
        recut_job(catalog, strategy, range(4), lambda r: f"rank_{r}/net.ckpt", seal=Undistinguished(Key(key)))
        for key in (KEY, WRONG)
    ]
    interrupted(jobs[0], tmp_path / "out", after=3)
    report = execution.execute(jobs[1], str(tmp_path / "out"), 1, Limits())
    assert report.files_kept == ()


def test_arguments(golden: Path, tmp_path: Path) -> None:
    def merge(**more: Any) -> None:
        unified_safetensors(golden / CASE / "ckpt", golden / CASE / "strategy.ckpt", tmp_path / "out", **more)

    for more, kind, said in (
        ({"enc_key": KEY, "enc_mode": "AES-CBC"}, errors.UsageError, "safetensors files take AES-GCM; .* write .ckpt"),
        ({"enc_key": KEY, "enc_mode": "ROT13"}, errors.UsageError, "no such enc_mode; choose"),
        ({"enc_key": "text"}, errors.ArgumentTypeError, "a key must be bytes"),
        ({"enc_key": b"short"}, errors.UsageError, "a key of 5 bytes"),
        ({"enc_key": KEY * 2, "enc_mode": "SM4-CBC", "output_format": "ckpt"}, errors.UsageError, "SM4-CBC takes 16"),
        ({"output_format": "npz"}, errors.UsageError, "output_format must be one of safetensors, ckpt"),
        ({"output_format": "ckpt", "naming": "huggingface"}, errors.UsageError, "naming='huggingface' is for"),
    ):
        with pytest.raises(kind, match=said):
            merge(**more)
    assert not (tmp_path / "out").exists()


def test_the_key_may_be_in_the_environment(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_CKPT_EXT_ENC_KEY", f"hex:{KEY.hex()}")
    unified_safetensors(golden / CASE / "ckpt", golden / CASE / "strategy.ckpt", tmp_path / "out")
    assert read_index(str(tmp_path / "out/part0.safetensors"), Access(Key(KEY))).reader == "chunked"


def test_keys_do_not_show() -> None:
    assert "0123" not in repr(Seal(Key(KEY))) + str(Seal(Key(KEY)).access("a.ckpt"))
    assert Seal(Key(KEY)).identity() != Seal(Key(WRONG)).identity() != Seal(Key(WRONG), "AES-CBC").identity()
    assert KEY.hex() not in Seal(Key(KEY)).identity()


def pieces(size: int, seed: int) -> Iterator[tuple[int, int]]:
    """A random cut of `size` bytes, in random order."""
    rng = random.Random(seed)
    seams = sorted({0, size, *(rng.randrange(size + 1) for _ in range(rng.randrange(12)))})
    cuts = list(zip(seams, seams[1:]))
    rng.shuffle(cuts)
    yield from cuts


@given(
    st.lists(st.integers(0, 700), min_size=1, max_size=8), st.sampled_from(SEALS), st.booleans(), st.integers(0, 999)
)
def test_any_order_of_writes_gives_the_same_plaintext(
    sizes: list[int], how: tuple[str, str], crc: bool, seed: int
) -> None:
    import tempfile

    form, mode = how
    rng = np.random.default_rng(seed)
    data = {f"p{n}": rng.bytes(size) for n, size in enumerate(sizes)}
    layout = lay_out(
        f"a.{form}", [TensorSpec(n, DTYPES["U8"], (len(d),)) for n, d in data.items()], {"format": "ms"}, crc
    )
    seal = Seal(Key(KEY), mode, chunk=64 + seed % 200, block=16 * (1 + seed % 20), tally=HeldBytes())
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.{form}"
        where = {name: entry.extents for name, entry in layout.tensors.items()}
        sealed = SealedSink(path, f"a.{form}", layout, seal)
        digesting = DigestingSink(sealed, lambda: streams_of(where, layout.size), layout.fixed)
        sink = digesting if layout.checksum is None else SummingSink(digesting, layout)
        work = [
            (extent.offset + low, data[name][low:high])
            for name, entry in layout.tensors.items()
            for extent in entry.extents
            for low, high in pieces(extent.length, seed)
        ]
        random.Random(seed).shuffle(work)
        for offset, part in work:
            sink.write(offset, memoryview(part))
        sink.finish()
        assert seal.tally.held == 0
        access = Access(Key(KEY), mode, crc_check=True)
        found = contents(Path(path), access)
        written = FileIndex(path, layout.size, 0, layout.tensors)
        framing = digest_file(written, 1, partial(open_reader, access=access)).framing
    assert {name: tensor.data for name, tensor in found.items()} == data
    assert digesting.digests() == {None: framing, **{n: xxhash.xxh3_128_hexdigest(d) for n, d in data.items()}}


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_checksums_are_put_together(parts: list[bytes]) -> None:
    crc = 0
    for part in parts:
        crc = checksum.combine(crc, zlib.crc32(part), len(part))
    assert crc == zlib.crc32(b"".join(parts))


def test_a_file_is_as_long_as_it_was_planned(tmp_path: Path) -> None:
    """This is why lack of space can be reported before anything is written."""
    save_file({"w": np.zeros(1000, np.uint8)}, tmp_path / "w.safetensors")
    plain = (tmp_path / "w.safetensors").read_bytes()
    for form, mode in SEALS:
        seal = Seal(Key(KEY), mode, chunk=100, block=64)
        layout = lay_out(f"a.{form}", [TensorSpec("w", DTYPES["U8"], (1000,))], {})
        sink = SealedSink(str(tmp_path / f"a.{form}"), f"a.{form}", layout, seal)
        for extent in layout.tensors["w"].extents:
            sink.write(extent.offset, memoryview(bytes(extent.length)))
        sink.finish()
        assert (tmp_path / f"a.{form}").stat().st_size == seal.units(f"a.{form}", layout.size).stored_size
    assert len(plain) > 1000
