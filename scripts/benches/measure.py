"""Running commands in turns and watching them: what all benchmarks share."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.harness.ending import descendants

ROOT = Path(__file__).resolve().parent.parent.parent
IO = "print('IO', *open('/proc/self/io').read().split()[1:4:2])"  # rchar and wchar
_WATCH_SECONDS = 0.02


class Turn(NamedTuple):
    """One run of one command.

    Attributes:
        seconds, cpu: wall time; processor time of all its processes, user and system.
        peak, tree: bytes of resident memory at its highest: largest process, sum of all; 0 if not watched.
        read, written: bytes by the kernel's count, of commands made by `python`.
    """

    seconds: float
    cpu: float
    peak: int
    tree: int
    read: Optional[int]
    written: Optional[int]


def measure(command: list[str], watched: bool = True) -> Turn:
    """Run a command. Python may keep its compiled modules, as it has them of an installed package.

    Watching its memory takes a command that uses all cores a few hundredths of its time.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = _processor_time()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env)
    peaks = [0, 0]

    def watch() -> None:
        while watched and process.poll() is None:
            sizes = [_peak_memory(pid) for pid in (process.pid, *descendants(process.pid))]
            peaks[0], peaks[1] = max(peaks[0], *sizes), max(peaks[1], sum(sizes))
            time.sleep(_WATCH_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{err.decode()[-2000:]}")
    io = next((line.split()[1:] for line in out.decode().splitlines() if line.startswith("IO ")), [None, None])
    return Turn(seconds, _processor_time() - before, peaks[0], peaks[1], *(None if n is None else int(n) for n in io))


def _peak_memory(pid: int) -> int:
    """The most resident memory that a process has had so far, in bytes; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def take_turns(
    commands: dict[str, list[str]],
    clean: Callable[[], None],
    rounds: int,
    once: Collection[str] = (),
    memory: int = 0,
) -> dict[str, list[Turn]]:
    """Every command once a round, after an uncounted round to warm up; those in `once` in one counted round only.

    Memory is watched in the uncounted round alone, lest watching count. Before each turn nothing waits to be written,
    and `memory` bytes are at hand.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in commands}
    uncounted: dict[str, Turn] = {}
    for number in range(rounds + 1):
        for name, command in commands.items():
            if name in once and number > 1:
                continue
            clean()
            os.sync()
            have_at_hand(memory)
            turn = measure(command, watched=number == 0)
            if number == 0:
                uncounted[name] = turn
            else:
                turns[name].append(turn._replace(peak=uncounted[name].peak, tree=uncounted[name].tree))
    clean()
    return turns


def have_at_hand(nbytes: int) -> None:
    """Touch and free memory: a virtual machine that hands free memory back to its host pays when it is used again."""
    if nbytes:
        code = (
            f"import mmap; m = mmap.mmap(-1, {nbytes}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); "
            f"m.madvise(mmap.MADV_HUGEPAGE); [m.__setitem__(at, 1) for at in range(0, {nbytes}, 4096)]"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def against_cp(ours: Callable[[bool], str], made: Path, copy: Path) -> dict[str, list[str]]:
    """A job that syncs and one that does not, given as Python code, beside copies of the result that do and do not."""
    return {
        "ms_ckpt_ext, sync=False": python(ours(False)),
        "cp": ["cp", "-r", str(made), str(copy)],
        "ms_ckpt_ext": python(ours(True)),
        "cp and sync": ["sh", "-c", f"cp -r {made} {copy} && find {copy} -type f | xargs sync"],
    }


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"{code}; {IO}"]


def row(title: str, written: int, name: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    def median(values: Any) -> Any:
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def ratios_to(other: str) -> list[float]:
        return [t.seconds / c.seconds for t, c in zip(mine, turns.get(other, []))]

    mine = turns[name]
    ratios, synced = ratios_to("cp"), median(ratios_to("cp and sync"))
    return {
        "job": title,
        "output bytes": written,
        "command": name,
        "seconds": round(median(t.seconds for t in mine), 3),
        "least s": round(min(t.seconds for t in mine), 3),
        "cpu s": round(median(t.cpu for t in mine), 3),
        "x cp": round(median(ratios), 2),
        "least x cp": round(min(ratios), 2),
        "most x cp": round(max(ratios), 2),
        "x cp and sync": None if synced is None else round(synced, 2),
        "peak MiB": round(mine[0].peak / (1 << 20)),
        "tree MiB": round(mine[0].tree / (1 << 20)),
        "read / output": None if mine[0].read is None else round(median(t.read for t in mine) / written, 3),
        "written / output": None if mine[0].written is None else round(median(t.written for t in mine) / written, 3),
    }
