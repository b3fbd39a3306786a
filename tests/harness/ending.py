"""A script that is told to end takes with it all that it has started, and then removes its files.

Ctrl-C reaches every process of a terminal's job that has no session of its own; SIGTERM, by which `timeout`, `kill` and
schedulers end a job, reaches one, which by default ends at once and leaves its children and its folders behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Optional

_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def descendants(pid: int) -> list[int]:
    """The descendants of a process, by files in /proc/PID: listing all processes of a machine takes milliseconds."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found[1:]


@contextlib.contextmanager
def taking_all_along(grace: float = 5.0) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C end all descendants of this process, then raise in it, so that its files are removed:
    `SystemExit` of 128 and the signal's number, or `KeyboardInterrupt`.

    Orphans among the descendants become children of this process, so none is lost. A signal that is ignored, as by
    `nohup`, stays ignored.

    Args:
        grace: seconds that they have to end by themselves.
    """
    ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
    mine = os.getpid()

    def end(number: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != mine:  # a fork, which has nothing to remove
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # what removes files is not interrupted
        _end_descendants(grace)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _end_descendants(grace: float) -> None:
    """Ask them to end, kill those that do not, and wait until they are gone."""
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + seconds
        asked: set[int] = set()
        while (left := running(descendants(os.getpid()))) and time.monotonic() < deadline:
            for pid in set(left) - asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            asked.update(left)
            time.sleep(0.01)


def running(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            found += [pid] * (state not in "ZX")
    return found
