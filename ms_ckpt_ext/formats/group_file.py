"""MindSpore's file of communication groups (`GROUP_INFO_FILE`): which ranks save what this rank saves.

In protobuf's wire format, as strategy files are:

    GroupMap   groups (1): each a name and its ranks;  ckpt_restore_rank_list (2): Ranks
    Ranks      numbers of ranks (1), one by one or packed
"""

from __future__ import annotations

import os
from pathlib import Path

from ms_ckpt_ext.errors import FormatError, storage_error
from ms_ckpt_ext.formats.wire import BYTES, Cursor, MemoryReader, fields, numbers


def restore_ranks(path: str) -> list[int]:
    """The ranks whose checkpoints hold what the checkpoint of the rank holds that wrote this file, in its order.

    Raises:
        FormatError: it is no such file, or lists none.
        StorageError: it cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise storage_error("read group file", path, error) from error
    cursor = Cursor(MemoryReader(data, path))
    found: list[int] = []
    for outer in fields(cursor, len(data)):
        if outer.wire == BYTES and outer.number == 2:
            cursor.pos = outer.value
            found += numbers(cursor, outer.stop, 1)
    if not found:
        raise FormatError(
            f"{os.path.basename(path)!r} lists no ranks to restore from; give the file that GROUP_INFO_FILE named when "
            f"the job was compiled (here: {path!r})"
        )
    return found
