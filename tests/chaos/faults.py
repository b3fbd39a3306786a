"""Faults: where, when and for how long; and the outcomes that are allowed. A row of `FAULTS` for each.

Most faults are a class of calls, on files of the source or the target, and a number among them; how often a job makes
each was counted before, so a fault may strike anywhere from its first look to its last rename. Others are actions done
from outside while such a call waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Callable, NamedTuple, Optional, Protocol

from tests.chaos.injector import CHANGING, Injection
from tests.chaos.jobs import Job, Place

RIGHT, ERROR, KILLED = "right", "error", "killed"
Counts = Mapping[str, int]
"""Class of calls with its side -> how often the process makes it."""


class Scene(Protocol):
    """What an action may look at and use."""

    place: Place
    other: Place
    """The other checkpoint, whose files may take the place of the source's."""
    pids: Sequence[int]
    """Processes that the fault is for."""
    rng: Random

    def rival(self, other: bool) -> None:
        """Start the same command once more, or that of the other checkpoint; it ends when it likes."""


Action = Callable[[Scene], None]


class Struck(NamedTuple):
    """What happens to one run.

    Attributes:
        injection: what happens to its calls.
        action: what is done from outside while a call is held; or, where none is, after `after` seconds.
        limit: a limit of the process from its start: which, and how much.
        room: bytes of the file system that the target is on; None for the one that is there.
        may: the outcomes that are allowed.
        told: the error must name a file of the run.
        spoils: the source is changed.
        gone: the target is gone for good, so that nothing can be tidied up there.
        silent: the process never comes to its end by itself.
        new_python: the process is a new Python, with its imports.
    """

    injection: Injection = Injection()
    action: Optional[Action] = None
    after: float = 0.0
    limit: Optional[tuple[int, int]] = None
    room: Optional[int] = None
    may: frozenset[str] = frozenset({RIGHT})
    told: bool = True
    spoils: bool = False
    gone: bool = False
    silent: bool = False
    new_python: bool = False


Strike = Callable[[Random, Job, Counts], Optional[Struck]]
"""Gives what happens; None where the fault does not apply to a job."""
_MAY_FAIL = frozenset({RIGHT, ERROR})
_MAY_DIE = frozenset({RIGHT, KILLED})
_BOTH = ("source", "target")
_TAKING = ("open", "write", "copy", "reserve", "sync", "rename", "mkdir")
"""Calls that may find no space left."""
_ALL = ("open", "stat", "list", "read", "write", "copy", "reserve", "sync", "rename", "unlink", "mkdir")
_RETRIED = ("open", "read", "write", "copy", "reserve", "sync")
"""Calls that may be interrupted by a signal."""


def _calls(counts: Counts, kinds: Sequence[str], sides: Sequence[str] = _BOTH) -> list[str]:
    return [call for kind in kinds for side in sides if counts.get(call := f"{kind}@{side}", 0)]


def _somewhere(
    rng: Random, counts: Counts, kinds: Sequence[str], sides: Sequence[str], doing: str, times: Sequence[int] = (1,)
) -> Optional[Injection]:
    """An injection at one of the calls that the job makes; of classes each is as likely as the others."""
    calls = _calls(counts, kinds, sides)
    if not calls:
        return None
    call = rng.choice(calls)
    return Injection((call,), doing, rng.randint(1, counts[call]), rng.choice(times), nfs=rng.random() < 0.25)


def _fails(
    code: int,
    kinds: Sequence[str],
    sides: Sequence[str],
    may: frozenset[str] = _MAY_FAIL,
    times: Sequence[int] = (1, 0),
) -> Strike:
    def strike(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
        injection = _somewhere(rng, counts, kinds, sides, f"errno:{code}", times)
        if injection is None:
            return None
        return Struck(injection, may=may, gone=injection.times == 0)

    return strike


def _short(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    calls = _calls(counts, ("read", "write", "copy"))
    return Struck(Injection(tuple(calls), "short", 1, 0, nfs=rng.random() < 0.5)) if calls else None


def _slow(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    calls = _calls(counts, ("open", "read", "write", "sync"))
    milliseconds = max(1, 700 // max(1, sum(counts[call] for call in calls)))
    return Struck(Injection(tuple(calls), f"delay:{milliseconds}", 1, 0)) if calls else None


def _stalled(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    injection = _somewhere(rng, counts, _ALL, _BOTH, "delay:1200")
    return None if injection is None else Struck(injection)


def _clock(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    by = rng.choice((-30 * 86400, -3600, -1, 1, 3600, 30 * 86400))
    return Struck(Injection(clock=(rng.randint(1, max(1, counts.get("clock", 1))), by)))


def _done(action: Action, may: frozenset[str], sides: Sequence[str] = _BOTH, **more: bool) -> Strike:
    """An action while a call is held."""

    def strike(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
        if not job.source:  # ranks that move what they hold: no call of theirs marks the way
            seconds = rng.uniform(0.1, 0.9) * counts["milliseconds"] / 1000
            return Struck(action=action, after=seconds, may=may, **more)
        held = _somewhere(rng, counts, _ALL, sides, "hold")
        return None if held is None else Struck(held, action, may=may, **more)

    return strike


def _signal(number: int) -> Action:
    def action(scene: Scene) -> None:
        for pid in scene.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return action


def _pause(scene: Scene) -> None:
    _signal(signal.SIGSTOP)(scene)
    time.sleep(0.4)
    _signal(signal.SIGCONT)(scene)


def _stopped(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    """One rank of several is stopped for good."""
    struck = _done(_signal(signal.SIGSTOP), _MAY_DIE)(rng, job, counts)
    return None if struck is None else struck._replace(silent=True)


def _file_of(scene: Scene) -> Path:
    files = (path for path in scene.place.source.rglob("*") if path.is_file())
    return scene.rng.choice(sorted(path for path in files if path.suffix in (".safetensors", ".ckpt")))


def _replaced(scene: Scene) -> None:
    """A file is replaced by another at once, or overwritten in place."""
    path = _file_of(scene)
    other = next(iter(scene.other.source.glob(str(path.relative_to(scene.place.source)))), path).read_bytes()
    if scene.rng.random() < 0.5:
        path.with_name("new").write_bytes(other)
        os.replace(path.with_name("new"), path)
    else:
        with open(path, "r+b") as file:
            file.write(other)


def _truncated(scene: Scene) -> None:
    path = _file_of(scene)
    os.truncate(path, int(path.stat().st_size * scene.rng.random()))


def _removed(scene: Scene) -> None:
    _file_of(scene).unlink()


def _vanished(scene: Scene) -> None:
    """The target is removed, or renamed, or its file system goes."""
    target, way = scene.place.target, scene.rng.randrange(3)
    if way == 0:
        shutil.rmtree(target, ignore_errors=True)
    elif way == 1 and target.exists():
        target.rename(target.with_name("away"))
    elif subprocess.run(["umount", "-l", target.parent], capture_output=True, check=False).returncode:
        shutil.rmtree(target.parent, ignore_errors=True)


def _vanishing(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    struck = _done(_vanished, _MAY_FAIL, ("target",), gone=True)(rng, job, counts)
    return None if struck is None else struck._replace(room=64 << 20)


def _filled(scene: Scene) -> None:
    with contextlib.suppress(OSError), open(scene.place.target.parent / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def _full(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    """A file system that is too small, or that others fill meanwhile."""
    if rng.random() < 0.3:
        return Struck(room=rng.choice((1, 8, 64)) << 14, may=_MAY_FAIL, gone=True)
    held = _somewhere(rng, counts, _ALL, ("target",), "hold")
    return None if held is None else Struck(held, _filled, room=16 << 20, may=_MAY_FAIL, gone=True)


def _few_files(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    """More descriptors than a limit lets the process have; or at one call, as if the machine had no more."""
    if rng.random() < 0.5 and job.processes == 1:
        return Struck(limit=(resource.RLIMIT_NOFILE, rng.randint(7, 24)), may=_MAY_FAIL)
    return _fails(rng.choice((errno.EMFILE, errno.ENFILE)), ("open", "list"), _BOTH)(rng, job, counts)


def _little_memory(scene: Scene) -> None:
    """From some call on a process may take only a little more than it has."""
    spare = scene.rng.choice((0, 1 << 16, 1 << 20, 4 << 20))
    for pid in scene.pids:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/statm", encoding="ascii") as file:
            has = int(file.read().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (has + spare, has + spare))


def _memory(rng: Random, job: Job, counts: Counts) -> Optional[Struck]:
    struck = _done(_little_memory, _MAY_FAIL)(rng, job, counts)
    return None if struck is None else struck._replace(told=False)


def _rivalled(other: bool) -> Strike:
    def action(scene: Scene) -> None:
        scene.rival(other)

    return _done(action, _MAY_FAIL, ("target",))


class Fault(NamedTuple):
    """One kind of fault.

    Attributes:
        strike: what it does to a run.
        needs: what a job must have for it: files that it reads ("source"), a "target", "several" ranks in processes of
            their own; and what the machine must allow: "mounts".
    """

    strike: Strike
    needs: frozenset[str] = frozenset()

    def fits(self, job: Job, mounts: bool) -> bool:
        """Whether it applies to a job, and the machine allows it."""
        has = {"source": bool(job.source), "target": job.writes, "several": job.processes > 1, "mounts": mounts}
        return all(has[need] for need in self.needs)


_SOURCE, _TARGET = frozenset({"source"}), frozenset({"target"})
FAULTS: Mapping[str, Fault] = {
    "short reads and writes": Fault(_short, _SOURCE),
    "EINTR": Fault(_fails(errno.EINTR, _RETRIED, _BOTH, frozenset({RIGHT}), (1, 2, 5)), _SOURCE),
    "EIO of the source": Fault(_fails(errno.EIO, ("open", "stat", "list", "read"), ("source",)), _SOURCE),
    "EIO of the target": Fault(_fails(errno.EIO, _ALL, ("target",)), _TARGET),
    "ENOSPC": Fault(_fails(errno.ENOSPC, _TAKING, ("target",)), _TARGET),
    "a full file system": Fault(_full, _TARGET | {"mounts"}),
    "EMFILE": Fault(_few_files, _SOURCE),
    "slow storage": Fault(_slow, _SOURCE),
    "stalled storage": Fault(_stalled, _SOURCE),
    "a file is replaced": Fault(_done(_replaced, _MAY_FAIL, ("source",), spoils=True), _SOURCE),
    "a file is truncated": Fault(_done(_truncated, _MAY_FAIL, ("source",), spoils=True), _SOURCE),
    "a file is removed": Fault(_done(_removed, _MAY_FAIL, ("source",), spoils=True), _SOURCE),
    "the clock jumps": Fault(_clock),
    "SIGKILL": Fault(_done(_signal(signal.SIGKILL), _MAY_DIE)),
    "SIGTERM": Fault(_done(_signal(signal.SIGTERM), _MAY_DIE)),
    "SIGINT": Fault(_done(_signal(signal.SIGINT), _MAY_DIE)),
    "SIGSTOP, SIGCONT": Fault(_done(_pause, frozenset({RIGHT}))),
    "SIGSTOP for good": Fault(_stopped, frozenset({"several"})),
    "out of memory": Fault(_memory),
    "read-only": Fault(_fails(errno.EROFS, (*CHANGING, "open"), ("target",), times=(0,)), _TARGET),
    "the target vanishes": Fault(_vanishing, _TARGET | {"mounts"}),
    "two runs at once": Fault(_rivalled(other=False), _TARGET),
    "two jobs at once": Fault(_rivalled(other=True), _TARGET),
}
