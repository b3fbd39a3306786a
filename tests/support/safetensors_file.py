"""safetensors files made by hand."""

from __future__ import annotations

import json
from typing import Any

from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import FileIndex
from tests.support.memory import MemoryReader


def index(raw: bytes) -> FileIndex:
    """The table of contents of a file that consists of these bytes."""
    return safetensors.read_index(MemoryReader(raw, "a.safetensors"))


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A file of a header, as JSON or as a value that becomes JSON, and of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
