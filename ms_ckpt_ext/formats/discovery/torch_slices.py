"""Files of torch's distributed checkpoint that hold one rank's slices, which look like whole tensors of another shape.

torch's `HuggingFaceStorageWriter` notes in `__metadata__`, as JSON, where in the whole tensor each one begins:

    "DCP_SHARDING_INFO": {"name": {"saved_offsets": [2, 0]}, …}

A tensor with an offset above zero is a slice. All are zero in the first rank's file, but also in one that holds whole
tensors; there the name decides: files of ranks are called `shard-00001-model-00001-of-00001.safetensors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from ms_ckpt_ext.errors import FormatError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.safetensors import SHARDING_INFO

JOIN = "join the files of all ranks first, by torch.distributed.checkpoint's consolidate_safetensors_files"
_NAMED = re.compile(r'"([^"]*)"\s*:\s*\{\s*"saved_offsets"\s*:\s*\[[0\s,]*[1-9]')
_BEGINS_LATER = re.compile(r'"saved_offsets"\s*:\s*\[[0\s,]*[1-9]')
_OF_A_RANK = re.compile(r"shard-\d+-.+-of-\d+\.safetensors")


def refuse_slices(indexes: Iterable[FileIndex]) -> None:
    """Raise FormatError, which names file and tensor, for a file that holds a rank's slices."""
    for index in indexes:
        info = index.metadata.get(SHARDING_INFO)
        found = "" if info is None else _slice_in(info, index)
        if found:
            raise FormatError(
                f"{index.path!r}: {found}. It is one rank's file of a save by torch's distributed checkpoint "
                f"({SHARDING_INFO} in its metadata): {JOIN}"
            )


def is_of_a_rank(name: str) -> bool:
    """Whether torch's distributed checkpoint gives a rank's file this name."""
    return _OF_A_RANK.fullmatch(name) is not None


def _slice_in(info: str, index: FileIndex) -> str:
    """Why there are slices in a file, for a message; "" when nothing says so."""
    named = _NAMED.search(info)
    if named is not None:
        return f"tensor {named[1]!r} is a slice, which begins behind the beginning of the whole tensor"
    if _BEGINS_LATER.search(info) is not None:
        return "one of its tensors is a slice, which begins behind the beginning of the whole tensor"
    if not is_of_a_rank(os.path.basename(index.path)):
        return ""
    first = next(iter(index.tensors), "")
    return f"tensor {first!r} may be a slice, by the name of the file, which can be renamed if all is whole"
