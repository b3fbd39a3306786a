"""A checkpoint as a dictionary whose values are read when they are indexed, and no more of them than the index asks.

    held = Parameters(catalog, names)
    held["layers.0.weight"].shape          # known from the table of contents
    held["layers.0.weight"][1024:2048]     # reads these rows

An index becomes a box, the box pieces of stored slices, and those long reads, as in every other job; so a sharded or an
encrypted checkpoint is indexed like a plain file.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.core.geometry.array import INT4, Region, Shape
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import alike
from ms_ckpt_ext.engine.source.values import NUMPY, TEXT, decode_text
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.engine.unlisted.proven import refuse_own
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, integer
from ms_ckpt_ext.storage.reader import ReadCount, ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink

_LIMITS = Limits()
_PURPOSE = "it cannot be read as one"


class Selection(NamedTuple):
    """An index of an array: the box that must be read, and how the result is made of it (`box[then]`)."""

    box: Optional[Region]
    shape: Shape
    then: tuple[Union[int, slice], ...]


def select(shape: Shape, index: Any) -> Selection:
    """What an index of whole numbers, slices and `...` means for an array of `shape`, by numpy's rules.

    Raises:
        UsageError: another kind of index (lists, masks, None), or one with too many axes.
        IndexError: a whole number outside its axis.

    >>> select((8, 6), (slice(2, 4), -1))
    Selection(box=Region(start=(2, 5), stop=(4, 6)), shape=(2, 1), then=(slice(None, None, None), 0))
    """
    keys = list(index) if isinstance(index, tuple) else [index]
    rest = len(shape) - sum(key is not Ellipsis for key in keys)
    if rest < 0 or sum(key is Ellipsis for key in keys) > 1:
        raise UsageError(f"index {index!r} has too many axes for a parameter of shape {list(shape)}")
    at = next((n for n, key in enumerate(keys) if key is Ellipsis), len(keys))
    keys[at : at + 1] = [slice(None)] * rest
    axes = [_axis(extent, key) for extent, key in zip(shape, keys)]
    start, stop = tuple(low for low, _, _ in axes), tuple(high for _, high, _ in axes)
    extents = tuple(high - low for low, high, _ in axes)
    return Selection(Region(start, stop) if all(extents) else None, extents, tuple(then for _, _, then in axes))


def _axis(extent: int, key: Any) -> tuple[int, int, Union[int, slice]]:
    """First and behind-last element to read along one axis, and the index of the result in what was read."""
    if isinstance(key, slice):
        wanted = range(extent)[key]
        if not wanted:
            return 0, 0, slice(None)
        low, high = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1]) + 1
        return low, high, slice(None, None, wanted.step) if wanted.step != 1 else slice(None)
    try:
        number = range(extent)[integer(key, "an index")]
    except ArgumentTypeError:
        raise UsageError(
            f"a parameter is indexed by whole numbers, slices and '...', not by {type(key).__name__}; read it first"
        ) from None
    return number, number + 1, 0


class LazyTensor:
    """One parameter of a checkpoint. Nothing of it is read before it is indexed.

    Attributes:
        name: its name here; the file may know it by another.
        dtype: its dtype by the safetensors name: "F32", "BF16", "I8", …
        shape: of the whole parameter.
        packed: "Int4" when it is MindSpore's packed int4, two numbers an int8; else None.
    """

    def __init__(self, name: str, tensor: SourceTensor, owner: Parameters) -> None:
        self.name = name
        self.source = tensor
        self.dtype = tensor.meta.dtype.name
        self.shape = tensor.meta.shape
        self.packed: Optional[str] = INT4 if owner.catalog.notes.get(tensor.stored_name) == INT4 else None
        self._owner = owner

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        return self.source.meta.dtype.nbytes(math.prod(self.shape))

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        """Read a box: `tensor[10:20]`, `tensor[..., 3]`, `tensor[::2]` (reads the rows between as well), `tensor[...]`.

        Returns a numpy array: BF16 as its bit patterns in uint16, 8-bit floats as theirs in uint8, packed int4 as int8.
        Types narrower than a byte come as flat bytes and whole only.

        Raises:
            UsageError, IndexError: as `select`; a part of a type narrower than a byte.
            CoverageError: no file of a sharded checkpoint holds it.
            LayoutMismatchError: its strategy does not list it, and it differs by rank.
            TruncatedFileError, DecryptionError, StorageError: it cannot be read.
        """
        chosen = select(self.shape, index)
        if self.source.meta.dtype.bits < 8:
            if chosen.shape != self.shape:
                raise UsageError(f"{self.name!r} is {self.dtype}, narrower than a byte: read it whole, as [...]")
            return self._owner.read([(self.source, chosen.box, self.shape)])[0]
        (flat,) = self._owner.read([(self.source, chosen.box, chosen.shape)])
        box = flat.view(NUMPY.get(self.dtype, "u1")).reshape(chosen.shape)
        keys = index if isinstance(index, tuple) else (index,)
        # As in numpy, an index with `...` gives an array, one of numbers alone a scalar.
        return box[(..., *chosen.then)] if any(key is Ellipsis for key in keys) else box[chosen.then]

    def numpy(self) -> npt.NDArray[Any]:
        """All of it."""
        return self[...]

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> npt.NDArray[Any]:
        array = np.asarray(self.numpy())
        return array if dtype is None else array.astype(dtype)

    def __len__(self) -> int:
        if not self.shape:
            raise ArgumentTypeError(f"{self.name!r} has no axes, so it has no len()")
        return self.shape[0]

    def __bool__(self) -> bool:
        """The truth of a single element, as in numpy. Raises UsageError for more than one, where numpy raises, too."""
        if math.prod(self.shape) != 1:
            raise UsageError(
                f"{self.name!r} of shape {list(self.shape)} is neither true nor false; compare with None, or read it "
                "and use any() or all()"
            )
        return bool(self.numpy())

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.packed or self.dtype}, {list(self.shape)})"


class Parameters(Mapping[str, Union[LazyTensor, str]]):
    """Parameters by name, in the checkpoint's order; text as `str`. A context manager: leaving it closes the files.

    Args:
        catalog: the checkpoint.
        names: name here -> name in the checkpoint.
        workers: most threads of one read.
        limits: sizes of reads.
    """

    def __init__(self, catalog: Catalog, names: Mapping[str, str], workers: int = 1, limits: Limits = _LIMITS) -> None:
        self.catalog = catalog
        self.names = dict(names)
        self.workers, self.limits = workers, limits
        self._readers: ReaderPool = catalog.readers()
        self._close = weakref.finalize(self, self._readers.close)

    @property
    def count(self) -> ReadCount:
        """What was asked of the storage so far, tables of contents aside."""
        return self._readers.count

    def __getitem__(self, name: str) -> Union[LazyTensor, str]:
        tensor = self._tensor(self.names[name])
        if tensor.meta.dtype.name != TEXT:
            return LazyTensor(name, tensor, self)
        whole = select(tensor.meta.shape, ...)
        return decode_text(self.read([(tensor, whole.box, whole.shape)])[0].tobytes())

    def _tensor(self, stored: str) -> SourceTensor:
        """A parameter by its name in the catalog. Raises LayoutMismatchError: it is known to differ by rank."""
        refuse_own(self.catalog, [stored], _PURPOSE)
        found = self.catalog.tensors.get(stored) or self.catalog.extras.get(stored)
        return found or alike(self.catalog.unproven[stored], self.catalog.files)

    def prove(self, names: Iterable[str]) -> None:
        """Compare what is outside the strategy and not compared yet, by names in the catalog; what is read is proven.

        Raises LayoutMismatchError: it differs by rank.
        """
        wanted = list(names)
        self.catalog = compared(self.catalog, wanted)
        refuse_own(self.catalog, wanted, _PURPOSE)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, wanted: Sequence[tuple[SourceTensor, Optional[Region], Shape]]) -> list[npt.NDArray[Any]]:
        """Read boxes, all at once: the flat bytes of each, in order. Raises as `LazyTensor.__getitem__`."""
        if not self._close.alive:
            raise UsageError("this checkpoint was closed; load it again, or read what is needed before")
        self.prove(tensor.meta.name for tensor, _, _ in wanted)
        buffers = [np.empty(tensor.meta.dtype.nbytes(math.prod(shape)), np.uint8) for tensor, _, shape in wanted]
        tasks = [
            Task(tensor, (Target(box, (Landing(number, (Extent(0, buffers[number].size),)),)),))
            for number, (tensor, box, _) in enumerate(wanted)
            if box is not None
        ]
        units = schedule(tasks, self.catalog.stored, self.limits)
        sinks = [MemorySink(buffer) for buffer in buffers]
        worker.run(units, self._readers, sinks, self.workers, lambda *_: None, self.limits)
        self._readers.verify()
        return buffers

    def arrays(self, names: Optional[Iterable[str]] = None) -> dict[str, Union[npt.NDArray[Any], str]]:
        """Several of them (None: all), read together: name -> array or text. Raises as `LazyTensor.__getitem__`."""
        held = {name: self[name] for name in (self if names is None else names)}
        lazy = [value for value in held.values() if isinstance(value, LazyTensor)]
        whole = [select(tensor.shape, ...) for tensor in lazy]
        flats = iter(self.read([(tensor.source, box.box, tensor.shape) for tensor, box in zip(lazy, whole)]))
        return {name: _shaped(value, flats) if isinstance(value, LazyTensor) else value for name, value in held.items()}

    def close(self) -> None:
        """Close the files; nothing can be read any more."""
        self._close()

    def __enter__(self) -> Parameters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Parameters({len(self)} of {sorted({index.path for index in self.catalog.files})})"


def _shaped(tensor: LazyTensor, flats: Iterator[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    flat = next(flats)
    if tensor.source.meta.dtype.bits < 8:
        return flat
    return flat.view(NUMPY.get(tensor.dtype, "u1")).reshape(tensor.shape)
