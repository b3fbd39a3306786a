"""MindSpore's file of communication groups (`GROUP_INFO_FILE`): which ranks save what the rank that wrote it saves."""

from __future__ import annotations

import os

from ms_ckpt_ext.errors import FormatError, ReadError, storage_error
from ms_ckpt_ext.formats.strategies.file import decode_groups
from ms_ckpt_ext.storage.linux import read_small


def restore_ranks(path: str) -> list[int]:
    """The ranks whose checkpoints hold the same as that of the rank that wrote this file, in the file's order.

    Raises:
        FormatError: it is not such a file, or lists no ranks.
        StorageError: it cannot be read.
    """
    try:
        found = list(decode_groups(read_small(path, pipe=True)).ckpt_restore_rank_list.dim)
    except OSError as error:
        raise storage_error("read group file", path, error, ReadError) from error
    except ValueError as error:
        raise FormatError(
            f"{path!r} is no file of groups ({error}); give the one that GROUP_INFO_FILE named"
        ) from error
    if not found:
        raise FormatError(
            f"{os.path.basename(path)!r} lists no ranks to restore from; give the file that GROUP_INFO_FILE named when "
            f"the job was compiled (here: {path!r})"
        )
    return found
