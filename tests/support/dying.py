"""Jobs that are killed, in a process of their own and without notice, before a call that changes the disk."""

from __future__ import annotations

import itertools
import mmap
import os
import pathlib
import signal
import threading
import traceback
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Callable

CALLS = ("pwrite", "copy_file_range", "rename", "replace", "unlink", "fsync", "mkdir", "rmdir")
NAMING = ("rename", "replace", "unlink", "rmdir")
"""Those that change names of files."""

Before = Callable[[str, Sequence[Any]], bool]
"""Given the name of a function of `os` and its arguments: whether it must not be called any more."""


def kill_before(stop: Before) -> None:
    """From now on this process dies at the first of `CALLS` for which `stop` is true. They are made one at a time."""
    turn = threading.RLock()

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            with turn:
                if stop(name, args):
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **more)

        return wrapper

    for name in filter(partial(hasattr, os), CALLS):
        call = watched(name, getattr(os, name))
        setattr(os, name, call)
        if hasattr(pathlib, "_NormalAccessor"):  # up to Python 3.10 paths have references of their own
            setattr(pathlib._NormalAccessor, name, staticmethod(call))


def survives(job: Callable[[], object], stop: Before) -> bool:
    """Run a job in a process that dies as `kill_before` says; True when it came to its end. It must not fail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads, of which the job needs none
        child = os.fork()
    if child == 0:
        try:
            kill_before(stop)
            job()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the job failed; what it said stands above"
    return os.WIFEXITED(status)


def killed(job: Callable[[], object], stop: Before) -> None:
    """Run a job that dies as `kill_before` says, which it must."""
    assert not survives(job, stop), "the job came to its end"


def calls_of(job: Callable[[], object]) -> int:
    """How many of `CALLS` a job makes, in a process of its own."""
    with mmap.mmap(-1, 8) as shared:

        def count(_name: str, _args: Sequence[Any]) -> bool:
            shared[:] = (int.from_bytes(shared[:], "little") + 1).to_bytes(8, "little")
            return False

        assert survives(job, count)
        return int.from_bytes(shared[:], "little")


def any_call(_name: str, _args: Sequence[Any]) -> bool:
    """Each of `CALLS`."""
    return True


def never(_name: str, _args: Sequence[Any]) -> bool:
    """None of `CALLS`: the process has another reason to die."""
    return False


def nth(number: int, stop: Before) -> Before:
    """The call for which `stop` is true for the n-th time, from 1 on."""
    calls = itertools.count(1)
    return lambda name, args: stop(name, args) and next(calls) >= number


def behind(stop: Before) -> Before:
    """The call that comes next after one for which `stop` is true."""
    seen = [False]

    def is_behind(name: str, args: Sequence[Any]) -> bool:
        found, seen[0] = seen[0], seen[0] or stop(name, args)
        return found

    return is_behind


def changes_names(name: str, _args: Sequence[Any]) -> bool:
    """Any call that changes names of files."""
    return name in NAMING


def completes(name: str, args: Sequence[Any]) -> bool:
    """A file of a job is declared complete: it loses the end of its name, in the hidden folder."""
    return name == "rename" and os.fspath(args[0]).endswith(".partial") and ".ms_ckpt_ext/" in os.fspath(args[1])


def notes_what_to_publish(name: str, args: Sequence[Any]) -> bool:
    """All files are complete, and the journal of what is to be published is about to appear."""
    return name == "replace" and os.fspath(args[1]).endswith(".journal")


def removes(ending: str) -> Before:
    """A file with this end of its name is about to go."""
    return lambda name, args: name == "unlink" and os.fspath(args[0]).endswith(ending)


def puts_on_record(name: str, args: Sequence[Any]) -> bool:
    """All is in place, and the record of what is published is about to appear."""
    return name == "replace" and os.path.basename(args[1]) == ".ms_ckpt_ext.json"


def begun(job: Callable[[], object], files: int = 1) -> None:
    """Run a job that dies when so many of its files are complete."""
    killed(job, nth(files + 1, completes))
