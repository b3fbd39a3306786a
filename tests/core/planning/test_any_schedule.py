"""Whatever is wanted, of whatever lies however: every byte lands once, in batches and reads that are bounded."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.layout import cell_region
from ms_ckpt_ext.core.planning.io_units import Batch, Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.core.planning.schedule import schedule
from tests.core.planning.test_resharding import Files, array_of, cut, run

ANY_LIMITS = st.builds(
    Limits,
    tile=st.sampled_from([1, 8, 30, 100, 1 << 20]),
    gap=st.sampled_from([0, 3, 16, 4096]),
    direct=st.sampled_from([1, 12, 1 << 20, 1 << 20]),
    chunk=st.sampled_from([5, 1 << 20]),
)


class Wanted(NamedTuple):
    """A landing, and the bytes that belong there."""

    landing: Landing
    content: bytes


class Job(NamedTuple):
    """Tasks, what is wanted by each, what the files hold, where in them a tensor lies, and the sizes of the sinks."""

    tasks: list[Task]
    wanted: list[list[Wanted]]
    files: Files
    stored: dict[tuple[int, str], tuple[Extent, ...]]
    sizes: list[int]


class _Files:
    """Files being filled; file 0 holds much else first."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw
        self.contents: dict[int, bytes] = {}
        self.stored: dict[tuple[int, str], tuple[Extent, ...]] = {}

    def put(self, file: int, name: str, data: bytes) -> None:
        """Behind what is there, in one extent or two."""
        held = self.contents.get(file, bytes(50) if file == 0 else b"")
        seam = self._draw(st.sampled_from([0, 0, len(data) // 3]))
        extents = []
        for part in filter(None, (data[:seam], data[seam:])):
            held += b"\xee" * self._draw(st.integers(0, 5))
            extents.append(Extent(len(held), len(part)))
            held += part
        self.contents[file], self.stored[file, name] = held, tuple(extents)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A box of an array: often all of it."""
    if draw(st.booleans()):
        return Region.whole(shape)
    lows = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    return Region(lows, tuple(draw(st.integers(low + 1, extent)) for low, extent in zip(lows, shape)))


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Some parameters in one placement or two, the first of which may lack slices; boxes of them for some places."""
    files, tasks, wanted, sizes = _Files(draw), [], [], [0, 0]
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 6), max_size=3)))
        dtype, name = DTYPES[draw(st.sampled_from(["U8", "F32"]))], f"w{number}"
        full = array_of(shape, dtype)
        placements = []
        for first in [50, 0] if draw(st.booleans()) else [0]:
            parts = tuple(draw(st.sampled_from([n for n in (1, 2, 3) if extent % n == 0])) for extent in shape)
            holders = {}
            for at, cell in enumerate(product(*map(range, parts))):
                if first and draw(st.booleans()):
                    continue
                holders[cell] = draw(st.sampled_from([(first + at,), (first + at, 100 + first + at)]))
                for file in holders[cell]:
                    files.put(file, name, cut(full, cell_region(cell, parts, shape)))
            placements.append(Placement(parts, holders, {}))
        targets, here = [], []
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            region = draw(boxes(shape))
            landings = []
            for sink in draw(st.sampled_from([(0,), (0,), (0, 1), (1, 1)])):
                nbytes = dtype.nbytes(region.size)
                seam = draw(st.sampled_from([0, nbytes // 2]))
                pieces = Extent(sizes[sink] + nbytes - seam, seam), Extent(sizes[sink], nbytes - seam)
                sizes[sink] += nbytes
                landings.append(Landing(sink, tuple(extent for extent in pieces if extent.length)))
                here.append(Wanted(landings[-1], cut(full, region)))
            targets.append(Target(region, tuple(landings)))
        tasks.append(Task(SourceTensor(TensorMeta(name, dtype, shape), name, tuple(placements)), tuple(targets)))
        wanted.append(here)
    contents = {file: np.frombuffer(held, np.uint8) for file, held in files.contents.items()}
    return Job(tasks, wanted, contents, files.stored, sizes)


@given(jobs(), ANY_LIMITS)
def test_every_byte_lands_once_and_a_batch_ends_with_whole_parameters(job: Job, limits: Limits) -> None:
    units = schedule(job.tasks, lambda file, name: job.stored[file, name], limits)
    last, sinks = False, {}
    for unit, landed, written in run(units, job.files, job.sizes):
        last, sinks = unit.last, landed
        if isinstance(unit, Batch):
            assert 0 < unit.nbytes < limits.tile + 3 * max(limits.tile, 4), "of three targets a tile each"
            assert all(read.nbytes <= 2 * max(limits.tile, 4) for read in unit.reads)
            for here in job.wanted if last else ():
                counts = {
                    n
                    for each in here
                    for at, size in each.landing.extents
                    for n in written[each.landing.sink][at : at + size].tolist()
                }
                assert len(counts) == 1, "a parameter is begun and not complete"
    assert last, "what comes last ends an array"
    assert all((count == 1).all() for count in written.values())
    for each in (each for here in job.wanted for each in here):
        sink = sinks[each.landing.sink]
        assert b"".join(sink[at : at + size].tobytes() for at, size in each.landing.extents) == each.content


def test_reads_are_bounded_where_columns_of_unlike_widths_overlap() -> None:
    """Their copies are cut behind unlike rows, so that each part overlaps the next of the other."""
    shape, widths = (400, 36), (1, 2)
    tensor = SourceTensor(TensorMeta("w", DTYPES["U8"], shape), "w", (Placement((1, 1), {(0, 0): (0,)}, {}),))
    targets = tuple(
        Target(Region((0, 0), (400, width)), (Landing(n, (Extent(0, 400 * width),)),)) for n, width in enumerate(widths)
    )
    limits = Limits(tile=8 * 36 + 1, gap=35)
    units = [*schedule([Task(tensor, targets)], lambda _file, _name: (Extent(0, prod(shape)),), limits)]
    reads = [read.nbytes for unit in units if isinstance(unit, Batch) for read in unit.reads]
    assert max(reads) <= 2 * limits.tile
    assert sum(reads) < prod(shape) * 1.5, "little is read twice"
