"""Long runs of a read go to their places in the call that reads them, and no copy follows."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext import encrypt
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strided import StridedCopy
from ms_ckpt_ext.core.planning.io_units import Limits, ReadCopy
from ms_ckpt_ext.engine.copying.strides import copy_strided, scattered
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.reshard import recut_job
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import StorageError, TruncatedFileError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import PLAIN, Access
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.linux import address_of
from ms_ckpt_ext.storage.reader import PlainReader
from tests.engine.files.test_golden import assert_is
from tests.support.checkpoints import FULL, cut, read_file, read_merged, strategy_of, tree
from tests.support.machine import c_library

K = 4096


def rows(count: int, run: int, stride: int, target: int = 0, source: int = 0, step: int = 0) -> StridedCopy:
    return StridedCopy(run, (count,), source, (step or run,), target, (stride,))


# (copies of a read, its bytes, where they go)
PLACED = [
    ([rows(2, K, 3 * K)], 2 * K, [(0, 0, K), (0, 3 * K, 4 * K)]),
    (
        [rows(2, K, K, step=3 * K), rows(2, 2 * K, 2 * K, source=K, step=3 * K)],
        6 * K,
        [(0, 0, K), (1, 0, 2 * K), (0, K, 2 * K), (1, 2 * K, 4 * K)],
    ),
    ([StridedCopy(K, (), K, (), 0, ()), StridedCopy(K, (), 0, (), 7, ())], 2 * K, [(1, 7, 7 + K), (0, 0, K)]),
    ([rows(2, K - 1, 2 * K)], 2 * K - 2, []),  # short runs
    (
        [StridedCopy(9, (), 0, (), 5, ()), rows(1, 2 * K, K, source=9)],
        2 * K + 9,
        [(0, 5, 14), (1, 0, 2 * K)],
    ),  # one of them
    ([rows(2, K, 3 * K, step=2 * K)], 3 * K, []),  # a gap that nobody wants
    ([rows(2, K, K), rows(1, K, K)], 2 * K, []),  # bytes that two copies want
    ([rows(2, K, K), rows(1, K, K)], 3 * K, []),  # the same, with a gap of that size
    ([rows(2, K, K), rows(1, K, K, source=2 * K)], 3 * K, [(0, 0, K), (0, K, 2 * K), (1, 0, K)]),
    ([StridedCopy(K, (2, 2), 0, (3 * K, K), 0, (2 * K, K))], 4 * K, []),  # a gap between rows
    ([rows(2, K, K, step=2 * K), rows(1, 2 * K, K, source=K, step=2 * K)], 4 * K, []),  # other neighbours
    ([rows(2, K, K, step=2 * K), rows(1, K, K, source=K, step=2 * K), rows(1, K, K, source=3 * K)], 4 * K, []),
    ([rows(2, K, 5 * K + 1)], 2 * K, []),  # beyond the end of where it goes
    ([rows(2, K, 0)], 2 * K, []),
]


@pytest.mark.parametrize(("copies", "nbytes", "expected"), PLACED)
def test_where_the_bytes_of_a_read_go(
    copies: list[StridedCopy], nbytes: int, expected: list[tuple[int, int, int]]
) -> None:
    buffers = [memoryview(bytearray(6 * K)) for _ in copies]
    vector = scattered([ReadCopy(n, copy) for n, copy in enumerate(copies)], nbytes, buffers, K)
    starts = [address_of(buffer) for buffer in buffers]
    places = [(starts[n] + low, high - low) for n, low, high in expected]
    assert vector == (array("Q", chain.from_iterable(places)) if expected else None)


@given(data=st.data())
def test_copies_in_turn(data: st.DataObject) -> None:
    """A read of several axes, whose rows go to several stretches with gaps: as one copy after another would do it."""
    counts = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    runs = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    row = sum(runs)
    strides = tuple(row * math.prod(counts[axis + 1 :]) for axis in range(len(counts)))
    nbytes, at, copies = row * math.prod(counts), 0, []
    for run in runs:
        apart, steps = run, []
        for count in reversed(counts):
            apart += data.draw(st.integers(0, 3))
            steps.insert(0, apart)
            apart *= count
        copies.append(StridedCopy(run, counts, at, strides, data.draw(st.integers(0, 5)), tuple(steps)))
        at += run
    source = np.random.default_rng(0).bytes(nbytes)
    expected = [bytearray(copy.target + 4 * apart_of(copy)) for copy in copies]
    found = [memoryview(bytearray(len(each))) for each in expected]
    order = data.draw(st.permutations(range(len(runs))))
    vector = scattered([ReadCopy(n, copies[n]) for n in order], nbytes, found, shortest=1)
    assert vector is not None
    for copy, target in zip(copies, expected):
        copy_strided(copy, source, target)
    at = 0
    for address, length in zip(vector[::2], vector[1::2]):
        ctypes.memmove(address, source[at : at + length], length)
        at += length
    assert at == nbytes
    assert found == expected


def apart_of(copy: StridedCopy) -> int:
    return copy.counts[0] * copy.target_strides[0] + copy.run


@given(data=st.data())
def test_a_reader_fills_buffers_in_order(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the kernel gives at once, from any offset, into more buffers than one call takes."""
    path = tmp_path_factory.getbasetemp() / "scattered"
    content = np.random.default_rng(0).bytes(4000 + 300 * 11 * 90)
    path.write_bytes(content)
    offset = data.draw(st.integers(0, 4000))
    sizes = data.draw(st.lists(st.integers(0, 90), max_size=11)) * data.draw(st.sampled_from([1, 1, 300]))
    calls = iter(data.draw(st.lists(st.integers(1, 200), max_size=20)))
    buffers = [memoryview(bytearray(size)) for size in sizes]

    def stopping_early(fd: int, vector: int, count: int, at: int) -> int:
        assert count <= os.sysconf("SC_IOV_MAX")
        some = (ctypes.c_uint64 * (2 * count)).from_address(vector)
        most = next(calls, 1 << 20)
        places = array("Q")
        for address, length in zip(some[::2], some[1::2]):
            places.extend((address, min(most, length)))
            most -= min(most, length)
        return real.preadv(fd, places.buffer_info()[0], count, at)

    with pytest.MonkeyPatch.context() as patched:
        real: Any = c_library(patched, preadv=stopping_early)
        with PlainReader(str(path)) as source:
            source.scatter(offset, places_of(buffers))
    assert b"".join(buffers) == content[offset : offset + sum(sizes)]


def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    buffers = [memoryview(bytearray(5)), memoryview(bytearray(15))]
    with PlainReader(str(path)) as source:
        with pytest.raises(TruncatedFileError, match="ended at byte 100 while 10 more bytes were expected"):
            source.scatter(90, places_of(buffers))
        source.close()
        with pytest.raises(StorageError, match="the reader is closed"):
            source.scatter(0, places_of(buffers))


def test_a_read_that_fails(tmp_path: Path) -> None:
    buffers = [memoryview(bytearray(5))]
    (tmp_path / "file").write_bytes(bytes(5))
    folder = os.open(tmp_path, os.O_RDONLY)
    with PlainReader(str(tmp_path / "file")) as reader:
        assert reader.fd is not None
        os.dup2(folder, reader.fd)  # which cannot be read
        with pytest.raises(StorageError, match="read 5 bytes at offset 0 of"):
            reader.scatter(0, places_of(buffers))
    os.close(folder)


def places_of(buffers: Sequence[memoryview]) -> array[int]:
    return array("Q", chain.from_iterable((address_of(buffer), len(buffer)) for buffer in buffers))


LONG = Limits(run=1)
"""Every run is a long one, as the slices of large models have them."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many places each read by the kernel has filled."""
    found: list[int] = []

    def noted(fd: int, vector: int, count: int, at: int) -> int:
        found.append(count)
        return real.preadv(fd, vector, count, at)

    real: Any = c_library(monkeypatch, preadv=noted)
    return found


def merge(shards: Path, strategy: Path, target: Path, access: Access = PLAIN) -> None:
    catalog = open_catalog(str(shards), load_strategy(strategy), access=access)
    execute(merge_job(catalog, str(target), MergeOptions()), str(target), 2, LONG)


def recut(shards: Path, strategy: Path, wanted: Path, target: Path) -> None:
    catalog, cuts = open_catalog(str(shards), load_strategy(strategy)), load_strategy(wanted)
    job = recut_job(catalog, cuts, range(cuts.world), lambda rank: f"rank_{rank}/net.safetensors")
    execute(job, str(target), 2, LONG)


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize(
    ("case", "other"),
    [("dp2_tp4_zero", "tp4"), ("dp3_tp8", "dp2_tp4"), ("dp2_tp4_layout", "dp2_tp4_layout"), ("tp4_pp2", "dp3_tp8")],
)
def test_golden_files(
    case: str,
    other: str,
    able: bool,
    golden: Path,
    tmp_path: Path,
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not able:
        c_library(monkeypatch, preadv=None)
    shards, strategy = golden / case / "shards", golden / case / "strategy.ckpt"
    merge(shards, strategy, tmp_path / "merged")
    assert read_merged(tmp_path / "merged")[0] == read_file(golden / FULL[case] / "model.safetensors")
    recut(shards, strategy, golden / other / "strategy.ckpt", tmp_path / "cut")
    assert_is(tmp_path / "cut", golden / other / "shards")
    assert bool(calls) is (able and case == "dp2_tp4_zero")  # the reads of the others have gaps


def test_encrypted_files_are_not_read_by_the_kernel(golden: Path, tmp_path: Path, calls: list[int]) -> None:
    shards, strategy = golden / "dp2_tp4_zero" / "shards", golden / "dp2_tp4_zero" / "strategy.ckpt"
    encrypt(shards, tmp_path / "sealed", enc_key=bytes(range(32)))
    merge(tmp_path / "sealed", strategy, tmp_path / "merged", Access(Key(bytes(range(32)))))
    assert not calls
    assert read_merged(tmp_path / "merged")[0] == read_file(golden / FULL["dp2_tp4_zero"] / "model.safetensors")


DEAR = ("numpy", "dataclasses", "inspect", "logging", "concurrent.futures", "ast")
"""Importing them takes longer than everything that a file job does before it reads."""


def test_a_job_imports_what_it_needs(tmp_path: Path) -> None:
    """Four column slices, long rows, merged and cut into two."""
    layouts = {"w": Layout((1, 4), ((), (0,)))}
    strategy = strategy_of(layouts, tmp_path / "four.ckpt")
    strategy_of({"w": Layout((1, 2), ((), (0,)))}, tmp_path / "two.ckpt")
    whole = np.random.default_rng(1).standard_normal((300, 8192), np.float32)
    cut(strategy, {"w": whole}, tmp_path / "src")
    code = (
        "import sys, json; from ms_ckpt_ext import load_distributed_checkpoint, merge, reshard; "
        f"a = merge({str(tmp_path / 'src')!r}, {str(tmp_path / 'out')!r}, strategy={str(tmp_path / 'four.ckpt')!r}, "
        "sync=False); "
        f"b = reshard({str(tmp_path / 'src')!r}, {str(tmp_path / 'cut')!r}, strategy={str(tmp_path / 'four.ckpt')!r}, "
        f"to_strategy={str(tmp_path / 'two.ckpt')!r}, sync=False); "
        f"load_distributed_checkpoint(None, None, {str(tmp_path / 'two.ckpt')!r}, {str(tmp_path / 'four.ckpt')!r}, "
        f"format='safetensors', unified_safetensors_dir={str(tmp_path / 'src')!r}, "
        f"dst_safetensors_dir={str(tmp_path / 'drop-in')!r}, sync=False); "
        f"print(json.dumps([a.bytes_read, b.bytes_read, [name for name in {DEAR} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == [whole.nbytes, whole.nbytes, []]
    found, _ = read_merged(tmp_path / "out")
    assert found["w"].data == whole.tobytes()
    for folder in ("cut", "drop-in"):
        halves = [tree(tmp_path / folder)[f"rank_{rank}/net.safetensors"] for rank in (0, 1)]
        assert all(half.endswith(whole[:, 4096 * n : 4096 * (n + 1)].tobytes()) for n, half in enumerate(halves))
