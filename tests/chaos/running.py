"""Starts the processes of a run, and does to them what a fault says."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, Optional

from tests.chaos.faults import Struck
from tests.chaos.injector import environment
from tests.chaos.jobs import ROOT, Job, Place
from tests.chaos.nursery import WHERE, Birth, Nursery, Process
from tests.harness.meeting_point import MeetingPoint

TIMEOUT = 40.0
"""Seconds that a run may take: longer than any wait in the package, as the machine may be busy."""
_RIVAL_SECONDS = 1.5


class Ended(NamedTuple):
    """How a process ended. `code` is None for one that did not; `children` are processes that outlived it."""

    code: Optional[int]
    out: str
    err: str
    children: int


class Stage:
    """One run under a fault, or without one. See `faults.Scene`."""

    def __init__(
        self,
        nursery: Nursery,
        job: Job,
        place: Place,
        other: Place,
        struck: Struck,
        library: Optional[Path],
        rng: Random,
        victim: int = -1,
    ) -> None:
        self.job, self.place, self.other, self.struck, self.rng = job, place, other, struck, rng
        self._nursery = nursery
        self._library, self._victim = library, victim
        self._mark = place.root / "held"
        self._started: list[Process] = []
        self._rivals: list[Process] = []
        self.fired = False

    @property
    def pids(self) -> Sequence[int]:
        """Processes that the fault is for: one rank, or all."""
        chosen = self._started if self._victim < 0 else [self._started[self._victim]]
        return [process.pid for process in chosen if process.poll() is None]

    def rival(self, other: bool) -> None:
        """See `faults.Scene`."""
        place = self.place._replace(source=self.other.source, beside=self.other.beside) if other else self.place
        process = self._start(place, 0, {}, f"rival{len(self._rivals)}")
        self._rivals.append(process)
        process.wait(_RIVAL_SECONDS)  # it may be waiting for the one that is held

    def run(self, counts: Optional[Path] = None) -> tuple[list[Ended], list[Ended]]:
        """How the processes ended, and rivals of theirs."""
        with self._meeting():
            for rank in range(self.job.processes):
                told = self._told(rank, counts)
                self._started.append(self._start(self.place, rank, told, f"rank{rank}"))
            self._watch()
            everybody = [*self._started, *self._rivals]
            ended = [self._ended(process, name) for process, name in zip(everybody, self._names())]
        self._mark.unlink(missing_ok=True)
        return ended[: len(self._started)], ended[len(self._started) :]

    def _names(self) -> Iterator[str]:
        yield from (f"rank{rank}" for rank in range(len(self._started)))
        yield from (f"rival{number}" for number in range(len(self._rivals)))

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        if self.job.processes == 1:
            yield
            return
        path = self.place.root / "meeting"
        with MeetingPoint(path, self.job.processes):
            yield
        path.unlink()

    def _told(self, rank: int, counts: Optional[Path]) -> Mapping[str, str]:
        """What the environment says of a process: nothing of one that no fault is for."""
        if self._library is None or (counts is None and self._victim not in (-1, rank)):
            return {}
        injection = self.struck.injection
        if counts is None and not injection.doing and injection.clock is None:
            return {}
        file = None if counts is None else counts.with_name(f"{counts.name}{rank}")
        mark = self._mark if rank == max(self._victim, 0) else self.place.root / f"never{rank}" / "held"
        return environment(self._library, self.place.source, self.place.target.parent, injection, mark, file)

    def _start(self, place: Place, rank: int, told: Mapping[str, str], name: str) -> Process:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CHAOS_")}
        more = {"PYTHONPATH": str(ROOT), "TMPDIR": str(place.root / "tmp"), **told}
        birth = Birth(
            self.job.command(place, rank),
            {**kept, **more},
            str(place.root),
            *(str(place.root / f"{name}.{end}") for end in ("out", "err")),
            self.struck.limit if name.startswith("rank") else None,
        )
        return (self._nursery.start if self.struck.new_python else self._nursery.bear)(birth)

    def _watch(self) -> None:
        """Wait for the end of all, or for the moment of the action, which is done once."""
        began, action = time.monotonic(), self.struck.action
        while any(process.poll() is None for process in self._started):
            elapsed = time.monotonic() - began
            due = self._mark.exists() or bool(self.struck.after and elapsed > self.struck.after)
            if action is not None and due:
                self.fired = True
                action(self)
                action = None
                self._mark.unlink(missing_ok=True)
                if self.struck.silent:
                    self._after_others(began)
            if elapsed > TIMEOUT:
                return
            time.sleep(0.004)

    def _after_others(self, began: float) -> None:
        """End the stopped ones when nobody else is left."""
        silent = set(self.pids)
        others = [process for process in self._started if process.pid not in silent]
        while time.monotonic() - began < TIMEOUT and any(process.poll() is None for process in others):
            time.sleep(0.01)
        for pid in silent:
            os.kill(pid, signal.SIGKILL)

    def _ended(self, process: Process, name: str) -> Ended:
        code = process.wait(1)
        if code is None:
            os.kill(process.pid, WHERE)
            code = process.wait(1)
        children = _session(process.pid) if code is not None else 0
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)
        out, err = ((self.place.root / f"{name}.{end}").read_text(errors="replace") for end in ("out", "err"))
        return Ended(code, out, err, children)


def _session(leader: int) -> int:
    """Processes of a session, whose leader has ended."""
    found = 0
    for number in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
            found += fields[3] == str(leader) and fields[0] != "Z" and int(number) != leader
    return found
