"""Makes the machine behave otherwise, at functions of the operating system."""

from __future__ import annotations

import builtins
import ctypes
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import pytest

from ms_ckpt_ext.storage import linux

BOOT_FILE = "/proc/sys/kernel/random/boot_id"


def booted(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    """Make the machine appear rebooted: this is the identity of its boot."""
    real = builtins.open

    def opened(path: Any, *args: Any, **more: Any) -> Any:
        return io.BytesIO(name) if path == BOOT_FILE else real(path, *args, **more)

    monkeypatch.setattr(builtins, "open", opened)


def system_call(monkeypatch: pytest.MonkeyPatch, name: str, call: Callable[..., Any]) -> None:
    """Replace a function of `os`, also where pathlib has a reference of its own to it, as before Python 3.11."""
    monkeypatch.setattr(os, name, call)
    if hasattr(pathlib, "_NormalAccessor") and hasattr(pathlib._NormalAccessor, name):
        monkeypatch.setattr(pathlib._NormalAccessor, name, staticmethod(call))


class _Library:
    """The C library, with some of its functions replaced; None for one that it lacks."""

    def __init__(self, real: Any, calls: dict[str, Optional[Callable[..., int]]]) -> None:
        self._real, self._calls = real, calls

    def __getattr__(self, name: str) -> Any:
        call = self._calls[name] if name in self._calls else getattr(self._real, name)
        if call is None:
            raise AttributeError(name)
        return call


def c_library(
    monkeypatch: pytest.MonkeyPatch, there: bool = True, **calls: Optional[Callable[..., int]]
) -> Optional[_Library]:
    """Replace `calls` of the C library, or make it absent, as on other systems. Returns the real one."""
    real = linux._libc()
    monkeypatch.setattr(linux, "_libc", lambda: _Library(real, calls) if there else None)
    return real  # type: ignore[no-any-return]


def fails(code: int) -> Callable[..., int]:
    """A function for the C library that fails with this error number."""

    def call(*_: Any) -> int:
        ctypes.set_errno(code)
        return -1

    return call


def refuses(code: int) -> Callable[..., Any]:
    """A function for `os` that fails with this error number."""

    def refuse(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


def copies_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file system copy by itself, as NFS 4.2 does."""

    def fstatfs(_fd: int, status: Any) -> int:
        status[0] = 0x6969
        return 0

    c_library(monkeypatch, fstatfs=fstatfs)


class ReadMade(NamedTuple):
    """One read of a file: its path, where, and how many bytes came."""

    path: str
    offset: int
    nbytes: int


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[ReadMade]:
    """A list that grows by every read at an offset of a file from now on."""
    found: list[ReadMade] = []
    preadv, library = os.preadv, linux._libc()

    def noted(fd: int, offset: int, got: int) -> int:
        found.append(ReadMade(os.readlink(f"/proc/self/fd/{fd}"), offset, max(got, 0)))
        return got

    def by_python(fd: int, buffers: Sequence[Any], offset: int) -> int:
        return noted(fd, offset, preadv(fd, buffers, offset))

    def by_address(fd: int, vector: int, count: int, offset: int) -> int:
        return noted(fd, offset, library.preadv(fd, vector, count, offset))

    monkeypatch.setattr(os, "preadv", by_python)
    c_library(monkeypatch, preadv=by_address)
    return found


def contents_read(reads: Sequence[ReadMade], *paths: Path) -> list[ReadMade]:
    """Reads of safetensors files behind their headers, in the order in which they were made."""
    begins = {str(path): 8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths}
    return [read for read in reads if read.offset >= begins.get(read.path, sys.maxsize)]
