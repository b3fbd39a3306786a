"""What an earlier run of a job left: which of its files need not be written again."""

from __future__ import annotations

import json
from functools import partial
from typing import Optional

from ms_ckpt_ext.engine.digests import digest_tensors
from ms_ckpt_ext.engine.job import Job, Output
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.storage.staging import Staging


def noted(staging: Staging, name: str) -> Optional[dict[str, str]]:
    """The digests of a complete file; None where there are none."""
    try:
        noted: dict[str, str] = json.loads(staging.note(name) or b"null")
    except ValueError:
        return None
    return noted


def is_done(job: Job, output: Output, staging: Staging) -> bool:
    """True when an output is complete: by its size and framing, and where it is encrypted, by the key and its start."""
    literals = output.layout.fixed if job.seal is None else output.layout.fixed[:1]
    if job.digests_contents and noted(staging, output.name) is None:
        return False
    return staging.holds(output.name, job.size(output), literals, partial(job.open, output))


def is_intact(job: Job, output: Output, staging: Staging, workers: int) -> bool:
    """Whether a complete output still holds what was written: its tensors' digests are those noted at the time.

    Reads the file, so it is for what an earlier run left, once. Encrypted files have no digests, and copies neither:
    of them, True.
    """
    if not job.digests_contents:
        return True
    path, layout = staging.place(output.name), output.layout
    index = FileIndex(path, layout.size, 0, layout.tensors)
    try:
        return digest_tensors(index, workers=workers, opener=partial(job.open, output)) == noted(staging, output.name)
    except (OSError, CheckpointError):  # what cannot be read is written again
        return False
