"""The formats of checkpoint files, a row for each, and what kind a file is: decided here and nowhere else.

A file's suffix names its format. `.ckpt` is the suffix of checkpoints, of strategy files, and of files of other
programs; the first bytes tell them apart. `.json` may be a strategy. A safetensors file has a suffix of its own
and is never taken for anything else: its first byte, the low one of its header's length, may be that of any format.
Under any name, what git leaves in place of a large file that was not fetched is recognised by its text.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Optional

from ms_ckpt_ext.errors import storage_error


class Format(NamedTuple):
    """A format of checkpoint files.

    Attributes:
        name: what arguments call it; a file's suffix without the dot.
        reader, writer: modules of `ms_ckpt_ext.formats`, imported when there is a file to read or to write. The reader
            has `read_index` and `stored_checksum`, the writer `layout`, as in `formats.safetensors`.
        mixed: files of other kinds have the suffix, too.
        blocks: it may be encrypted in MindSpore's blocks, and the reader has `stored_crc`; others take the chunked
            container only.
        by_name: MindSpore lists a file's parameters in the order of names; else in that of the file.
        listed: a header of limited length lists the tensors; the writer has `in_headers`.
        hub: Hugging Face's libraries read it.
    """

    name: str
    reader: str
    writer: str
    mixed: bool = False
    blocks: bool = False
    by_name: bool = False
    listed: bool = False
    hub: bool = False

    @property
    def suffix(self) -> str:
        """The end of its files' names, with the dot."""
        return f".{self.name}"


SAFETENSORS = Format("safetensors", "safetensors", "safetensors", by_name=True, listed=True, hub=True)
CKPT = Format("ckpt", "ckpt", "ckpt_writer", mixed=True, blocks=True)
FORMATS = {each.name: each for each in (SAFETENSORS, CKPT)}
"""By name; the first is written by default."""
SUFFIXES = tuple(each.suffix for each in FORMATS.values())
STRATEGY_SUFFIXES = (CKPT.suffix, ".json")

CHECKPOINT, STRATEGY, FOREIGN = "checkpoint", "strategy", "foreign"
"""FOREIGN: certainly neither a checkpoint nor a strategy that this package knows."""
HEAD_BYTES = 16
"""How many first bytes of a `.ckpt` are looked at."""
_JSON_BYTES, _POINTER_BYTES = 1 << 20, 1024
_POINTER = b"version https://git-lfs.github.com/spec/"
_CURRENT_STAGE = b"\x08"
"""Key of the first field of a strategy, which is required; a checkpoint begins with 0a."""
_MAGICS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch writes it"),
    (b"\x80\x02", "a pickle, as PyTorch writes it"),
    (b"\x89HDF\r\n", "HDF5"),
)

METADATA_NAME, COMMON_NAME = "metadata.json", "common.json"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
"""Files of MindFormers, see `formats.discovery.mindformers`."""
MINDFORMERS_FILE = re.compile(r"(?:^|-)(model|opt)-(\d{7,})-(\d{7,})\.safetensors$")


def format_of(path: str) -> Optional[Format]:
    """The format that a file's suffix names; None for an unknown one."""
    return FORMATS.get(os.path.splitext(path)[1][1:])


def is_mindformers(name: str) -> bool:
    """Whether a file is one of MindFormers' own, by its name."""
    return name in (METADATA_NAME, COMMON_NAME, TRACKER_NAME) or MINDFORMERS_FILE.search(name) is not None


def kind_of(path: str) -> str:
    """The kind of a `.ckpt`, `.safetensors` or `.json` file. Only regular files are opened: a pipe would block.

    Raises:
        StorageError: it cannot be read.
    """
    form = format_of(path)
    if (form is not None and not form.mixed) or not os.path.isfile(path):
        return CHECKPOINT
    if path.endswith(".json"):
        return STRATEGY if b"parallel_layout_item" in _head(path, _JSON_BYTES) else FOREIGN
    head = _head(path, HEAD_BYTES)
    return STRATEGY if is_strategy(head) else CHECKPOINT if what_else(head) is None else FOREIGN


def is_strategy(head: bytes) -> bool:
    """Whether a `.ckpt` with this head is a strategy: MindSpore's protobuf or, which it takes under this name, JSON.

    >>> is_strategy(bytes.fromhex("0802120a")), is_strategy(bytes.fromhex("0a140a01")), is_strategy(b"")
    (True, False, False)
    """
    return head.startswith((_CURRENT_STAGE, b"{")) and what_else(head) is None


def what_else(head: bytes) -> Optional[str]:
    """What a `.ckpt` with this head is, where it is certainly none of MindSpore's; None where that is not certain."""
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file, and should be called so"
    return next((what for magic, what in _MAGICS if head.startswith(magic)), None)


def pointer_fault(path: str, head: bytes) -> Optional[str]:
    """The message for a file that is only git-lfs' pointer to its contents; None for another. `head` has 8 bytes."""
    if head[:8] != _POINTER[:8]:
        return None
    text = _head(path, _POINTER_BYTES)
    if not text.startswith(_POINTER):
        return None
    fields = dict(line.split(b" ", 1) for line in text.splitlines() if b" " in line)
    size = fields.get(b"size", b"").decode("ascii", "replace")
    return (
        f"{path!r} is a git-lfs pointer{f' to a file of {size} bytes' if size.isdigit() else ''}, not the file itself, "
        "which was not fetched: run `git lfs pull` in its folder, or download it"
    )


def _head(path: str, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(length)
    except OSError as error:
        raise storage_error("read", path, error) from error
