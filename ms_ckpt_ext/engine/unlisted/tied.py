"""Do copies that pipeline stages cut differently agree? Samples of them, for jobs that read one of the copies.

Tied embeddings lie in the files of two stages, and where both cut them alike, the files are copies that a job may read
in place of each other. Where not, a job reads one cut, and never sees what another holds. For every two cuts some rows
of their overlap are compared, and a warning names what differs; `verify` compares all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.layout import cell_region, digits
from ms_ckpt_ext.core.planning.pieces import SourceTensor, pieces
from ms_ckpt_ext.engine.integrity.copies import Overlap, copies_of, holders_of, overlaps
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.whole_slices import Look, Probe

_ROWS, _ROW_BYTES = 16, 4096
"""How many rows of two cuts' overlap are compared, and how many bytes of each."""


class _Pair(NamedTuple):
    """The same bytes of a parameter in two files."""

    name: str
    one: Probe
    other: Probe


def warn_unlike(catalog: Catalog, look: Look, tell: bool = True) -> None:
    """Log which parameters differ between stages that cut them differently; without `tell`, another rank logs it.

    `catalog` is that of the files, before rules. The same inputs make the same probes, so `look` may be collective.
    Raises FormatError or StorageError as `look` does.
    """
    held = {name: tensor for name, tensor in catalog.tensors.items() if len(copies_of(tensor)) > 1}
    pairs = [pair for tensor in held.values() for pair in _pairs(tensor)]
    if not pairs:
        return
    seen = look([probe for pair in pairs for probe in pair[1:]])
    unlike = {p.name: None for p, a, b in zip(pairs, seen[::2], seen[1::2]) if a.digest != b.digest}
    for name in unlike if tell else ():
        first, *others = map(holders_of, copies_of(held[name]))
        log.warning(
            "parameter %r is cut differently by several pipeline stages, and the copy of %s is not that of %s; the "
            "first that holds a region of it is taken, verify tells where they differ",
            name,
            first,
            " and ".join(others),
        )


def _pairs(tensor: SourceTensor) -> Iterator[_Pair]:
    if tensor.meta.dtype.bits % 8:
        return
    met = list(overlaps(tensor))
    for both in _spread(met, _ROWS):
        regions = [_slice_of(copy, both.region) for copy in (both.one, both.other)]
        for row in _rows(both, max(1, _ROWS // len(met))):
            yield _Pair(
                tensor.meta.name,
                *(_probe(tensor, files[0], region, row) for files, region in zip(both.files, regions)),
            )


def _spread(items: Sequence[Overlap], most: int) -> Sequence[Overlap]:
    return items if len(items) <= most else [items[n * (len(items) - 1) // (most - 1)] for n in range(most)]


def _slice_of(copy: SourceTensor, region: Region) -> Region:
    """The slice of a copy that holds a region."""
    parts, shape = copy.placements[0].parts, copy.meta.shape
    return cell_region(pieces(shape, parts, region)[0].cell, parts, shape)


def _rows(both: Overlap, most: int) -> Iterator[Region]:
    """Runs along the last axis of two slices' overlap, spread over it."""
    region, shape = both.region, both.region.shape
    count = prod(shape[:-1])
    width = both.one.meta.dtype.bits // 8
    for number in sorted({n * (count - 1) // max(1, most - 1) for n in range(min(most, count))}):
        at = (*digits(number, shape[:-1]), *([0] * bool(shape)))
        start = tuple(low + index for low, index in zip(region.start, at))
        long = min(shape[-1], max(1, _ROW_BYTES // width)) if shape else 1
        yield Region(start, tuple(low + 1 for low in start[:-1]) + ((start[-1] + long,) if start else ()))


def _probe(tensor: SourceTensor, file: int, lies_in: Region, row: Region) -> Probe:
    """The probe of a run in the file that holds a slice."""
    number = 0
    for low, start, extent in zip(row.start, lies_in.start, lies_in.shape):
        number = number * extent + low - start
    width = tensor.meta.dtype.bits // 8
    return Probe(file, tensor.stored_name, number * width, row.size * width)
