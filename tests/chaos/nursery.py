"""A process that has everything imported, and forks the processes of runs: starting Python takes longer than a job.

Started with the injector, which does nothing until a child has told it what to do. A child is orphaned at birth, so the
campaign, who is the reaper of its descendants, waits for it as for one of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.chaos.jobs import ROOT

_CHILD_SUBREAPER = 36
_LIBRARY = "CHAOS_LIBRARY"
WHERE = signal.SIGUSR2
"""Has a process print the stacks of its threads to standard error."""


class Birth(NamedTuple):
    """What a process is to be.

    Attributes:
        command: as for `exec`: Python, "-m", a module, its arguments.
        environment: all of it.
        folder: where it works.
        out, err: files for what it prints.
        limit: which limit of `resource`, and how much.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    out: str
    err: str
    limit: Optional[tuple[int, int]] = None


class Process:
    """A process of a run; `code` is as of `subprocess`, None while it runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: Optional[int] = None

    def poll(self) -> Optional[int]:
        """How it ended, if it has."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return self.code

    def wait(self, seconds: float) -> Optional[int]:
        """How it ended, within so many seconds; None if it did not."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.003)
        return self.code


class Nursery:
    """Where processes come from; a context manager."""

    def __init__(self, library: Path) -> None:
        ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CHAOS_")}
        # Threads of a library would be missing in a child.
        more = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
        self._mother = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**kept, **more, _LIBRARY: str(library)},
            text=True,
        )

    def bear(self, birth: Birth) -> Process:
        """A process by a fork of the one that has everything imported."""
        assert self._mother.stdin is not None and self._mother.stdout is not None
        self._mother.stdin.write(json.dumps(birth) + "\n")
        self._mother.stdin.flush()
        return Process(int(self._mother.stdout.readline()))

    def start(self, birth: Birth) -> Process:
        """The same as a new Python, with its imports."""
        pid = os.fork()
        if pid == 0:
            try:
                _become(birth)
                os.execvpe(birth.command[0], list(birth.command), dict(birth.environment))
            finally:
                os._exit(127)
        return Process(pid)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._mother.stdin is not None
        self._mother.stdin.close()
        self._mother.wait(10)


def _become(birth: Birth) -> None:
    """Take the place of a process: session, folder, files, limit."""
    os.setsid()
    os.chdir(birth.folder)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a campaign in the background of a shell ignores it
    for number, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (birth.out, os.O_WRONLY | os.O_CREAT), (birth.err, os.O_WRONLY | os.O_CREAT))
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    if birth.limit is not None:
        resource.setrlimit(birth.limit[0], (birth.limit[1], birth.limit[1]))


def main() -> int:
    """Bear children until there is no more to read; each returns from here as well, with its exit code."""
    entries = _entries()
    gc.freeze()
    for line in sys.stdin:
        asked: dict[str, Any] = dict(zip(Birth._fields, json.loads(line)))
        reading, writing = os.pipe()
        midwife = os.fork()
        if midwife:
            os.waitpid(midwife, 0)  # then the child is the campaign's
            os.close(writing)
            sys.stdout.write(os.read(reading, 32).decode() + "\n")
            sys.stdout.flush()
            os.close(reading)
            continue
        child = os.fork()
        if child:
            os.write(writing, str(child).encode())
            os._exit(0)
        return _live(Birth(**asked), entries)
    return 0


def _entries() -> Mapping[str, Any]:
    """Module of a command -> what it does with its arguments; and all that it will need is imported."""
    import numpy  # noqa: F401

    from ms_ckpt_ext.cli.main import main as cli
    from tests.chaos import ranks, sockets  # noqa: F401

    return {"ms_ckpt_ext": cli, "tests.chaos.ranks": lambda argv: ranks.main(*argv)}


def _live(birth: Birth, entries: Mapping[str, Any]) -> int:
    library = os.environ[_LIBRARY]
    _become(birth)
    os.environ.clear()
    os.environ.update(birth.environment)
    module, argv = birth.command[2], list(birth.command[3:])
    sys.argv = [module, *argv]
    with contextlib.suppress(OSError):  # what the parent has opened
        for number in map(int, os.listdir("/proc/self/fd")):
            if number > 2:
                os.close(number)
    ctypes.CDLL(library).chaos_begin()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(WHERE, all_threads=True)
    return int(entries[module](argv) or 0)


if __name__ == "__main__":
    raise SystemExit(main())
