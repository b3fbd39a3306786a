"""Suffix -> reader: the one place that knows which formats there are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import FileIndex, FileLayout, TensorSpec
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader

_Layout = Callable[[Sequence[TensorSpec], Mapping[str, str]], FileLayout]
_READERS: dict[str, Callable[[ByteReader, int], FileIndex]] = {".safetensors": safetensors.read_index}

_LAYOUTS: dict[str, _Layout] = {".safetensors": safetensors.layout}


def open_reader(path: str) -> ByteReader:
    """The bytes of a checkpoint file. Raises StorageError."""
    return PlainReader(path)


def read_index(path: str) -> FileIndex:
    """Table of contents of one checkpoint file, by its suffix.

    Raises:
        UsageError: a suffix no reader knows.
        FormatError, StorageError: as the format's reader says.
    """
    suffix = os.path.splitext(path)[1]
    if suffix not in _READERS:
        raise UsageError(f"{path!r}: no reader for {suffix or 'a name without suffix'!r}; known are {sorted(_READERS)}")
    with PlainReader(path) as reader:
        return _READERS[suffix](reader, reader.mtime_ns)


def lay_out(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Plan an output file of the format that its suffix says. Raises UsageError for a suffix no writer knows."""
    suffix = os.path.splitext(name)[1]
    if suffix not in _LAYOUTS:
        raise UsageError(f"cannot write {name!r}: no writer for {suffix!r}; known are {sorted(_LAYOUTS)}")
    return _LAYOUTS[suffix](specs, metadata)


def read_indexes(paths: Iterable[str], workers: int = 8) -> list[FileIndex]:
    """Tables of contents of many files, in order, read in parallel where that helps (network storage)."""
    with ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(read_index, paths))
