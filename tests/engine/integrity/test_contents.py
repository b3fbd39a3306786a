"""One pass answers everything that is asked about a file's bytes, and reads each byte once."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, verify
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.engine.integrity import contents
from ms_ckpt_ext.engine.integrity.compare import Comparison
from ms_ckpt_ext.engine.integrity.contents import Pass, Portion
from ms_ckpt_ext.engine.integrity.soundness import Health
from ms_ckpt_ext.errors import CheckpointError, StorageError
from ms_ckpt_ext.formats.checksum import Integer, Sums
from ms_ckpt_ext.formats.registry import read_index
from tests.support.checkpoints import source
from tests.support.machine import ReadMade, contents_read, watch_reads

SIZE = 5000


class Memory:
    """Two files in memory; `read` says how often each byte was asked for."""

    def __init__(self, broken: int = -1) -> None:
        rng = np.random.default_rng(0)
        self.data = [rng.integers(0, 3, SIZE, np.uint8).tobytes() for _ in range(2)]
        self.read: Counter[tuple[int, int]] = Counter()
        self._broken = broken

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        if file == self._broken:
            raise StorageError(5, "cannot read it")
        buffer[:] = self.data[file][offset : offset + len(buffer)]
        assert len(buffer) <= contents.RUN
        self.read.update((file, at) for at in range(offset, offset + len(buffer)))

    def bytes_of(self, portion: Portion) -> bytes:
        return b"".join(self.data[portion.file][o : o + n] for o, n in portion.extents)


@st.composite
def portions(draw: st.DrawFn) -> Portion:
    bounds = sorted(draw(st.lists(st.integers(0, SIZE), min_size=2, max_size=8)))
    extents = tuple(Extent(low, high - low) for low, high in zip(bounds[::2], bounds[1::2]))
    kind = draw(st.sampled_from([None, "F32", "I8", "F64", "F4"]))
    return Portion(draw(st.integers(0, 1)), extents, kind and DTYPES[kind], framing=draw(st.booleans()))


@settings(max_examples=80, deadline=None)
@given(asked=st.lists(portions(), max_size=6), run=st.integers(64, 900), bundle=st.integers(1, 3000))
@pytest.mark.parametrize("workers", [1, 3])
def test_any_portions(asked: list[Portion], run: int, bundle: int, workers: int) -> None:
    """Overlapping, in several extents, longer than a read: each digested in order, and nothing read twice."""
    files, told = Memory(), []
    found = Pass(files, asked, read_bytes=run, bundle_bytes=bundle).run(workers, told.append)
    assert [seen.digest for seen in found] == [xxhash.xxh3_128_hexdigest(files.bytes_of(each)) for each in asked]
    for portion, seen in zip(asked, found):
        if portion.dtype is not None and not portion.framing:
            width, held = max(1, portion.dtype.bits // 8), files.bytes_of(portion)
            whole = held[: len(held) // width * width]
            assert seen.constant is (whole == whole[:width] * (len(whole) // width))
    wanted = {(p.file, at) for p in asked for o, n in p.extents for at in range(o, o + n)}
    assert wanted <= files.read.keys() and len(files.read.keys() - wanted) <= 64 * 6 * 4
    again = sum(p.framing for p in asked)  # framing that arrived too early and was too long to keep
    assert not again or sum(told) == sum(files.read.values())
    assert again or max(files.read.values(), default=1) == 1


def test_a_file_that_cannot_be_read_leaves_the_others() -> None:
    failed: dict[int, CheckpointError] = {}
    asked = [Portion(0, (Extent(0, 10),)), Portion(1, (Extent(0, 10),))]
    found = Pass(Memory(broken=0), asked).run(2, failed=failed)
    assert found[0].digest == "" and found[1].digest == xxhash.xxh3_128_hexdigest(Memory().data[1][:10])
    assert {file: str(error) for file, error in failed.items()} == {0: str(failed[0])} and "cannot read it" in str(
        failed[0]
    )
    with pytest.raises(StorageError, match="cannot read it"):
        Pass(Memory(broken=0), asked).run(2)


def test_numbers_are_counted_whatever_a_read_cuts() -> None:
    """Elements that two reads share, in two extents of which neither holds whole ones."""
    held = np.array([np.nan, 1, np.inf, -np.inf, 2, np.nan, np.nan], "f4").tobytes()
    files = Memory()
    files.data[0] = held[:13] + b"tag" + held[13:]
    asked = [Portion(0, (Extent(0, 13), Extent(16, len(held) - 13)), DTYPES["F32"], numbers=True)]
    (seen,) = Pass(files, asked, read_bytes=10).run(1)
    assert (seen.digest, seen.nans, seen.infinities) == (xxhash.xxh3_128_hexdigest(held), 3, 2)


@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, 199), max_size=12), order=st.randoms(use_true_random=False))
def test_a_checksum_from_stretches_in_any_order(cuts: set[int], order: Any) -> None:
    """Also where a scalar, which is summed as that many zeros, is cut in two."""
    data = bytearray(np.random.default_rng(1).bytes(200))
    data[60:68] = (9).to_bytes(8, "little")
    parts = (b"name", Extent(100, 100), Integer(Extent(60, 8), True), Extent(0, 60))
    sums, bounds = Sums(parts), [0, *sorted(cuts), 200]
    stretches = list(zip(bounds, bounds[1:]))
    order.shuffle(stretches)
    for low, high in stretches:
        sums.add(low, memoryview(data)[low:high])
    assert sums.total() == zlib.crc32(b"name" + bytes(data[100:]) + bytes(9) + bytes(data[:60]))


def bytes_of(reads: list[ReadMade]) -> Counter[str]:
    """Path -> bytes that were read of it."""
    found: Counter[str] = Counter()
    for read in reads:
        found[read.path] += read.nbytes
    return found


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
@pytest.mark.parametrize("way", ["manifest", "itself"])
def test_every_byte_of_a_checkpoint_is_read_once(form: str, way: str, tmp_path: Path, reads: list[ReadMade]) -> None:
    """Digests, the file's checksum, copies, NaN, slices that are none: one pass; headers are read before."""
    root = source(tmp_path / "source")
    convert(root / "shards", tmp_path / "out", to=form, crc=True)
    reads.clear()
    if way == "manifest":
        found: Any = verify(tmp_path / "out", manifest=True)
    else:
        found = verify(tmp_path / "out", strategy=root / "strategy.ckpt")
        assert isinstance(found, Health) and found.checksums == 4
    assert found.ok
    paths = [str(path) for path in (tmp_path / "out").rglob(f"*.{form}") if path.name.startswith("net")]
    assert len(paths) == 4
    once = bytes_of(reads)
    reads.clear()
    for path in paths:
        size, index = os.stat(path).st_size, read_index(path)
        assert once[path] - bytes_of(reads)[path] <= size
        assert once[path] >= sum(entry.nbytes for entry in index.tensors.values())


def test_many_small_tensors_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand in four files against the same in one: a read brings many of them, on either side."""
    rng = np.random.default_rng(0)
    held = {f"layers.{n}.w": rng.standard_normal((2, 3), np.float32) for n in range(2000)}
    (tmp_path / "a").mkdir()
    names = [*held]
    for part in range(4):
        save_file({name: held[name] for name in names[part::4]}, tmp_path / "a" / f"{part}.safetensors")
    index = {name: f"{number % 4}.safetensors" for number, name in enumerate(names)}
    (tmp_path / "a" / "param_name_map.json").write_text(json.dumps(index))
    save_file(held, tmp_path / "b.safetensors")
    reads = watch_reads(monkeypatch)
    found = verify(tmp_path / "a", tmp_path / "b.safetensors")
    paths = [*(tmp_path / "a").glob("*.safetensors"), tmp_path / "b.safetensors"]
    sizes = [read.nbytes for read in contents_read(reads, *paths)]
    assert isinstance(found, Comparison) and found.ok and found.parameters == 2000
    assert len(sizes) <= 10 and sum(sizes) == 2 * 2000 * 24
    held["layers.7.w"][1, 2] += 1
    held["layers.1999.w"][0, 0] += 1
    save_file(held, tmp_path / "b.safetensors")
    found = verify(tmp_path / "a", tmp_path / "b.safetensors")
    assert isinstance(found, Comparison)
    assert [(d.name, d.first[0].at) for d in found.differences] == [
        ("layers.1999.w", (0, 0)),
        ("layers.7.w", (1, 2)),
    ]
