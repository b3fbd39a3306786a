"""File-to-file jobs: merge, re-cut, convert. All differ only in the list of files they want.

1. Every output file is laid out first: names, dtypes, shapes, so every offset is known before a byte moves.
2. What each file wants of each parameter becomes one task per parameter, so that bytes wanted by several files are
   read once.
3. The pump moves the bytes into the staging folder; a file is synced and accepted when its last byte has landed.
   Without `Job.sync` the kernel writes it to disk when it likes: safe from a killed process, not from a power cut, so
   after the next boot nothing of such a job is taken for done.
4. When the whole set is complete, it is published (see `storage.staging`), its digests (`engine.digests`) with it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.plan import SourceTensor, locate
from ms_ckpt_ext.core.reads import Landing, Limits, Target, Task
from ms_ckpt_ext.core.region import Region
from ms_ckpt_ext.core.schedule import schedule
from ms_ckpt_ext.engine import pump
from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.engine.digests import MANIFEST_NAME, FileDigests, renewed, superseded
from ms_ckpt_ext.engine.sealing import Seal, SealedSink, rounds
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.checksum import crc_of
from ms_ckpt_ext.formats.index import FileLayout
from ms_ckpt_ext.formats.registry import open_reader
from ms_ckpt_ext.storage.digesting import DigestingSink
from ms_ckpt_ext.storage.linux import allow_open_files, boot_id
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader
from ms_ckpt_ext.storage.sink import FileSink, Sink
from ms_ckpt_ext.storage.staging import ONE_TASK, Staging

_PLAN_VERSION = b"1"
"""Part of every job's fingerprint: raised when the same inputs would give other bytes."""


class Wanted(NamedTuple):
    """One tensor of an output file: its name there, and the box of a source parameter it holds."""

    name: str
    tensor: SourceTensor
    region: Optional[Region]
    """None for a tensor without elements."""


@dataclass(frozen=True)
class Output:
    """One file to write: its name relative to the target, its layout, and what fills it."""

    name: str
    layout: FileLayout
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class Job:
    """A set of output files that belong together.

    Attributes:
        source: where the bytes come from.
        outputs: the files this task writes.
        others: the files that other tasks of the same job write.
        index: files that make the set loadable, published last: name -> contents.
        replaces: files of an older result in the target that must not survive.
        task: name of this task, unique within the job.
        seal: how the outputs are encrypted; None when they are not.
        digests: write a manifest of digests beside the outputs.
        sync: the result is on disk when the job ends.

    Raises:
        UsageError: one of several tasks that does not sync: others could not tell after a crash what of it is there.
    """

    source: Catalog
    outputs: tuple[Output, ...]
    others: tuple[Output, ...] = ()
    index: Mapping[str, bytes] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    task: str = ONE_TASK
    seal: Optional[Seal] = None
    digests: bool = True
    sync: bool = True

    def __post_init__(self) -> None:
        if not self.sync and self.task != ONE_TASK:
            raise UsageError(
                "sync=False is for a result that one task writes; leave it out, or the share (split_dst_file)"
            )

    def size(self, output: Output) -> int:
        """Bytes of an output as it lies on disk."""
        size = output.layout.size
        return size if self.seal is None else self.seal.units(output.name, size).stored_size

    def open(self, output: Output, path: str) -> ByteReader:
        """The plaintext of an output that was written."""
        return PlainReader(path) if self.seal is None else open_reader(path, self.seal.access(output.name))

    @property
    def digests_contents(self) -> bool:
        """True when tensors are digested: not those of encrypted files, see `engine.digests`."""
        return self.digests and self.seal is None


@dataclass(frozen=True)
class Report:
    """What a job did: counts in bytes and calls."""

    bytes_read: int
    reads: int
    bytes_written: int
    files_written: tuple[str, ...]
    files_kept: tuple[str, ...]
    published: bool


Progress = Callable[[int], None]
"""Told the number of bytes that have landed since the last call."""


def execute(job: Job, target: str, workers: int, limits: Limits, progress: Progress = lambda _: None) -> Report:
    """Run a job into `target`.

    Raises:
        CoverageError, LayoutMismatchError: planning failed; nothing was written.
        UsageError: an output file would replace a file of the source.
        StorageError: no space, no permission, another run is writing there; finished files are kept for a rerun.
    """
    check(job, target)
    staging = Staging(target, fingerprint(job), job.task, job.sync)
    everything = {output.name: output for output in (*job.outputs, *job.others)}
    sizes = {name: job.size(output) for name, output in everything.items()}
    if staging.published(sizes, job.index):
        return Report(0, 0, 0, (), tuple(everything), True)
    staging.open()
    try:
        report = _fill(job, staging, workers, limits, progress)
        with staging.alone():
            complete = all(is_done(job, output, staging) for output in everything.values())
            if complete:
                _publish(job, everything, staging, target)
        return Report(*report, complete or staging.published(sizes, job.index))
    except BaseException:
        staging.abandon(output.name for output in job.outputs)
        raise
    finally:
        staging.close()


def check(job: Job, target: str) -> None:
    """Find what is wrong before anything is written."""
    for task in tasks_of(job.outputs):
        for wanted in task.targets:
            locate(task.tensor, wanted.region)
    _refuse_overwrite(job, target)


def _publish(job: Job, outputs: Mapping[str, Output], staging: Staging, target: str) -> None:
    held = {name: FileDigests(job.size(outputs[name]), _noted(staging, name) or {}) for name in sorted(outputs)}
    manifest = renewed(target, held if job.digests else {}, (*outputs, *job.replaces))
    beside = {MANIFEST_NAME: manifest.to_json()} if manifest.files else {}
    replaces = (*job.replaces, MANIFEST_NAME, *superseded(target, outputs))
    staging.publish(tuple(outputs), job.index, replaces, beside)


def _noted(staging: Staging, name: str) -> Optional[dict[str, str]]:
    """The digests of a complete file; None where there are none."""
    try:
        noted: dict[str, str] = json.loads(staging.note(name) or b"null")
    except ValueError:
        return None
    return noted


def tasks_of(outputs: Sequence[Output]) -> list[Task]:
    """One task per source parameter, with every box that any output wants of it, in the order of the files' bytes."""
    wanted: dict[int, tuple[SourceTensor, dict[Region, list[Landing]]]] = {}
    for number, output in enumerate(outputs):
        placed = sorted(output.wanted, key=lambda wanted: output.layout.tensors[wanted.name].extents[:1])
        for name, tensor, region in placed:
            if region is None:
                continue
            landing = Landing(number, output.layout.tensors[name].extents)
            wanted.setdefault(id(tensor), (tensor, {}))[1].setdefault(region, []).append(landing)
    return [
        Task(tensor, tuple(Target(region, tuple(landings)) for region, landings in regions.items()))
        for tensor, regions in wanted.values()
    ]


def _refuse_overwrite(job: Job, target: str) -> None:
    """A source must outlive the run that reads it: a killed run could not be finished without it."""
    sources = {os.path.realpath(file.path) for file in job.source.files}
    for name in (*(output.name for output in (*job.outputs, *job.others)), *job.replaces):
        if os.path.realpath(os.path.join(target, name)) in sources:
            raise UsageError(
                f"the target's {os.path.join(target, name)!r} is a file of the source; choose another target directory"
            )


def is_done(job: Job, output: Output, staging: Staging) -> bool:
    """True when an output is complete: by its size and framing, and where it is encrypted, by the key and its start."""
    literals = output.layout.fixed if job.seal is None else output.layout.fixed[:1]
    if job.digests_contents and _noted(staging, output.name) is None:
        return False
    return staging.holds(output.name, job.size(output), literals, partial(job.open, output))


def fingerprint(job: Job) -> str:
    """Everything that decides the result: source files as they are, output layouts, and what goes where."""
    digest = xxhash.xxh3_64(_PLAN_VERSION)
    digest.update(b"" if job.seal is None else job.seal.identity().encode())
    digest.update(b"digests" if job.digests else b"")
    digest.update(b"" if job.sync else boot_id())
    for file in job.source.files:
        digest.update(f"{file.path}|{file.size}|{file.mtime_ns}\n".encode())
    for output in sorted((*job.outputs, *job.others), key=lambda o: o.name):
        digest.update(f"{output.name}|{output.layout.size}\n".encode())
        for offset, literal in output.layout.literals:
            digest.update(offset.to_bytes(8, "little") + literal)
        for name, tensor, region in output.wanted:
            corner = None if region is None else (region.start, region.stop)
            digest.update(f"{name}|{tensor.stored_name}|{tensor.recipe}|{corner}\n".encode())
    for name in sorted(job.index):
        digest.update(name.encode() + job.index[name])
    for name, tensor in sorted({**job.source.tensors, **job.source.extras}.items()):
        cuts = [(placement.parts, tuple(placement.holders.items())) for placement in tensor.placements]
        digest.update(repr((name, tensor.meta.shape, cuts)).encode())
    return digest.hexdigest()


def _fill(
    job: Job, staging: Staging, workers: int, limits: Limits, progress: Progress
) -> tuple[int, int, int, tuple[str, ...], tuple[str, ...]]:
    kept = {output.name for output in job.outputs if is_done(job, output, staging)}
    todo = [output for output in job.outputs if output.name not in kept]
    staging.discard_partials(output.name for output in todo)
    written = sum(map(job.size, todo))
    staging.check_space(written)
    allow_open_files(len(todo) + len(job.source.files))
    with job.source.readers() as readers, _Files(todo, staging, job) as files:

        def landed(sink: int, nbytes: int) -> None:
            files.landed(sink, nbytes)
            progress(nbytes)

        for tasks in in_rounds(job, todo, workers):
            units = schedule(tasks, job.source.stored, limits)
            if job.source.authenticated:  # one by one, so that threads meet in the block that a reader keeps
                pump.run(units, readers, files.sinks, workers, landed, plenty=0)
            else:
                pump.run(units, readers, files.sinks, workers, landed)
        files.settle()
        readers.verify()
        return readers.count.nbytes, readers.count.reads, written, tuple(o.name for o in todo), tuple(sorted(kept))


def in_rounds(job: Job, todo: Sequence[Output], workers: int) -> Iterable[list[Task]]:
    """All the work at once, unless it must be done in order to encrypt in bounded memory.

    What was encrypted in large blocks is read in the order of the source, lest a block be decrypted for every tensor.
    """
    tasks = tasks_of(todo)
    if job.seal is not None:
        return rounds(tasks, [output.name for output in todo], job.seal, workers)
    return [sorted(tasks, key=job.source.position) if job.source.authenticated else tasks]


class _Files:
    """The files being written: each is synced and accepted when its last byte has landed."""

    def __init__(self, outputs: Sequence[Output], staging: Staging, job: Job) -> None:
        self._outputs, self._staging, self._job = outputs, staging, job
        self._lock = threading.Lock()
        self._left = [sum(entry.nbytes for entry in output.layout.tensors.values()) for output in outputs]
        self._syncs = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sync")
        self._accepted: list[Future[None]] = []
        self.sinks: list[Sink] = []

    def __enter__(self) -> _Files:
        try:
            for number, output in enumerate(self._outputs):
                self._open(output)
                if self._left[number] == 0:
                    self._accept(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self, output: Output) -> None:
        path = self._staging.partial(output.name)
        if self._job.seal is not None:
            self.sinks.append(SealedSink(path, output.name, output.layout, self._job.seal, self._job.sync))
            return
        file = FileSink(path, output.layout.size, self._job.sync)
        extents = {name: entry.extents for name, entry in output.layout.tensors.items()}
        sink: Sink = DigestingSink(file, extents) if self._job.digests else file
        self.sinks.append(sink)
        for offset, literal in output.layout.literals:
            sink.write(offset, memoryview(literal))

    def landed(self, sink: int, nbytes: int) -> None:
        with self._lock:
            self._left[sink] -= nbytes
            if self._left[sink] == 0:
                self._accept(sink)

    def _accept(self, number: int) -> None:
        self._accepted.append(self._syncs.submit(self._finish, number))

    def _finish(self, number: int) -> None:
        checksum, sink = self._outputs[number].layout.checksum, self.sinks[number]
        if checksum is not None and self._job.seal is None:
            with PlainReader(sink.path) as reader:
                found = crc_of(reader, checksum.parts)
            sink.write(checksum.offset, memoryview(checksum.render(found)))
        sink.finish()
        if isinstance(sink, DigestingSink):
            self._staging.keep(self._outputs[number].name, json.dumps(sink.digests()).encode())
        self._staging.accept(self._outputs[number].name)

    def settle(self) -> None:
        """Wait until every file is on disk. Raises the first error of a sync."""
        for future in self._accepted:
            future.result()

    def __exit__(self, *_: object) -> None:
        self._syncs.shutdown(wait=True)
        for sink in self.sinks:
            sink.close()
