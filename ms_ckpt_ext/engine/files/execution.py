"""File-to-file jobs: merge, re-cut, convert. All differ only in the list of files they want.

1. The job has every output file laid out (`engine.files.job`), so every offset is known before a byte moves.
2. What an interrupted run finished is kept, when it is still what was written (`is_intact`).
3. Workers (`engine.copying.worker`) move the bytes into the staging folder; a file is synced and accepted when its last
   byte has landed.
   Without `Job.sync` the kernel writes it to disk when it likes: safe from a killed process, not from a power cut, so
   after the next boot nothing of such a job is taken for done.
4. When the whole set is complete, it is published (see `storage.staging`), its digests (`engine.integrity.manifest`)
   with it. A share of a job publishes what is complete where no other is to be seen.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Callable, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.core.planning.io_units import Limits, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.files.job import Job, Output, Report, check_job, job_fingerprint, tasks_of
from ms_ckpt_ext.engine.integrity import manifest
from ms_ckpt_ext.engine.integrity.manifest import FileDigests
from ms_ckpt_ext.errors import CheckpointError, FormatError, StorageError, naming
from ms_ckpt_ext.storage.digest_sink import DigestingSink, streams_of
from ms_ckpt_ext.storage.linux import allow_open_files
from ms_ckpt_ext.storage.publishing import obstacles
from ms_ckpt_ext.storage.reader import PlainReader, ReaderPool, from_json
from ms_ckpt_ext.storage.sink import FileSink, Sink
from ms_ckpt_ext.storage.staging import Staging
from ms_ckpt_ext.storage.threads import Pending, ThreadPool

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.files.encrypted_sink import SealedSink


Progress = Callable[[int], None]
"""Told the number of bytes that have landed since the last call."""


def execute(job: Job, target: str, workers: int, limits: Limits, progress: Progress = lambda _: None) -> Report:
    """Run a job into `target`.

    Raises:
        CoverageError, LayoutMismatchError: planning failed; nothing was written.
        UsageError: an output file would replace a file of the source.
        StorageError: no space, no permission, another run writes one of the files; finished ones are kept for a rerun.
    """
    with naming(f"write the result into {target!r}"):
        return _execute(job, target, workers, limits, progress)


def _execute(job: Job, target: str, workers: int, limits: Limits, progress: Progress) -> Report:
    shunned = (*job.shuns, *check_job(job, target))
    staging = Staging(target, job_fingerprint(job), manifest, job.task, job.sync)
    settled = _settled(job, staging)
    if settled is not None:
        if settled.published:
            staging.tidy()
        return settled
    staging.open((*job.everything, *job.index, *obstacles(job.index)), shunned)
    try:
        replaced, there = job.replaces(), published(job, staging)
        mine = {output.name: output for output in job.outputs}
        kept = {name for name, each in mine.items() if name in there or _will_do(job, each, staging, workers)}
        with staging.alone():
            settled = _settled(job, staging)  # by another task, or an earlier run that has been finished meanwhile
            if settled is None:
                staging.discard(output.name for output in job.outputs if output.name not in kept)
        if settled is not None:
            staging.abandon(())
            return settled
        report = _fill(job, staging, kept, workers, limits, progress)
        with staging.alone():
            missing = _publish(job, staging, replaced)
        return Report(*report, not missing, missing)
    except BaseException:
        staging.abandon(output.name for output in job.outputs)
        raise
    finally:
        staging.close()


def _settled(job: Job, staging: Staging) -> Optional[Report]:
    """What there is to report when all that this task does is in place already."""
    there, everything = published(job, staging), job.everything
    mine = {output.name for output in job.outputs}
    if not there >= mine or not (mine or there >= everything.keys()):
        return None
    missing = tuple(name for name in everything if name not in there)
    return Report(0, 0, 0, (), tuple(name for name in everything if name in mine or not missing), not missing, missing)


def _publish(job: Job, staging: Staging, replaced: Sequence[str]) -> tuple[str, ...]:
    """Publish what is complete of a job; gives what is missing, of other shares.

    Shares that see each other appear together: one that has begun in this target and is not done publishes for all, as
    the last of them. What none has begun here may be done elsewhere, or later: the indexes name what is missing, so no
    reader takes the rest for a checkpoint.
    """
    there, everything = published(job, staging), job.everything
    mine = {output.name for output in job.outputs}
    waiting = [n for n, each in everything.items() if n not in there and (n in mine or is_done(job, each, staging))]
    missing = tuple(name for name in everything if name not in there and name not in waiting)
    late = {task for task, outputs in job.shares.items() if any(output.name in missing for output in outputs)}
    if not waiting or late & staging.seen():
        if missing:
            log.info("this share is complete, and waits in %s for %s", staging.target, ", ".join(sorted(late)))
        return missing
    told = ((name, noted(staging, name)) for name in sorted(waiting)) if job.digests else ()
    digests = {name: held.to_json() for name, held in told if held is not None and held.known}
    staging.publish(waiting, job.index, (*replaced, *missing), digests, missing)
    if missing:
        log.warning(
            "%s holds %d of the %d files of this result, for no other share has begun there: it is complete with %s. "
            "Run the other shares into that directory, or put their files into it",
            staging.target,
            len(everything) - len(missing),
            len(everything),
            ", ".join(missing),
        )
    return missing


def noted(staging: Staging, name: str) -> Optional[FileDigests]:
    """What the manifest is to say of a complete file, as it was noted when it was written; None where that is lost."""
    try:
        return FileDigests.from_json(from_json(staging.note(name) or b"null"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def published(job: Job, staging: Staging) -> set[str]:
    """Files of this very job that are in place, untouched, with its index."""
    sizes = {name: job.size(output) for name, output in job.everything.items()}
    there = {name for name, state in staging.published().items() if sizes.get(name) == state.size}
    return there if there and staging.is_at(job.index) else set()


def is_done(job: Job, output: Output, staging: Staging) -> bool:
    """True when an output waits: complete by its size and framing, and where it is encrypted, by key and beginning.

    Raises StorageError: that cannot be told.
    """
    literals = output.layout.fixed if job.seal is None else output.layout.fixed[:1]
    if job.digests and noted(staging, output.name) is None:
        return False
    return staging.holds(output.name, job.size(output), literals, partial(job.open, output))


def _will_do(job: Job, output: Output, staging: Staging, workers: int) -> bool:
    """Whether an earlier run left an output that is complete and intact. What cannot be read is written again."""
    try:
        return is_done(job, output, staging) and is_intact(job, output, staging, workers)
    except StorageError:
        return False


def is_intact(job: Job, output: Output, staging: Staging, workers: int) -> bool:
    """Whether a complete output still holds what was written: its digests are those noted at the time.

    Reads the file, so it is for what an earlier run left, once. Without digests there is nothing to compare: True.
    """
    if not job.digests:
        return True
    held = noted(staging, output.name)
    if held is None or not held.known:
        return held is not None
    from ms_ckpt_ext.engine.integrity.digests import digest_file

    try:
        expected = held.opened_by(None if job.seal is None else job.seal.key, output.name)
        index = job.contents(output, str(staging.folder / output.name))
        return digest_file(index, workers, partial(job.open, output))[1:] == expected[1:]
    except (OSError, CheckpointError):  # what cannot be read is written again
        return False


def _fill(
    job: Job, staging: Staging, kept: set[str], workers: int, limits: Limits, progress: Progress
) -> tuple[int, int, int, tuple[str, ...], tuple[str, ...]]:
    todo = [output for output in job.outputs if output.name not in kept]
    written = sum(map(job.size, todo))
    staging.check_space(written)
    allow_open_files(len(todo) + len(job.source.files))
    readers = job.source.readers()
    try:
        _move(job, staging, todo, readers, workers, limits, progress)
        readers.verify()
    except BaseException:
        if _changed(readers):  # and may be put back as they were
            staging.discard(output.name for output in todo)
        raise
    return readers.count.nbytes, readers.count.reads, written, tuple(o.name for o in todo), tuple(sorted(kept))


def _changed(readers: ReaderPool) -> bool:
    """Whether files are not what they were when they were read."""
    try:
        readers.verify()
    except StorageError as error:
        return not error.errno  # else they cannot be looked at
    return False


def _move(
    job: Job,
    staging: Staging,
    todo: Sequence[Output],
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    progress: Progress,
) -> None:
    """Read, and write and accept files."""
    shared = worker.shared_out(limits, sum(map(job.size, todo)), workers, job.source.authenticated)
    with readers, _Files(todo, staging, job, workers) as files:

        def landed(sink: int, nbytes: int) -> None:
            files.landed(sink, nbytes)
            progress(nbytes)

        for tasks in in_rounds(job, todo, workers):
            units = schedule(tasks, job.source.stored, limits)
            worker.run(units, readers, files.sinks, workers, landed, shared)
        files.settle()


def in_rounds(job: Job, todo: Sequence[Output], workers: int) -> Iterable[list[Task]]:
    """All the work at once, unless it must be done in order to encrypt in bounded memory.

    What was encrypted in large blocks is read in the order of the source, lest a block be decrypted for every tensor.
    """
    tasks = tasks_of(todo)
    if job.seal is not None:
        from ms_ckpt_ext.engine.files.encrypted_sink import rounds

        return rounds(tasks, [output.name for output in todo], job.seal, workers)
    return [sorted(tasks, key=job.source.position) if job.source.authenticated else tasks]


class _Files:
    """The files being written: each is synced and accepted when its last byte has landed."""

    def __init__(self, outputs: Sequence[Output], staging: Staging, job: Job, workers: int) -> None:
        self._outputs, self._staging, self._job, self._workers = outputs, staging, job, workers
        self._lock = threading.Lock()
        self._left = [sum(entry.nbytes for entry in output.layout.tensors.values()) for output in outputs]
        self._syncs = ThreadPool(2, "sync") if job.sync else None
        self._accepted: list[Pending[None]] = []
        self._digesting: dict[int, DigestingSink] = {}
        self.sinks: list[Sink] = []

    def __enter__(self) -> _Files:
        try:
            for number, output in enumerate(self._outputs):
                self._open(number, output)
                if self._left[number] == 0:
                    self._accept(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open(self, number: int, output: Output) -> None:
        path, layout, seal = self._staging.partial(output.name), output.layout, self._job.seal
        holds = output.holds
        file: Union[FileSink, SealedSink]
        if seal is None:
            file = FileSink(path, layout.size, self._job.sync)
        else:
            from ms_ckpt_ext.engine.files.encrypted_sink import SealedSink

            file = SealedSink(path, output.name, layout, seal, self._job.sync)
        self.sinks.append(file)  # it is closed, whatever happens now
        if seal is None:
            for offset, literal in layout.literals:
                file.write(offset, memoryview(literal))
        sink: Sink = file
        if self._job.digests and holds is not None:
            sink = DigestingSink(
                file, lambda: streams_of({n: entry.extents for n, entry in holds().items()}, layout.size), layout.fixed
            )
            self._digesting[number] = sink
        self.sinks[number] = sink
        if layout.checksum is not None:
            from ms_ckpt_ext.engine.files.crc_sink import SummingSink

            self.sinks[number] = SummingSink(sink, layout)

    def landed(self, sink: int, nbytes: int) -> None:
        with self._lock:
            self._left[sink] -= nbytes
            complete = self._left[sink] == 0
        if complete:
            self._accept(sink)

    def _accept(self, number: int) -> None:
        if self._syncs is None:
            self._finish(number)
        else:
            self._accepted.append(self._syncs.submit(partial(self._finish, number)))

    def _finish(self, number: int) -> None:
        self.sinks[number].finish()
        output, seal = self._outputs[number], self._job.seal
        if self._job.digests:
            held = self._digested(number, output)
            held = held if seal is None else held.sealed_by(seal.key, output.name)
            self._staging.keep(output.name, json.dumps(held.to_json()).encode())
        self._staging.accept(output.name)

    def _digested(self, number: int, output: Output) -> FileDigests:
        """What the manifest is to say about a file that was written, before it is sealed."""
        size = self._job.size(output)
        if number in self._digesting:
            found = self._digesting.pop(number).digests()
            return FileDigests(size, {n: d for n, d in found.items() if n is not None}, found[None])
        try:
            index = self._job.contents(output, self._staging.partial(output.name))
        except FormatError:
            log.warning("no digests of %r are recorded, for what it holds is nothing that can be listed", output.name)
            return FileDigests(size, {})
        from ms_ckpt_ext.engine.integrity.digests import digest_file

        return digest_file(index, self._workers, PlainReader)

    def settle(self) -> None:
        """Wait until every file is on disk. Raises the first error of a sync."""
        for pending in self._accepted:
            pending.result()

    def __exit__(self, *_: object) -> None:
        if self._syncs is not None:
            self._syncs.close(finish=True)
        for sink in self.sinks:
            sink.close()
