"""What is run: command lines, and loads by ranks. A row of `JOBS` for each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, "-m", "ms_ckpt_ext")
RANKS = (sys.executable, "-m", "tests.chaos.ranks")
SIZE = 4
"""Ranks of a load."""


class Place(NamedTuple):
    """Where one run works.

    Attributes:
        root: all of it.
        source: the checkpoint; a copy.
        beside: strategies, keys and configurations that go with it.
        target: where the result is to appear.
    """

    root: Path
    source: Path
    beside: Path
    target: Path


class Job(NamedTuple):
    """One kind of job.

    Attributes:
        name: what it is called.
        source: the kind of checkpoint that it reads, a folder of `inputs`; "" for one that reads no files.
        words: its command line.
        writes: it writes a target.
        sealed: what it writes is encrypted, differently every time.
        indexed: its target holds files that say which others belong to it.
        processes: how many there are; of several each is a rank.
    """

    name: str
    source: str
    words: Callable[[Place], Sequence[object]]
    writes: bool = True
    sealed: bool = False
    indexed: bool = False
    processes: int = 1

    @property
    def ranks(self) -> bool:
        """Its processes report by rank, in JSON; else it is a command line."""
        return not self.writes and self.name != "verify"

    def command(self, place: Place, rank: int = 0) -> list[str]:
        """What to start."""
        words = [*self.words(place)]
        if not self.ranks:
            return [*CLI, *map(str, words)]
        alone = self.processes == 1
        return [*RANKS, *map(str, words), *([] if alone else [str(rank), str(place.root / "meeting")])]


def _command(verb: str, *more: Callable[[Place], Sequence[object]]) -> Callable[[Place], Sequence[object]]:
    return lambda place: [verb, place.source, *(word for words in more for word in words(place))]


def _target(place: Place) -> Sequence[object]:
    return [place.target, "--workers", "2"]


def _by(option: str, name: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: [option, place.beside / name]


def _load(kind: str, mode: str) -> Callable[[Place], Sequence[object]]:
    return lambda place: [kind, mode, place.source, place.beside]


_STRATEGY = _by("--strategy", "strategy.ckpt")
JOBS = {
    job.name: job
    for job in (
        Job("merge", "shards", _command("merge", _target, _STRATEGY), indexed=True),
        Job("reshard", "shards", _command("reshard", _target, _STRATEGY, _by("--to-strategy", "target.ckpt"))),
        Job("to-ckpt", "shards", _command("convert", _target, lambda _: ["--to", "ckpt", "--crc"])),
        Job("to-safetensors", "ckpt", _command("convert", _target, lambda _: ["--to", "safetensors"])),
        Job("encrypt", "shards", _command("encrypt", _target, _by("--enc-key-file", "key")), sealed=True),
        Job("decrypt", "sealed", _command("decrypt", _target, _by("--dec-key-file", "key"))),
        Job(
            "export",
            "trained",
            _command("export", _target, _by("--strategy", "trained.ckpt"), _by("--config", "hub")),
            indexed=True,
        ),
        Job("verify", "merged", _command("verify", lambda _: ["--manifest", "--workers", "2"]), writes=False),
        Job("load-direct", "shards", _load("load", "direct"), writes=False),
        Job("load-cooperative", "shards", _load("load", "cooperative"), writes=False),
        Job("load-processes", "shards", _load("load", "cooperative"), writes=False, processes=SIZE),
        Job("resume", "saves", _load("resume", "cooperative"), writes=False),
        Job("resume-processes", "saves", _load("resume", "cooperative"), writes=False, processes=SIZE),
        Job("transfer", "", _load("transfer", "-"), writes=False),
        Job("transfer-processes", "", _load("transfer", "-"), writes=False, processes=SIZE),
    )
}
