"""What earlier runs of a job and its other shares left: which of its files need not be written again."""

from __future__ import annotations

from functools import partial
from typing import Optional

from ms_ckpt_ext.core.parsing import from_json
from ms_ckpt_ext.engine.files.job import Job, Output
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import FileDigests
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.storage.staging import Staging


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
    """True when an output waits: complete by its size and framing, and where it is encrypted, by key and beginning."""
    literals = output.layout.fixed if job.seal is None else output.layout.fixed[:1]
    if job.digests and noted(staging, output.name) is None:
        return False
    return staging.holds(output.name, job.size(output), literals, partial(job.open, output))


def is_intact(job: Job, output: Output, staging: Staging, workers: int) -> bool:
    """Whether a complete output still holds what was written: its digests are those noted at the time.

    Reads the file, so it is for what an earlier run left, once. Without digests there is nothing to compare: True.
    """
    if not job.digests:
        return True
    held = noted(staging, output.name)
    if held is None or not held.known:
        return held is not None
    try:
        expected = held.opened_by(None if job.seal is None else job.seal.key, output.name)
        index = job.contents(output, str(staging.folder / output.name))
        return digest_file(index, workers, partial(job.open, output))[1:] == expected[1:]
    except (OSError, CheckpointError):  # what cannot be read is written again
        return False
