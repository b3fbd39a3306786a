"""What a job would do, without doing it: files and bytes that it would read and write."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Optional

from ms_ckpt_ext.core.planning.io_units import Direct, Limits, Unit
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.files.execution import in_rounds, is_done, published
from ms_ckpt_ext.engine.files.job import Job, Report, check_job, job_fingerprint
from ms_ckpt_ext.engine.integrity import manifest
from ms_ckpt_ext.storage.staging import Staging, free_space


class Preview(Report):
    """What a job would do, with the numbers that its report would have; nothing was written.

    Attributes:
        target: the directory.
        sources: path of every file that would be read -> bytes.
        sizes: file that would be written, relative to the target -> bytes on disk.
        replaces: files of an older result in the target that would be taken away.
        free: bytes that the target's file system has left; None when that cannot be told.
    """

    def __init__(
        self,
        report: Report,
        target: str,
        sources: Mapping[str, int],
        sizes: Mapping[str, int],
        replaces: tuple[str, ...],
        free: Optional[int],
    ) -> None:
        super().__init__(**vars(report))
        self.target, self.sources, self.sizes, self.replaces, self.free = target, sources, sizes, replaces, free


def preview(job: Job, target: str, workers: int, limits: Limits) -> Preview:
    """Tell what `execute` would do now. Raises as it does, but for what only writing can meet."""
    replaced = tuple(check_job(job, target))
    staging = Staging(target, job_fingerprint(job), manifest, job.task, job.sync)
    sizes = {name: job.size(output) for name, output in job.everything.items()}
    there = published(job, staging) | staging.begun().keys()
    done = there >= sizes.keys()
    kept = [output.name for output in job.outputs if output.name in there or is_done(job, output, staging)]
    todo = [output for output in job.outputs if output.name not in kept]
    sources: dict[str, int] = {}
    reads = 0
    for tasks in in_rounds(job, todo, workers):
        for file, count, nbytes in _reads(schedule(tasks, job.source.stored, limits)):
            path = job.source.files[file].path
            sources[path], reads = sources.get(path, 0) + nbytes, reads + count
    names = tuple(output.name for output in todo)
    written = {name: sizes[name] for name in names}
    report = Report(sum(sources.values()), reads, sum(written.values()), names, tuple(kept), done)
    return Preview(report, target, sources, written, replaced, free_space(target))


def _reads(units: Iterable[Unit]) -> Iterator[tuple[int, int, int]]:
    """(file, reads, bytes) of planned work."""
    for unit in units:
        if isinstance(unit, Direct):
            yield unit.file, 1, unit.length
        else:
            yield from ((read.file, len(read.extents), read.nbytes) for read in unit.reads)
