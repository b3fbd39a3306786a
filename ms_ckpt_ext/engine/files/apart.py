"""Results stay out of the folders where the source's ranks have their files.

The newest file of a rank folder counts as that rank's, so a result beside it would be the shard of the next job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from ms_ckpt_ext.engine.files.job import Job
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import UsageError

_RANK_FOLDER = re.compile(r"^rank_\d+$")


def check_apart(catalog: Catalog, folder: str, job: Job) -> None:
    """Refuse a job in `folder` that would put files where a rank of the source has its own, or could have.

    That is any of several folders that hold source files, and every `ROOT/rank_N`, there or not, of a root in whose
    rank folders source files lie. One folder that is no rank's is nobody's: a result may go beside its source.

    Raises UsageError.
    """
    sources = set(_spellings(file.path for file in catalog.files))
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
    return _RANK_FOLDER.match(os.path.basename(folder)) is not None


def _spellings(paths: Iterable[str]) -> Iterator[str]:
    """The folders of files: where they really are, and where they are by name, for a rank folder may be a link."""
    for folder in {os.path.dirname(os.path.abspath(path)) for path in paths}:
        yield os.path.realpath(folder)
        yield os.path.join(os.path.realpath(os.path.dirname(folder)), os.path.basename(folder))
