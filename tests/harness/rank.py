"""`rank.py JOB`: run a worker script as every process of a job; JOB is a file that `msrun` wrote, see `start`.

1. What takes longest, importing MindSpore, is done once; then the processes are forked.
2. A process whose script came to its end leaves the file NAME.ended. So one that crashes in MindSpore's teardown,
   after all was done, is told from one that failed.
3. How a process ended is written to NAME.code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LISTENS = "0A"
_PATIENCE = 20.0
"""Seconds to wait for the scheduler. Ranks that come before it try again in growing intervals."""


def start(job: Mapping[str, Any], logs: Path) -> None:
    """Fork a process for every role, and wait for them.

    Args:
        job: `command`, the script and its arguments; `roles`, name -> environment of each process.
        logs: where they run, and write NAME.log and NAME.err.
    """
    script = Path(job["command"][0])
    used = b"mindspore" in script.read_bytes()
    if used:
        importlib.import_module("mindspore")
    running: dict[int, str] = {}
    for name, environment in job["roles"].items():
        child = os.fork()
        if child == 0:
            _be(name, environment, logs)
            return _run(script, job["command"][1:], logs / f"{name}.ended")
        running[child] = name
        if used and "MS_SCHED" in environment.values():
            _wait_for(int(environment["MS_SCHED_PORT"]))
    while running:
        ended, status = os.wait()
        (logs / "code").write_text(str(os.waitstatus_to_exitcode(status)))
        os.replace(logs / "code", logs / f"{running.pop(ended)}.code")
    return None


def _be(name: str, environment: Mapping[str, str], logs: Path) -> None:
    os.environ.update(environment)
    for descriptor, ending in ((1, "log"), (2, "err")):
        file = os.open(logs / f"{name}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)


def _run(script: Path, arguments: list[str], mark: Path) -> None:
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    mark.touch()


def _wait_for(port: int) -> None:
    """Wait until somebody listens at a port, without connecting to it."""
    wanted, until = f":{port:04X}", time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if local.endswith(wanted) and state == _LISTENS:
                return
        time.sleep(0.02)


if __name__ == "__main__":
    start(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent)
