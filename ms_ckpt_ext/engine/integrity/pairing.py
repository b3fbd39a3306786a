"""What of two checkpoints is compared with what, settled from their tables of contents.

1. A parameter that both have in one dtype and shape is compared as a whole.
2. What pipeline stages hold in different cuts (tied embeddings) is there more than once: every such copy is compared,
   with all of the other side.
3. What each rank has of its own outside the strategy is compared rank by rank, where both sides have it so.
4. All else is a mismatch, or on one side only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Optional, Union

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.pieces import SourceTensor, require
from ms_ckpt_ext.engine.integrity.copies import copies_of, holders_of, regions_of
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import of_rank
from ms_ckpt_ext.errors import name_ranks

Own = Mapping[int, SourceTensor]
"""Rank -> what it has of its own."""
Kept = Union[SourceTensor, Own]


class Mismatch(NamedTuple):
    """A parameter whose dtype or shape differs: both as words ("F32[2, 3]")."""

    name: str
    a: str
    b: str


class Pair(NamedTuple):
    """A parameter on both sides: what to compare of it, and, where it is one copy of several, which."""

    name: str
    a: SourceTensor
    b: SourceTensor
    regions: tuple[Region, ...]
    of: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes to compare, of one side."""
        return self.a.meta.dtype.nbytes(sum(region.size for region in self.regions))


@dataclass(frozen=True)
class Pairing:
    """What is to be compared, found without reading a value."""

    pairs: tuple[Pair, ...]
    mismatches: tuple[Mismatch, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to compare, of one side."""
        return sum(pair.nbytes for pair in self.pairs)


def everything(catalog: Catalog) -> dict[str, Kept]:
    """All that a checkpoint holds, by name, where what lies outside the strategy was compared."""
    own = {name: {r: of_rank(held, catalog.files, r) for r in held.files} for name, held in catalog.own.items()}
    return {**own, **catalog.extras, **catalog.tensors}


def pair_up(a: Mapping[str, Kept], b: Mapping[str, Kept]) -> Pairing:
    """Match the parameters of two checkpoints by name.

    Raises CoverageError when either side lacks a region of a parameter that it should hold.
    """
    pairs: list[Pair] = []
    mismatches: list[Mismatch] = []
    for name in sorted(a.keys() & b.keys()):
        found = _pairs(name, a[name], b[name])
        if found is None:
            mismatches.append(Mismatch(name, _told(a[name]), _told(b[name])))
        else:
            pairs += found
    return Pairing(
        tuple(pairs), tuple(mismatches), tuple(sorted(a.keys() - b.keys())), tuple(sorted(b.keys() - a.keys()))
    )


def _pairs(name: str, one: Kept, two: Kept) -> Optional[list[Pair]]:
    """What is compared under one name; None where the two do not match."""
    if isinstance(one, SourceTensor) and isinstance(two, SourceTensor):
        return None if _kind(one) != _kind(two) else [*_whole(name, one, two), *_copies(name, one, two)]
    if isinstance(one, SourceTensor) or isinstance(two, SourceTensor):
        return None
    if one.keys() != two.keys() or any(_kind(one[rank]) != _kind(two[rank]) for rank in one):
        return None
    return [pair for r in one for pair in _whole(name, one[r], two[r], f"what rank {r} has of its own")]


def _whole(name: str, one: SourceTensor, two: SourceTensor, of: str = "") -> Iterator[Pair]:
    regions = (Region.whole(one.meta.shape),) if all(one.meta.shape) else ()
    for region in regions:
        require(one, [region])
        require(two, [region])
    yield Pair(name, one, two, regions, of)


def _copies(name: str, one: SourceTensor, two: SourceTensor) -> Iterator[Pair]:
    for copy in copies_of(one)[1:]:
        yield Pair(name, copy, two, regions_of(copy), f"the copy of {holders_of(copy)} in a")
    for copy in copies_of(two)[1:]:
        yield Pair(name, one, copy, regions_of(copy), f"the copy of {holders_of(copy)} in b")


def _told(kept: Kept) -> str:
    if isinstance(kept, SourceTensor):
        return _kind(kept)
    kinds: dict[str, list[int]] = {}
    for rank, tensor in kept.items():
        kinds.setdefault(_kind(tensor), []).append(rank)
    return ", ".join(f"{kind} of its own on {name_ranks(ranks)}" for kind, ranks in kinds.items())


def _kind(tensor: SourceTensor) -> str:
    return f"{tensor.meta.dtype.name}{list(tensor.meta.shape)}"
