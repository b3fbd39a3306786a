"""A file-to-file job as a value: the files it wants, laid out, and what fills each.

Every output file is laid out first: names, dtypes, shapes, so every offset is known before a byte moves. What each
file wants of each parameter becomes one task per parameter, so that bytes wanted by several files are read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import starmap
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.io_units import Landing, Target, Task
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, require, whole_box
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats import registry
from ms_ckpt_ext.formats.discovery.rank_folders import RANK_FOLDER
from ms_ckpt_ext.formats.index import FileIndex, FileLayout, TensorEntry, TensorSpec
from ms_ckpt_ext.formats.registry import index_through, open_reader
from ms_ckpt_ext.storage.linux import boot_id, only_name
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader
from ms_ckpt_ext.storage.staging import ONE_TASK

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.files.encrypted_sink import Seal

_PLAN_VERSION = b"1"
"""Part of every job's fingerprint: raised when the same inputs would give other bytes."""


class Wanted(NamedTuple):
    """One tensor of an output file: its name there, and the box of a source parameter it holds."""

    name: str
    tensor: SourceTensor
    region: Optional[Region]
    """None for a tensor without elements."""


ListTensors = Callable[[], Mapping[str, TensorEntry]]
"""Lists the tensors of a file."""


class Output(NamedTuple):
    """One file to write: its name relative to the target, its layout, and what fills it.

    `holds` lists the tensors that are digested: those of the layout, or of the file that is copied as it is. None when
    they are known when it is written, and not before.
    """

    name: str
    layout: FileLayout
    wanted: tuple[Wanted, ...]
    holds: Optional[ListTensors]


class Job:
    """A set of output files that belong together.

    Attributes:
        source: where the bytes come from.
        outputs: the files this task writes.
        others: the files that other tasks of the same job write, by the names of the tasks.
        index: files that make the set loadable, published last: name -> contents.
        replaces: lists files of an older result in the target, as it is now, that must not survive.
        task: name of this task, unique within the job.
        seal: how the outputs are encrypted; None when they are not.
        digests: write a manifest of digests beside the outputs.
        sync: the result is on disk when the job ends.
        shuns: files that nobody else may write meanwhile, besides these.
        everything: every file of the job, by name.

    Raises:
        UsageError: one of several tasks that does not sync: others could not tell after a crash what of it is there.
    """

    def __init__(
        self,
        source: Catalog,
        outputs: tuple[Output, ...],
        others: Mapping[str, tuple[Output, ...]] = MappingProxyType({}),
        index: Mapping[str, bytes] = MappingProxyType({}),
        replaces: Callable[[], Sequence[str]] = tuple,
        task: str = ONE_TASK,
        seal: Optional[Seal] = None,
        digests: bool = True,
        sync: bool = True,
        shuns: Sequence[str] = (),
    ) -> None:
        if not sync and task != ONE_TASK:
            raise UsageError(
                "sync=False is for a result that one task writes; leave it out, or the share (split_dst_file)"
            )
        self.source, self.outputs, self.others, self.index = source, outputs, others, index
        self.replaces, self.task, self.seal, self.digests, self.sync = replaces, task, seal, digests, sync
        self.shuns = shuns
        self.everything = {output.name: output for made in self.shares.values() for output in made}

    @property
    def shares(self) -> dict[str, tuple[Output, ...]]:
        """Every file of the job, by the task that writes it."""
        return {**self.others, self.task: self.outputs}

    def synced(self, sync: bool) -> Job:
        """The same job, whose result is on disk when it ends, or need not be. Raises UsageError as at birth."""
        return self._but(sync=sync)

    def beside(self, files: Mapping[str, bytes]) -> Job:
        """The same job with more files, published with its index."""
        return self._but(index={**files, **self.index})

    def only(self, outputs: tuple[Output, ...]) -> Job:
        """The same job, of which this task writes these files and no others."""
        return self._but(outputs=outputs)

    def _but(self, **changes: Any) -> Job:
        kept = {name: value for name, value in vars(self).items() if name != "everything"}
        return Job(**{**kept, **changes})

    def size(self, output: Output) -> int:
        """Bytes of an output as it lies on disk."""
        size = output.layout.size
        return size if self.seal is None else self.seal.units(output.name, size).stored_size

    def open(self, output: Output, path: str) -> ByteReader:
        """The plaintext of an output that was written."""
        return PlainReader(path) if self.seal is None else open_reader(path, self.seal.access(output.name))

    def contents(self, output: Output, path: str) -> FileIndex:
        """The tensors of an output that was written. Raises FormatError: it is a copy of what is no checkpoint."""
        if output.holds is not None:
            return FileIndex(path, output.layout.size, 0, output.holds())
        with self.open(output, path) as reader:
            return index_through(reader, output.name)


class Report:
    """What a job did: counts in bytes and calls.

    `published` says whether the whole result is in place; else `missing` are files that other shares have to write yet.
    """

    def __init__(
        self,
        bytes_read: int,
        reads: int,
        bytes_written: int,
        files_written: tuple[str, ...],
        files_kept: tuple[str, ...],
        published: bool,
        missing: tuple[str, ...] = (),
    ) -> None:
        self.bytes_read, self.reads, self.bytes_written = bytes_read, reads, bytes_written
        self.files_written, self.files_kept, self.published = files_written, files_kept, published
        self.missing = missing

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def check_job(job: Job, target: str) -> Sequence[str]:
    """Find what is wrong before anything is written. Gives the files that the result replaces, as `Job.replaces`."""
    for tensor, regions in _regions(job.outputs):
        require(tensor, regions)
    replaced = job.replaces()
    # A source must outlive the run that reads it: a killed run could not be finished without it.
    sources = {os.path.realpath(file.path) for file in job.source.files}
    same: Optional[set[tuple[int, int]]] = None
    for name in (*job.everything, *replaced):
        path = os.path.join(target, name)
        there = only_name(path)
        if there is not None and same is None:
            same = {each for each in map(only_name, sources) if each is not None}
        if os.path.realpath(path) in sources or (same and there in same):
            raise UsageError(f"the target's {path!r} is a file of the source; choose another target directory")
    return replaced


def check_apart(job: Job, folder: str) -> None:
    """Refuse a job in `folder` that would put files where a rank of the source has its own, or could have.

    The newest file of a rank folder counts as that rank's, so a result beside it would be the shard of the next job.
    That is any of several folders that hold source files, and every `ROOT/rank_N`, there or not, of a root in whose
    rank folders source files lie. One folder that is no rank's is nobody's: a result may go beside its source.

    Raises UsageError.
    """
    sources = set(_spellings(file.path for file in job.source.files))
    taken = set(_spellings(os.path.join(folder, name) for name in job.everything))
    roots = {os.path.dirname(each) for each in sources if _is_rank_folder(each)}
    held = taken & sources if len({os.path.realpath(each) for each in sources}) > 1 else set()
    wrong = held | {each for each in taken if _is_rank_folder(each) and os.path.dirname(each) in roots}
    if wrong:
        raise UsageError(
            f"{min(wrong)!r} is a rank folder of the source, and a file that is written there would be taken "
            "for that rank's; choose another target directory"
        )


def _is_rank_folder(folder: str) -> bool:
    return RANK_FOLDER.match(os.path.basename(folder)) is not None


def _spellings(paths: Iterable[str]) -> Iterator[str]:
    """The folders of files: where they really are, and where they are by name, for a rank folder may be a link."""
    for folder in {os.path.dirname(os.path.abspath(path)) for path in paths}:
        yield os.path.realpath(folder)
        yield os.path.join(os.path.realpath(os.path.dirname(folder)), os.path.basename(folder))


def _regions(outputs: Sequence[Output]) -> Iterable[tuple[SourceTensor, list[Region]]]:
    """Every parameter that is wanted, and the boxes of it."""
    wanted: dict[int, tuple[SourceTensor, list[Region]]] = {}
    for output in outputs:
        for _, tensor, region in output.wanted:
            if region is not None:
                wanted.setdefault(id(tensor), (tensor, []))[1].append(region)
    return wanted.values()


def tasks_of(outputs: Sequence[Output]) -> list[Task]:
    """One task per source parameter, with every box that any output wants of it, in the order of the files' bytes.

    Parameters that are boxes of one tensor, parts of what was fused, are of one task: their bytes come with one read.
    """
    wanted: dict[int, tuple[SourceTensor, dict[Region, list[Landing]]]] = {}
    for number, output in enumerate(outputs):
        placed = sorted(output.wanted, key=lambda wanted: output.layout.tensors[wanted.name].extents[:1])
        for name, tensor, region in placed:
            if region is None:
                continue
            landing = Landing(number, output.layout.tensors[name].extents)
            if tensor.recipe is not None and region == whole_box(tensor):
                from ms_ckpt_ext.core.planning.recipes import box_of_stored  # rules only

                tensor, region = box_of_stored(tensor) or (tensor, region)
            wanted.setdefault(id(tensor), (tensor, {}))[1].setdefault(region, []).append(landing)
    return [
        Task(tensor, tuple([Target(region, tuple(landings)) for region, landings in regions.items()]))
        for tensor, regions in wanted.values()
    ]


def job_fingerprint(job: Job) -> str:
    """Everything that decides the result: source files as they are, output layouts, and what goes where."""
    digest = xxhash.xxh3_64(_PLAN_VERSION)
    digest.update(b"" if job.seal is None else job.seal.identity().encode())
    digest.update(b"digests" if job.digests else b"")
    digest.update(b"" if job.sync else boot_id())
    for name, file in zip(_names_of_files([file.path for file in job.source.files]), job.source.files):
        digest.update(_encoded(f"{name}|{file.size}|{file.mtime_ns}\n"))
    everybodys = {**job.source.tensors, **job.source.extras}
    known = set(map(id, everybodys.values()))
    made = _Made()
    corners: dict[Optional[Region], str] = {None: "None"}

    def where(tensor: SourceTensor) -> str:
        """What a rank has of its own is told by the file."""
        return "" if id(tensor) in known else f"|{[tuple(p.holders.items()) for p in tensor.placements]}"

    def told(name: str, tensor: SourceTensor, region: Optional[Region]) -> str:
        corner = corners.get(region)
        if corner is None and region is not None:
            corner = corners[region] = str((region.start, region.stop))
        return f"{name}|{tensor.stored_name}|{made(tensor)}|{corner}{where(tensor)}\n"

    for _, output in sorted(job.everything.items()):
        digest.update(_encoded(f"{output.name}|{output.layout.size}\n"))
        for offset, literal in output.layout.literals:
            digest.update(offset.to_bytes(8, "little") + literal)
        digest.update(_encoded("".join(starmap(told, output.wanted))))
    for name in sorted(job.index):
        digest.update(name.encode() + job.index[name])
    for name, tensor in sorted(everybodys.items()):
        digest.update(f"({name!r}, {tensor.meta.shape}, {made.lying(tensor.placements)})".encode())
    return digest.hexdigest()


class _Made:
    """Where parameters lie and how they are made, in short; told once of what several share."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def lying(self, placements: Sequence[Placement]) -> str:
        """The files of every slice."""
        found = self._known.get(id(placements))
        if found is None:
            found = str([(placement.parts, tuple(placement.holders.items())) for placement in placements])
            self._known[id(placements)] = found
        return found

    def __call__(self, tensor: SourceTensor) -> str:
        """What a parameter is made of; "" when it is stored."""
        recipe = tensor.recipe
        if recipe is None:
            return ""
        found = self._known.get(id(recipe))
        if found is None:
            digest = xxhash.xxh3_64(f"{tensor.meta}|{recipe.how}".encode())
            for source in tensor.sources:
                lying = self.lying(source.placements)
                digest.update(_encoded(f"{source.stored_name}|{lying}|{self(source)}\n"))
            found = self._known[id(recipe)] = digest.hexdigest()
        return found


def _encoded(text: str) -> bytes:
    """UTF-8, whatever the text: names of files need not be Unicode."""
    return text.encode(errors="surrogatepass")


def _names_of_files(paths: Sequence[str]) -> Iterator[str]:
    """What source files are called below the folder they share: alike however that is spelled or mounted.

    One file shares its folder with nobody, and goes by its whole path.
    """
    real = [os.path.realpath(path) for path in paths]
    root = os.path.commonpath(map(os.path.dirname, real)) if len(set(real)) > 1 else os.sep
    return (os.path.relpath(path, root) for path in real)


def output_of(
    name: str,
    wanted: Iterable[tuple[str, SourceTensor, Optional[Region]]],
    catalog: Catalog,
    crc: bool = False,
    seal: Optional[Seal] = None,
    framework: str = "ms",
) -> Output:
    """Lay out one file.

    Args:
        wanted: name, parameter and box of it; None for the whole parameter.
        seal: may ask for a checksum by itself.
        framework: what the header says of it.
    """
    crc = crc or (seal is not None and seal.needs_crc(name))
    listed = [*wanted]
    specs = [TensorSpec(new, t.meta.dtype, t.meta.shape if box is None else box.shape) for new, t, box in listed]
    boxes = [Wanted(new, tensor, box or whole_box(tensor)) for new, tensor, box in listed]
    notes = {new: catalog.notes[t.stored_name] for new, t, _ in boxes if t.stored_name in catalog.notes}
    layout: FileLayout = registry.lay_out(name, specs, {"format": framework, **notes}, crc)
    return Output(name, layout, tuple(boxes), lambda: layout.tensors)
