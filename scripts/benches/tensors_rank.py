"""One rank of a job that loads a folder of many tensors, from the files' headers to a plan that all ranks agree on.

    tensors_rank.py prepare FOLDER TOLD       write what the ranks tell of the files and of the headers that they read
    tensors_rank.py FOLDER STRATEGY TOLD      the lowest rank's part: no byte of a tensor is read

The ranks are of one host and want the same layouts, so that beside headers they tell what the lowest tells.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ms_ckpt_ext.engine.load import profiles, session
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.session import Want
from ms_ckpt_ext.engine.load.survey import Survey, survey
from ms_ckpt_ext.engine.load.taking import Taking
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.formats.registry import PLAIN, read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage.threads import few_collections
from ms_ckpt_ext.transport.base import HOST_TRAITS

WORLD = 64
_LISTINGS, _TABLES = 1, 3
"""Which of its shares are a survey's listings and tables of contents."""
_LITTLE = 1000
"""Bytes up to which all ranks share the same; of what is more the lowest tells for all."""


class Played:
    """The transport of a rank whose fellows are played: `told` is what all share in some steps, by number."""

    size, traits = WORLD, HOST_TRAITS

    def __init__(self, rank: int, told: Mapping[int, list[bytes]]) -> None:
        self.rank, self._told, self.steps = rank, told, 0

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload."""
        alike = [payload if len(payload) <= _LITTLE else b""] * WORLD
        found = self._told.get(self.steps, alike)
        self.steps += 1
        return [*found[: self.rank], payload, *found[self.rank + 1 :]]

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """The same in two steps."""
        return partial(self.share, payload)

    def free_bytes(self) -> int:
        """Not known."""
        return 0

    def prove(self) -> None:
        """Nothing is sent."""


class Heard(Played):
    """A rank that is heard until it shares what is asked for."""

    def __init__(self, rank: int, told: Mapping[int, list[bytes]], asked: int) -> None:
        super().__init__(rank, told)
        self._asked = asked

    def share(self, payload: bytes) -> list[bytes]:
        """Every rank's payload. Raises StopIteration instead, with this rank's, in the step that is asked for."""
        if self.steps == self._asked:
            raise StopIteration(payload)
        return super().share(payload)


def look_at(transport: Played, folder: str) -> Survey:
    """The survey of a rank."""
    return survey(transport, partial(list_checkpoint, folder, None), read_index, "host")


def prepare(folder: str, path: str) -> None:
    """Write what every rank shares of its listing and of its headers."""
    told: dict[int, list[bytes]] = {}
    for step in (_LISTINGS, _TABLES):
        told[step] = []
        for rank in range(WORLD):
            try:
                look_at(Heard(rank, {n: every for n, every in told.items() if n < step}, step), folder)
            except StopIteration as payload:
                told[step].append(payload.value)
    Path(path).write_bytes(pickle.dumps(told))


def load(folder: str, strategy: str, path: str) -> None:
    """All that comes before the first byte of a tensor; prints processor seconds by step."""
    transport = Played(0, pickle.loads(Path(path).read_bytes()))
    steps: dict[str, float] = {}
    began = time.process_time()

    def done(step: str) -> None:
        steps[step] = round(time.process_time() - began - sum(steps.values()), 2)

    with few_collections():
        target = load_strategy(strategy)
        done("strategy")
        seen = look_at(transport, folder)
        done("survey")
        catalog = seen.catalog(None, PLAIN)
        done("catalog")
        takes = Taking(catalog, target, 0, WORLD).all()
        wants = {name: Want(each.tensor.meta.name, each.layout) for name, each in takes.items()}
        done("boxes")
        hardware = profiles.profile(profiles.CPU).hardware
        prepared = session.prepare(transport, seen, catalog, wants, LoadOptions("cooperative"), hardware, {})
        done("plan")
    print("STEPS", steps, len(prepared.demands), len(prepared.plan.parts), len(prepared.plan.rounds))


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(*sys.argv[2:])
    else:
        load(*sys.argv[1:])
