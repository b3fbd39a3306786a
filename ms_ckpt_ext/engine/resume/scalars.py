"""Training scalars of a checkpoint, read by all ranks together: single values and texts outside the layouts.

Of those that several ranks hold, all copies are compared. Equal ones are one value for all; of what differs, such as
the state of a generator or a cursor in the data, every rank gets every rank's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, of_rank
from ms_ckpt_ext.transport.agree import NATURAL, numbered, told_by_all
from ms_ckpt_ext.transport.base import Transport

Value = Union[npt.NDArray[Any], str]
_FORM = (str, [NATURAL], str)
"""Of what `_told` makes: see `transport.agree.JsonForm`."""


class Scalars(NamedTuple):
    """What is alike on all ranks that hold it, by name; what differs, by name and rank."""

    alike: Mapping[str, Value]
    own: Mapping[str, Mapping[int, Value]]


def read_scalars(transport: Transport[Any], catalog: Catalog, sees: Optional[Sees], sharded: bool) -> Scalars:
    """Compare and read; collective.

    Args:
        catalog: the checkpoint, from its headers.
        sees: file number -> ranks that can open it; None when all see all.
        sharded: its files are those of ranks; without layouts, that of a single one. Where no layouts cut the files of
            ranks, parameters of a single element are scalars as well.

    Raises:
        FormatError, StorageError: a file cannot be read; PeerError on the ranks that did not read it.
    """
    whole = {} if sharded and catalog.strategy is not None else catalog.tensors
    names = [name for name, held in catalog.unproven.items() if _small(catalog, held)]
    if names:
        from ms_ckpt_ext.engine.unlisted.alike import compared
        from ms_ckpt_ext.engine.unlisted.dealt import Together

        catalog = compared(catalog, names, Together(transport, catalog, sees))
    wanted = list(_wanted(catalog, whole))
    if not wanted:
        return Scalars({}, {})
    from ms_ckpt_ext.engine.source.values import read_whole

    def read() -> list[tuple[int, Any]]:
        with catalog.readers() as readers:
            return [
                (number, _told(read_whole(catalog, readers, tensor)))
                for number, (_, _, tensor) in enumerate(wanted)
                if _reader(tensor, transport.size, sees) == transport.rank
            ]

    values = numbered(told_by_all(transport, read, [(NATURAL, _FORM)], _heard), len(wanted))
    alike: dict[str, Value] = {}
    own: dict[str, dict[int, Value]] = {}
    for number, (name, rank, _) in enumerate(wanted):
        if rank is None:
            alike[name] = values[number]
        else:
            own.setdefault(name, {})[rank] = values[number]
    return Scalars(alike, own)


class _Scalar(NamedTuple):
    """A name, and the rank whose it is; None where it is the same for all."""

    name: str
    rank: Optional[int]
    tensor: SourceTensor


def _wanted(catalog: Catalog, whole: Mapping[str, SourceTensor]) -> Iterator[_Scalar]:
    for name, tensor in {**whole, **catalog.extras}.items():
        if _small(catalog, tensor):
            yield _Scalar(name, None, tensor)
    for name, held in catalog.own.items():
        each = {rank: of_rank(held, catalog.files, rank) for rank in held.files}
        if all(_small(catalog, tensor) for tensor in each.values()):
            yield from (_Scalar(name, rank, tensor) for rank, tensor in each.items())


def _small(catalog: Catalog, held: Union[SourceTensor, UnlistedTensor]) -> bool:
    dtype, shape = catalog.kind(held)
    return dtype.name == "STR" or math.prod(shape) == 1


def _reader(tensor: SourceTensor, world: int, sees: Optional[Sees]) -> int:
    """Which rank reads it: one of those that see its file, chosen by the file's number."""
    file = next(iter(tensor.placements[0].holders.values()))[0]
    able = range(world) if sees is None else sorted(sees[file])
    return able[file % len(able)]


def _told(value: Value) -> tuple[str, Sequence[int], str]:
    """numpy's name of a dtype, "" for a text; a shape; and bytes as hex, or the text."""
    return ("", (), value) if isinstance(value, str) else (value.dtype.str, value.shape, value.tobytes().hex())


def _heard(answer: Sequence[tuple[int, tuple[str, Sequence[int], str]]]) -> list[tuple[int, Value]]:
    """What `_told` was given, numbered. Raises KeyError or ValueError."""
    from ms_ckpt_ext.engine.source.values import NUMPY

    dtypes = {dtype.str: dtype for dtype in map(np.dtype, (*NUMPY.values(), "u1"))}
    return [
        (number, np.frombuffer(bytes.fromhex(data), dtypes[dtype]).reshape(shape) if dtype else data)
        for number, (dtype, shape, data) in answer
    ]
