"""One run after another, by a seed: a job, a fault, the outcome, and the same job again without the fault."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple, Optional, TextIO

from tests.chaos.faults import FAULTS, Counts, Struck
from tests.chaos.injector import Injection, build, read_counts
from tests.chaos.inputs import GOLDEN, make_inputs
from tests.chaos.jobs import JOBS, Job, Place
from tests.chaos.judging import Result, changed, everything, judge, judge_again, result_of
from tests.chaos.nursery import Nursery
from tests.chaos.running import Stage
from tests.harness.ending import taking_all_along

_NEWNS = 0x00020000
_MEMORY = Path("/dev/shm")
_ANEW = 0.15
"""How many of the processes are new Pythons, with their imports."""
_START = 0.2
"""Seconds until such a one is at its first line; before that it has words of its own for a signal."""


class Ran(NamedTuple):
    """One run: what it was, and what came of it."""

    number: int
    job: str
    fault: str
    outcome: str
    wrong: tuple[str, ...]
    seconds: float
    told: str


class Campaign:
    """What all runs share: the checkpoints, the injector, and what every job makes without a fault.

    Args:
        root: a folder of its own.
        library: the injector.
        nursery: where processes come from.
        shared: the folder of shared memory, in which only `root` may be.
    """

    def __init__(self, root: Path, library: Path, nursery: Nursery, shared: Optional[Path] = None) -> None:
        self.root, self.library, self.nursery, self._shared = root, library, nursery, shared
        make_inputs(root / "inputs")
        self._right: dict[tuple[str, str], Result] = {}
        self._counts: dict[str, list[Counts]] = {}

    def place(self, name: str, job: Job, which: str = "A") -> Place:
        """A folder for one run, with a copy of its source."""
        root, inputs = self.root / name, self.root / "inputs" / which
        (root / "tmp").mkdir(parents=True)
        (root / "disk").mkdir()
        source = GOLDEN
        if job.source:
            source = root / "source"
            shutil.copytree(inputs / job.source, source)
        return Place(root, source, inputs / "with", root / "disk" / "out")

    def right(self, job: Job, which: str = "A") -> Result:
        """What a job makes of a checkpoint; of A its calls are counted as well."""
        key = job.name, which
        if key not in self._right:
            place = self.place(f"right-{job.name}-{which}", job, which)
            stage = Stage(self.nursery, job, place, place, Struck(Injection()), self.library, Random(0))
            counts = place.root / "counts"
            began = time.monotonic()
            ended, _ = stage.run(counts if which == "A" else None)
            took = round(1000 * (time.monotonic() - began))
            self._right[key] = result_of(job, place, ended)
            if which == "A":
                made = [read_counts(counts.with_name(f"counts{rank}")) for rank in range(job.processes)]
                if not job.source:  # what its ranks hold is brought by the campaign, not by the package
                    made = [{"clock": each["clock"], "milliseconds": took} for each in made]
                self._counts[job.name] = made
        return self._right[key]

    def older(self, job: Job) -> Path:
        """A target that holds what the job makes of B."""
        self.right(job, "B")
        return self.root / f"right-{job.name}-B" / "disk" / "out"

    def strike(self, rng: Random, job: Job, fault: str) -> tuple[Optional[Struck], int]:
        """What happens to the job, and at which rank; None where the fault does not apply to it."""
        self.right(job)
        victim = rng.randrange(job.processes) if job.processes > 1 and rng.random() < 0.8 else -1
        counts = self._counts[job.name][max(victim, 0)]
        if fault == "SIGSTOP for good" and victim < 0:
            victim = rng.randrange(job.processes)
        struck = FAULTS[fault].strike(rng, job, counts)
        return struck, victim

    def run(self, seed: int, number: int, job: Job, fault: str) -> Optional[Ran]:
        """One run, and the same job again; None where the fault does not apply."""
        rng = Random(f"{seed} {job.name} {fault} {number}")
        struck, victim = self.strike(rng, job, fault)
        if struck is None:
            return None
        if rng.random() < _ANEW and struck.told:  # without memory not even Python starts
            struck = struck._replace(new_python=True, after=struck.after and struck.after + _START)
        began = time.monotonic()
        place, other = (self.place(f"run-{number}{end}", job, which) for end, which in (("", "A"), ("-other", "B")))
        over = job.writes and struck.room is None and not struck.spoils and rng.random() < 0.4
        with _mounted(place.target.parent, struck.room):
            if over:
                shutil.copytree(self.older(job), place.target)
            before = (
                {name: (place.source / name).read_bytes() for name in everything(place.source)} if job.source else {}
            )
            outcome, wrong = self._struck(rng, job, place, other, struck, victim, over)
        if self._shared is not None:
            wrong += tuple(
                f"left in shared memory: {path.name}" for path in self._shared.iterdir() if path != self.root
            )
        wrong += () if struck.spoils or not job.source else tuple(changed(before, place.source))
        if struck.spoils:
            shutil.rmtree(place.source)
            shutil.copytree(self.root / "inputs" / "A" / job.source, place.source)
        if struck.room is None:
            place.target.parent.mkdir(exist_ok=True)
        if job.writes:
            ended, _ = Stage(self.nursery, job, place, other, Struck(), None, rng).run()
            wrong += tuple(judge_again(job, place, ended, self.right(job)))
        told = f"{_worded(struck)}{', of rank ' + str(victim) if victim >= 0 else ''}{', over an older result' * over}"
        if not wrong:
            shutil.rmtree(place.root)
        shutil.rmtree(other.root)
        return Ran(number, job.name, fault, outcome, wrong, time.monotonic() - began, told)

    def _struck(
        self, rng: Random, job: Job, place: Place, other: Place, struck: Struck, victim: int, over: bool
    ) -> tuple[str, tuple[str, ...]]:
        stage = Stage(self.nursery, job, place, other, struck, self.library, rng, victim)
        ended, rivals = stage.run()
        right, older = [self.right(job)], []
        if struck.spoils:
            right += self._of_what_is_there(job, place)
        if job.name.startswith("resume"):
            right += self._without_newest(job)
        if job.writes and (over or rivals):
            older.append(self.right(job, "B"))
        if rivals:
            right += older
        outcome, wrong = judge(job, place, struck, ended, rivals, right, older, victim)
        return outcome, wrong

    def _of_what_is_there(self, job: Job, place: Place) -> list[Result]:
        """What the job makes of its source as it is now, if anything."""
        root = place.root / "now"
        (root / "tmp").mkdir(parents=True)
        now = Place(root, place.source, place.beside, root / "disk" / "out")
        (root / "disk").mkdir()
        ended, _ = Stage(self.nursery, job, now, now, Struck(), None, Random(0)).run()
        try:
            return [result_of(job, now, ended)]
        except (AssertionError, KeyError):
            return []

    def _without_newest(self, job: Job) -> list[Result]:
        """What a resume makes where the newest checkpoint cannot be read."""
        key = job.name, "older"
        if key not in self._right:
            place = self.place(f"right-{job.name}-older", job)
            for path in place.source.rglob("*_100*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            ended, _ = Stage(self.nursery, job, place, place, Struck(), None, Random(0)).run()
            self._right[key] = result_of(job, place, ended)
        return [self._right[key]]


def _worded(struck: Struck) -> str:
    injection = struck.injection
    parts = []
    if injection.doing:
        parts.append(f"{injection.doing} at call {injection.at} of {','.join(injection.on)}, times {injection.times}")
    if injection.nfs:
        parts.append("as NFS")
    if injection.clock:
        parts.append(f"clock {injection.clock}")
    if struck.after:
        parts.append(f"after {struck.after:.3f} s")
    if struck.limit:
        parts.append(f"limit {struck.limit}")
    if struck.new_python:
        parts.append("a new Python")
    if struck.room:
        parts.append(f"{struck.room} bytes of room")
    return ", ".join(parts)


@contextlib.contextmanager
def _mounted(folder: Path, room: Optional[int]) -> Iterator[None]:
    """A file system of its own for a target, with so much room."""
    if room is None:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        while subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False).returncode == 0:
            pass
        folder.mkdir(exist_ok=True)


def can_mount(memory: bool) -> bool:
    """Give this process mounts of its own, which end with it, `memory` among them; False where that is not allowed."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(_NEWNS) != 0:
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    fresh = ["mount", "-t", "tmpfs", "-o", "size=2g", "chaos", str(_MEMORY)]
    if private.returncode or not memory:
        return private.returncode == 0
    return subprocess.run(fresh, capture_output=True, check=False).returncode == 0


def chosen(seed: int, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of a job and a fault, without end: each once before any comes twice, and all jobs and faults early."""
    rng = Random(seed)
    while pairs:
        left = rng.sample(pairs, len(pairs))
        seen: Counter[str] = Counter()
        while left:
            job, fault = min(left, key=lambda pair: (seen[pair[0]] + seen[pair[1]], seen[pair[1]]))
            left.remove((job, fault))
            seen.update((job, fault))
            yield job, fault


def table(ran: Sequence[Ran], key: str) -> list[str]:
    """Rows by fault or by job, as Markdown: runs, right results, named errors, killed as meant, wrong."""
    rows: dict[str, Counter[str]] = {}
    for each in sorted(ran, key=lambda each: (*FAULTS, *JOBS).index(getattr(each, key))):
        rows.setdefault(getattr(each, key), Counter()).update(["runs", "WRONG" if each.wrong else each.outcome])
    rows["all"] = sum(rows.values(), Counter())
    columns = ("runs", "right", "error", "killed", "WRONG")
    head = [f"| {key} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    return head + [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """See `scripts/chaos --help`."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print("jobs:\n  " + "\n  ".join(JOBS) + "\nfaults:\n  " + "\n  ".join(FAULTS))
        return 0
    if shutil.which(os.environ.get("CC", "cc")) is None or not sys.platform.startswith("linux"):
        print("skipped: the injector needs Linux and a C compiler (cc)")
        return 77
    with open(arguments.json or os.devnull, "w", encoding="utf-8") as told, taking_all_along():  # before mounts hide it
        return _campaign(arguments, told)


def _campaign(arguments: argparse.Namespace, told: TextIO) -> int:
    mounts = can_mount(not arguments.dir)
    root = Path(tempfile.mkdtemp(prefix="chaos-", dir=arguments.dir or (_MEMORY if mounts else None)))
    shared = _MEMORY if mounts and not arguments.dir else None
    try:
        library = build(root)
        assert library is not None, "there is a compiler"
        with Nursery(library) as nursery:
            ran = _all(Campaign(root, library, nursery, shared), arguments, mounts)
    finally:
        if not arguments.keep:
            shutil.rmtree(root, ignore_errors=True)
    for key in ("fault", "job"):
        print("\n".join(["", *table(ran, key)]))
    if not mounts:
        print("\nleft out: faults that need a file system of their own, for this process may not mount any")
    wrong = [each for each in ran if each.wrong]
    json.dump([each._asdict() for each in ran], told, indent=1)
    return 1 if wrong else 0


def _all(campaign: Campaign, arguments: argparse.Namespace, mounts: bool) -> list[Ran]:
    faults = {name: FAULTS[name] for name in arguments.fault or FAULTS}
    jobs = [JOBS[name] for name in arguments.job or JOBS]
    pairs = [(job.name, name) for job in jobs for name, fault in faults.items() if fault.fits(job, mounts)]
    deadline = time.monotonic() + arguments.minutes * 60
    ran: list[Ran] = []
    for number, (job, fault) in enumerate(chosen(arguments.seed, pairs)):
        if len(ran) >= arguments.runs or time.monotonic() > deadline:
            break
        if arguments.only is None or number == arguments.only:
            each = campaign.run(arguments.seed, number, JOBS[job], fault)
            if each is not None:
                ran.append(each)
                if arguments.verbose or each.wrong:
                    _show(each, arguments.seed, campaign.root)
        if number == arguments.only:
            break
    return ran


def _show(each: Ran, seed: int, root: Path) -> None:
    word = "WRONG" if each.wrong else each.outcome
    print(f"{each.number:5} {each.job}: {each.fault} ({each.told}): {word}, {each.seconds:.1f} s", flush=True)
    for problem in each.wrong:
        print("      " + problem.replace("\n", "\n      "), flush=True)
    if each.wrong:
        place = root / f"run-{each.number}"
        print(
            f"      again: scripts/chaos --seed {seed} --only {each.number}; {place} holds {everything(place / 'disk')}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="decides on all that is chosen (default 1)")
    parser.add_argument("--runs", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no run after so many")
    parser.add_argument("--job", nargs="+", choices=JOBS, metavar="JOB", help="of these only")
    parser.add_argument("--fault", nargs="+", choices=FAULTS, metavar="FAULT", help="of these only")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="the run of this number only")
    parser.add_argument("--list", action="store_true", help="tell the jobs and faults there are")
    parser.add_argument("--dir", help="where it all happens (default: memory, or the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--json", help="write every run there as well")
    parser.add_argument("--verbose", action="store_true", help="tell every run")
    return parser
