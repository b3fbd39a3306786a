"""Cut under A, reshard to B: equals cut under B, and every byte of the target is written exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES, DType, Region
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strided import StridedCopy, strided_copy
from ms_ckpt_ext.core.planning.io_units import Batch, Direct, Extent, Landing, Limits, Target, Task, Unit
from ms_ckpt_ext.core.planning.pieces import Piece, Placement, SourceTensor, TensorMeta, locate, pieces
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying.strides import copy_strided
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError
from tests.support.strategies import dtypes, pairs

Files = dict[int, np.ndarray]


def array_of(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """Distinct contents as bytes: the last axis is the element."""
    width = dtype.bits // 8
    return np.random.default_rng(0).integers(0, 256, (*shape, width), np.uint8)


def cut(array: np.ndarray, region: Region) -> bytes:
    return np.ascontiguousarray(array[region.slices]).tobytes()


def source_of(layout: Layout, shape: tuple[int, ...], dtype: DType, name: str = "w") -> SourceTensor:
    holders = layout.holders
    return SourceTensor(TensorMeta(name, dtype, shape), name, (Placement(layout.parts, holders, holders),))


@given(pairs())
def test_pieces_cover_every_target_once_and_hold_the_right_elements(case: tuple[Layout, Layout, tuple]) -> None:
    a, b, shape = case
    assume(prod(shape) <= 200_000)
    full = np.arange(prod(shape)).reshape(shape)
    for cell, ranks in b.holders.items():
        target = b.region(ranks[0], shape)
        built, written = np.full(target.shape, -1), np.zeros(target.shape, int)
        for piece in pieces(shape, a.parts, target):
            slice_of_a = full[a.region(a.holders[piece.cell][0], shape).slices]
            built[piece.in_target.slices] = slice_of_a[piece.in_source.slices]
            written[piece.in_target.slices] += 1
        assert (written == 1).all(), cell
        assert (built == full[target.slices]).all()


def run(units: Iterable[Unit], files: Files, sizes: Sequence[int]) -> Iterator[tuple[Unit, Files, Files]]:
    """Interpret units over arrays: gives behind each of them the sinks, and how often every byte of them is written."""
    sinks = {n: np.zeros(size, np.uint8) for n, size in enumerate(sizes)}
    written = {n: np.zeros(size, np.uint8) for n, size in enumerate(sizes)}

    def put(sink: int, offset: int, data: np.ndarray) -> None:
        sinks[sink][offset : offset + data.size] = data
        written[sink][offset : offset + data.size] += 1

    for unit in units:
        if isinstance(unit, Direct):
            put(unit.sink, unit.target, files[unit.file][unit.source : unit.source + unit.length])
        else:
            buffers = [np.zeros(stretch.nbytes, np.uint8) for stretch in unit.stretches]
            for read in unit.reads:
                data = np.concatenate([files[read.file][o : o + n] for o, n in read.extents])
                assert data.size == read.nbytes, "what is read lies in the file"
                for stretch, copy in read.copies:
                    copy_strided(copy, data, buffers[stretch])
            for stretch, buffer in zip(unit.stretches, buffers):
                for sink, offset, skip, length in stretch.places:
                    put(sink, offset, buffer[skip : skip + length])
        yield unit, sinks, written


def lay_out(layout: Layout, full: np.ndarray, shape: tuple[int, ...], seams: list[int]) -> tuple[Files, dict]:
    """One file per rank, its slice in extents cut at `seams`, with foreign bytes between them."""
    files, stored = {}, {}
    for rank in range(layout.devices):
        data = np.frombuffer(cut(full, layout.region(rank, shape)), np.uint8)
        edges = sorted({0, data.size, *(seam % data.size for seam in seams)})
        parts, extents, at = [], [], 5
        for low, high in zip(edges, edges[1:]):
            parts += [np.full(5, 0xEE, np.uint8), data[low:high]]
            extents.append(Extent(at, high - low))
            at += high - low + 5
        files[rank], stored[rank] = np.concatenate(parts), tuple(extents)
    return files, stored


@given(
    pairs(16),
    dtypes,
    st.sampled_from([8, 64, 1 << 20]),
    st.sampled_from([1, 64, 1 << 20]),
    st.lists(st.integers(0, 999), max_size=2),
)
def test_scheduled_io_equals_the_cut(
    case: tuple[Layout, Layout, tuple], dtype: DType, tile: int, direct: int, seams: list[int]
) -> None:
    a, b, shape = case
    assume(prod(shape) <= 3000)
    full = array_of(shape, dtype)
    files, stored = lay_out(a, full, shape, seams)
    wanted = [b.region(rank, shape) for rank in range(b.devices)]
    targets: dict[Region, list[Landing]] = {}
    for rank, region in enumerate(wanted):
        targets.setdefault(region, []).append(Landing(rank, (Extent(0, dtype.nbytes(region.size)),)))
    task = Task(source_of(a, shape, dtype), tuple(Target(r, tuple(ls)) for r, ls in targets.items()))
    sizes = [dtype.nbytes(region.size) for region in wanted]
    units = schedule([task], lambda file, _: stored[file], Limits(tile=tile, gap=2, direct=direct, chunk=16))
    *_, (_, sinks, written) = run(units, files, sizes)
    assert all((count == 1).all() for count in written.values())
    for rank, region in enumerate(wanted):
        assert sinks[rank].tobytes() == cut(full, region)


def piece(source_shape: tuple, region: tuple, start: tuple) -> Piece:
    low, high = region
    size = tuple(b - a for a, b in zip(low, high))
    return Piece(
        (0,) * len(low), source_shape, Region(low, high), Region(start, tuple(s + n for s, n in zip(start, size)))
    )


@pytest.mark.parametrize(
    ("made", "target_shape", "dtype", "copy"),
    [
        (piece((4, 6), ((1, 0), (3, 6)), (0, 0)), (2, 6), "F32", StridedCopy(48, (), 24, (), 0, ())),
        (piece((4, 6), ((0, 2), (4, 4)), (0, 0)), (4, 2), "F32", StridedCopy(8, (4,), 8, (24,), 0, (8,))),
        (piece((4, 2), ((0, 0), (4, 2)), (0, 4)), (4, 6), "BF16", StridedCopy(4, (4,), 0, (4,), 8, (12,))),
        (piece((), ((), ()), ()), (), "F64", StridedCopy(8, (), 0, (), 0, ())),
        (piece((2, 8), ((0, 4), (2, 8)), (0, 0)), (2, 4), "F4", StridedCopy(2, (2,), 2, (4,), 0, (2,))),
        (
            piece((2, 3, 4), ((0, 0, 0), (2, 2, 4)), (0, 1, 0)),
            (2, 5, 4),
            "U8",
            StridedCopy(8, (2,), 0, (12,), 4, (20,)),
        ),
    ],
)
def test_strided_copies(made: Piece, target_shape: tuple, dtype: str, copy: StridedCopy) -> None:
    assert strided_copy(made, target_shape, DTYPES[dtype]) == copy
    assert copy.nbytes == copy.run * prod(copy.counts)


def test_a_packed_type_is_not_cut_inside_a_byte() -> None:
    with pytest.raises(LayoutMismatchError, match="cuts F4 elements .* inside a byte"):
        strided_copy(piece((2, 6), ((0, 3), (2, 6)), (0, 0)), (2, 3), DTYPES["F4"])


def test_projections_have_one_shape() -> None:
    with pytest.raises(ValueError, match="projections of different shape"):
        Piece((0,), (4,), Region((0,), (2,)), Region((0,), (3,)))


def test_what_no_file_holds_is_named() -> None:
    placement = Placement((4, 1), {(0, 0): (0,), (1, 0): (1,)}, {(2, 0): (2, 6), (3, 0): (3, 7)})
    tensor = SourceTensor(TensorMeta("layers.0.w", DTYPES["F32"], (8, 4)), "layers.0.w", (placement,))
    assert len(locate(tensor, Region((0, 0), (4, 4)))) == 2
    with pytest.raises(CoverageError) as caught:
        locate(tensor, Region((2, 0), (6, 4)))
    for told in ("'layers.0.w'", "[4:6, 0:4]", "[8, 4]", "one of the ranks 2, 6"):
        assert told in str(caught.value)


def test_what_one_placement_lacks_comes_from_the_next() -> None:
    rows = Placement((2, 1), {(0, 0): (0,)}, {(1, 0): (1,)})
    columns = Placement((1, 2), {(0, 0): (2,), (0, 1): (3,)}, {})
    tensor = SourceTensor(TensorMeta("tied", DTYPES["U8"], (4, 4)), "tied", (rows, columns))
    found = locate(tensor, Region.whole((4, 4)))
    assert [(sourced.piece.in_target, sourced.files) for sourced in found] == [
        (Region((0, 0), (2, 4)), (0,)),
        (Region((2, 0), (4, 2)), (2,)),
        (Region((2, 2), (4, 4)), (3,)),
    ]


def units(layout: Layout, shape: tuple, targets: list[Target], limits: Limits) -> list:
    tensor = source_of(layout, shape, DTYPES["U8"])
    nbytes = prod(layout.slice_shape(shape))
    return list(schedule([Task(tensor, tuple(targets))], lambda *_: (Extent(100, nbytes),), limits))


def test_a_long_run_on_both_sides_needs_no_buffer() -> None:
    target = Target(Region.whole((4, 8)), (Landing(0, (Extent(1000, 32),)),))
    assert units(Layout((2,), ((0,), ())), (4, 8), [target], Limits(direct=16, chunk=10)) == [
        Direct(0, 100, 0, 1000, 10),
        Direct(0, 110, 0, 1010, 6),
        Direct(1, 100, 0, 1016, 10),
        Direct(1, 110, 0, 1026, 6, last=True),
    ]


def test_bytes_that_several_targets_want_are_read_once() -> None:
    """Columns of one row-major slice for four targets: the slice is read in one go."""
    halves = [Target(Region((0, n), (4, n + 2)), (Landing(n, (Extent(0, 8),)),)) for n in (0, 2, 4, 6)]
    (batch,) = units(Layout((1,), ((), ())), (4, 8), halves, Limits(direct=1 << 20))
    assert isinstance(batch, Batch)
    assert [read.extents for read in batch.reads] == [(Extent(100, 32),)]


def test_only_the_wanted_columns_are_read_when_gaps_are_wide() -> None:
    target = Target(Region((0, 0), (3, 10)), (Landing(0, (Extent(0, 30),)),))
    (batch,) = units(Layout((1,), ((), ())), (3, 100), [target], Limits(gap=20, direct=1 << 20))
    assert [read.extents for read in batch.reads] == [(Extent(start, 10),) for start in (100, 200, 300)]
    (batch,) = units(Layout((1,), ((), ())), (3, 100), [target], Limits(gap=90, direct=1 << 20))
    assert [read.extents for read in batch.reads] == [(Extent(100, 210),)]


def test_tiles_bound_a_batch_and_replicas_share_it() -> None:
    twice = Target(Region.whole((64, 16)), (Landing(0, (Extent(0, 1024),)), Landing(1, (Extent(64, 1024),))))
    batches = units(Layout((2,), ((), (0,))), (64, 16), [twice], Limits(tile=256, direct=1 << 20))
    assert len(batches) == 4
    for batch in batches:
        assert sum(stretch.nbytes for stretch in batch.stretches) <= 256
        assert {place.sink for stretch in batch.stretches for place in stretch.places} == {0, 1}


def test_replicas_spread_the_reading() -> None:
    layout = Layout((4,), ((), ()))
    targets = [Target(Region((n, 0), (n + 1, 64)), (Landing(n, (Extent(0, 64),)),)) for n in range(8)]
    found = units(layout, (8, 64), targets, Limits(direct=1))
    assert sorted(unit.file for unit in found) == [0, 0, 1, 1, 2, 2, 3, 3]
