"""A checkpoint as a source: which parameters it has, and in which files the slices of each lie.

Sharded (`rank_N/…` with a strategy) or merged (`part*.safetensors` with a map), safetensors or `.ckpt`, plain or
encrypted, the result is the same value, so jobs do not care: the catalog knows how its files are opened, and offsets
are those of the plaintext. Files may lack what a strategy promises (a deduplicated slice is in one of its ranks' files
only, a weights-only checkpoint has no optimizer states): planning asks for a region and finds it or fails by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

from ms_ckpt_ext.core.geometry.array import INT4, DType, Shape
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.io_units import Extent, Task
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.engine.source.listing import Listing, list_checkpoint
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, outside_of, sharded_tensors
from ms_ckpt_ext.errors import (
    CoverageError,
    DiscoveryError,
    LayoutMismatchError,
    UsageError,
)
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import AUTHENTICATED, PLAIN, Access, read_indexes, reopen
from ms_ckpt_ext.formats.safetensors import DEDUPLICATED, SHARDING_INFO
from ms_ckpt_ext.storage.reader import ByteReader, ReaderPool

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Naming
    from ms_ckpt_ext.formats.discovery.mindformers import Folder

MOST_OPEN = 256
"""Files that a job keeps open."""
DECRYPTED_BYTES = 512 << 20
"""Plaintext that the readers of a job's encrypted files keep, together: eight blocks of MindSpore's 64 MiB."""


class Catalog(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        files: tables of contents; a file's number is its place here.
        tensors: name -> parameter that the strategy (or the map) lists.
        extras: name -> what lies outside it, whole and alike wherever it is: training scalars and the like.
        notes: parameter name -> metadata that must travel with it ("Int4").
        access: how the files are opened.
        absent: name -> where it should be and is not: a parameter of a pipeline stage without any file, or one that a
            map places in a file without it. Only who wants it is refused.
        own: name -> what lies outside it and differs: each rank has its own.
        unproven: name -> what lies outside it in several files, not compared yet: see `engine.unlisted.alike`.
        strategy: what cut the source, its parameters by the names that are stored; None for whole ones.
        ranks: rank -> number of its file, where the files are those of ranks.
        mapped: names of which a name map gave the contents to others as well.
    """

    files: tuple[FileIndex, ...]
    tensors: Mapping[str, SourceTensor]
    extras: Mapping[str, SourceTensor]
    notes: Mapping[str, str]
    access: Access = PLAIN
    absent: Mapping[str, str] = MappingProxyType({})
    own: Mapping[str, UnlistedTensor] = MappingProxyType({})
    unproven: Mapping[str, UnlistedTensor] = MappingProxyType({})
    strategy: Optional[Strategy] = None
    ranks: Mapping[int, int] = MappingProxyType({})
    mapped: frozenset[str] = frozenset()

    @property
    def outside(self) -> list[str]:
        """All names outside the strategy."""
        return sorted({**self.extras, **self.unproven, **self.own}) if self.ranks else list(self.extras)

    @property
    def all_there(self) -> bool:
        """Whether there is a file of every rank, so that nothing is known less than it could be."""
        return self.strategy is None or len(self.ranks) == self.strategy.world

    def require(self, names: Iterable[str]) -> None:
        """Raise CoverageError when one of these names is absent."""
        lacking = [name for name in names if name in self.absent]
        if lacking:
            more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
            raise CoverageError(f"parameter {lacking[0]!r}{more} should be in {self.absent[lacking[0]]}")

    def require_any(self) -> None:
        """Raise UsageError when there are no parameters, CoverageError when it is known where they should be."""
        if not self.tensors:
            self.require(self.absent)
            files = ", ".join(repr(index.path) for index in self.files[:3])
            raise UsageError(
                f"the checkpoint holds no parameters ({files}), so there is nothing to write; check the path"
            )

    def kind(self, held: Union[SourceTensor, UnlistedTensor]) -> tuple[DType, Shape]:
        """Dtype and shape of a parameter; of what ranks have of their own, those of the first that has it."""
        if isinstance(held, UnlistedTensor):
            return held.entry(self.files, next(iter(held.files)))[:2]
        return held.meta.dtype, held.meta.shape

    def nbytes(self, held: Union[SourceTensor, UnlistedTensor]) -> int:
        """Bytes of a whole parameter; of what ranks have of their own, those of all of them."""
        if isinstance(held, UnlistedTensor):
            return held.nbytes(self.files)
        return held.meta.dtype.nbytes(prod(held.meta.shape))

    def stored(self, file: int, name: str) -> tuple[Extent, ...]:
        """Where the bytes of a stored name lie in a file."""
        return self.files[file].tensors[name].extents

    def position(self, task: Task) -> tuple[int, tuple[Extent, ...]]:
        """The first file that a task reads, and where its parameter begins there."""
        tensor = next(task.tensor.stored(), None)
        if tensor is None:  # computed from nothing
            return 0, ()
        file = min(files[0] for placement in tensor.placements for files in placement.holders.values())
        return file, self.stored(file, tensor.stored_name)[:1]

    def called(self, naming: Optional[Naming]) -> Catalog:
        """The checkpoint under other names; None for its own. Raises as `Naming.of`."""
        return self if naming is None else naming.of(self)

    def ruled(self, rules: Sequence[Rule]) -> Catalog:
        """The checkpoint as weight rules present it.

        Raises as `apply_rules` and `require`; also for packed int4, unless renamed.
        """
        if not rules:
            return self
        from ms_ckpt_ext.core.planning.apply_rules import apply_rules, sources_among

        self.require(sources_among(self.absent, rules))  # a rule would pass over what it knows nothing of
        tensors = apply_rules(self.tensors, rules)
        for name, tensor in tensors.items():
            if tensor.recipe is None:
                continue
            packed = [source.stored_name for source in tensor.stored() if source.stored_name in self.notes]
            if packed:
                raise LayoutMismatchError(
                    f"{name!r} is made of {packed[0]!r}, which is packed int4 (two values in a byte) and can only be "
                    "renamed: fuse before quantising"
                )
        return self._replace(tensors=tensors, absent={n: at for n, at in self.absent.items() if n not in tensors})

    @property
    def authenticated(self) -> bool:
        """True when a file is encrypted so that altered bytes are noticed on decryption."""
        return any(index.reader in AUTHENTICATED for index in self.files)

    def readers(self) -> ReaderPool:
        """A pool of readers of the files, by their numbers."""
        by_path = {index.path: index for index in self.files}

        def opener(path: str) -> ByteReader:
            return reopen(by_path[path], self.access)

        return ReaderPool(self.files, opener, MOST_OPEN, DECRYPTED_BYTES)


def ranks_catalog(index_of: Mapping[int, FileIndex], strategy: Strategy, access: Access = PLAIN) -> Catalog:
    """A sharded checkpoint from the headers of its ranks' files.

    Raises:
        FormatError: a file holds slices of torch's distributed checkpoint.
        others: as `surplus.of_strategy` and `sharded_tensors`.
    """
    if any(rank >= strategy.world for rank in index_of):
        from ms_ckpt_ext.engine.source.surplus import of_strategy

        index_of = of_strategy(index_of, strategy, access)
    _refuse_slices(index_of.values())
    indexes = tuple(index_of.values())
    by_rank = {rank: number for number, rank in enumerate(index_of)}
    tensors, absent = sharded_tensors(indexes, by_rank, strategy)
    outside = outside_of(indexes, by_rank, strategy.layouts.keys())
    notes = _notes(indexes)
    return Catalog(
        indexes, tensors, outside.extras, notes, access, absent, outside.own, outside.unproven, strategy, by_rank
    )


def whole_tensor(name: str, entry: TensorEntry, files: Iterable[int]) -> SourceTensor:
    """A parameter that each of these files holds whole."""
    return stored_whole(TensorMeta(name, entry.dtype, entry.shape), tuple(files))


def _notes(indexes: tuple[FileIndex, ...]) -> dict[str, str]:
    return {key: value for index in indexes for key, value in index.metadata.items() if value == INT4}


def parts_catalog(
    index_of: Mapping[str, FileIndex], names: Optional[Mapping[str, str]], access: Access = PLAIN
) -> Catalog:
    """A merged checkpoint from the headers of its files (by name) and its map.

    The map says which files belong together. What it does not list is taken from the file that holds it, and what it
    places in a file without it is absent: MindFormers leaves a map of its own names beside Hugging Face's files, and
    `name_map` tells which of these is meant. A map of other names beside a single file says nothing.

    Raises:
        FormatError: a file holds slices of torch's distributed checkpoint.
    """
    indexes = tuple(index_of.values())
    _refuse_slices(indexes)
    numbers = {file: number for number, file in enumerate(index_of)}
    scalars = next((numbers[name] for name in rank_folders.HYPER_NAMES if name in numbers and names is not None), None)
    listed = {} if names is None or (len(indexes) == 1 and indexes[0].tensors.keys() - names.keys()) else names
    places, absent = _places(listed, index_of, scalars)
    tensors = {name: whole_tensor(name, indexes[number].tensors[name], [number]) for name, number in places.items()}
    extras = {}
    if scalars is not None:
        extras = {name: whole_tensor(name, entry, [scalars]) for name, entry in indexes[scalars].tensors.items()}
    return Catalog(indexes, tensors, extras, _notes(indexes), access, absent)


def _places(
    names: Mapping[str, str], index_of: Mapping[str, FileIndex], scalars: Optional[int]
) -> tuple[dict[str, int], dict[str, str]]:
    """(name -> number of the file that holds it; name -> where it should be, if it is not there)."""
    numbers = {file: number for number, file in enumerate(index_of)}
    places: dict[str, int] = {}
    absent: dict[str, str] = {}
    for name, file in names.items():
        if name in index_of[file].tensors:
            places[name] = numbers[file]
        else:
            absent[name] = (
                f"{index_of[file].path!r} by the map, and is not: map and files do not belong together, so get both "
                "anew from where they come from, or leave the name out; or the map has other names than the files, "
                "then give name_map"
            )
    for number, index in enumerate(index_of.values()):
        for name in index.tensors if number != scalars else ():
            if name not in names and places.setdefault(name, number) != number:
                absent[name] = (
                    f"one file, and is in {[*index_of.values()][places[name]].path!r} and {index.path!r}, about which "
                    "the map says nothing: move the file that does not belong to the checkpoint away"
                )
    found = ((name, number) for name, number in places.items() if name not in absent)
    grads = ACCUMULATED_GRADIENT_PREFIX
    return (
        {name: number for name, number in found if not name.startswith(grads)},
        {name: where for name, where in absent.items() if not name.startswith(grads)},
    )


def catalog_of(
    index_of: Mapping[str, FileIndex],
    sharded: bool,
    names: Optional[Mapping[str, str]],
    strategy: Optional[Strategy],
    access: Access = PLAIN,
    folder: Optional[Folder] = None,
) -> Catalog:
    """A checkpoint from its listing (see `listing.Listing`) and the headers of its files, by key.

    Raises:
        DiscoveryError: a rank's file without a strategy says that slices were left to other ranks' files.
        others: as `ranks_catalog`, `parts_catalog` and `folder_contents`.
    """
    if folder is not None:
        return _folder_catalog(index_of, folder, access)
    if sharded and strategy is not None:
        return ranks_catalog({int(key): index for key, index in index_of.items()}, strategy, access)
    if sharded:
        _refuse_deduplicated(index_of.values())
    return parts_catalog(index_of, names, access)


def _refuse_slices(indexes: Iterable[FileIndex]) -> None:
    noted = [index for index in indexes if SHARDING_INFO in index.metadata]
    if noted:
        from ms_ckpt_ext.formats.discovery.torch_slices import refuse_slices

        refuse_slices(noted)


def _refuse_deduplicated(indexes: Iterable[FileIndex]) -> None:
    for index in indexes:
        if index.metadata.get(DEDUPLICATED) == "True":
            raise DiscoveryError(
                f"{index.path!r} was saved with remove_redundancy, so it lacks what others hold: give every "
                "rank's file, and the strategy of the job that saved them"
            )


def _folder_catalog(index_of: Mapping[str, FileIndex], folder: Folder, access: Access) -> Catalog:
    """A folder of MindFormers from the headers of its files."""
    from ms_ckpt_ext.engine.source.folders import folder_contents

    indexes = tuple(index_of.values())
    _refuse_slices(indexes)
    found = folder_contents(index_of, folder)
    extras, own, unproven = found.outside
    told = _notes(indexes), access, found.absent, own, unproven, found.strategy, found.ranks
    return Catalog(indexes, found.tensors, extras, *told)


def read_listing(listing: Listing, strategy: Optional[Strategy], access: Access = PLAIN) -> Catalog:
    """A checkpoint from its listing: reads the headers. Raises as `catalog_of`."""
    index_of = dict(zip(listing.files, read_indexes(listing.files.values(), access)))
    return catalog_of(index_of, listing.sharded, listing.names, strategy, access, listing.folder)


def open_catalog(
    directory: str,
    strategy: Optional[Strategy],
    file_suffix: Optional[str] = None,
    require_sharded: bool = False,
    access: Access = PLAIN,
    kind: Optional[str] = None,
) -> Catalog:
    """Find the files and read their headers. Raises as `list_checkpoint` and `catalog_of`."""
    return read_listing(list_checkpoint(directory, strategy, file_suffix, require_sharded, kind), strategy, access)


def file_catalog(path: str, access: Access = PLAIN) -> Catalog:
    """One file as a source, with everything in it. Raises as `registry.read_index` and `refuse_slices`."""
    return files_catalog([path], access)


def files_catalog(paths: Sequence[str], access: Access = PLAIN) -> Catalog:
    """Several files as one source; what two of them have is taken from the later. Raises as `file_catalog`."""
    indexes = tuple(read_indexes(paths, access))
    _refuse_slices(indexes)
    tensors = {
        name: whole_tensor(name, entry, [number])
        for number, index in enumerate(indexes)
        for name, entry in index.tensors.items()
    }
    return Catalog(indexes, tensors, {}, _notes(indexes), access)
