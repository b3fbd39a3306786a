"""Loads, resumes and transfers by ranks: `ranks.py KIND MODE SOURCE BESIDE [RANK MEETING]`.

Without a rank all of them are threads of this process. Standard output is one JSON document: rank -> a digest of what
it holds, or its error; and what was left of threads and descriptors.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import xxhash

from ms_ckpt_ext import errors
from ms_ckpt_ext.engine.load import session
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.session import Want
from ms_ckpt_ext.engine.resume.newest import ResumeRequest, choose_checkpoint
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalWorld
from tests.chaos.jobs import SIZE
from tests.support.loads import Load
from tests.support.transfers import golden_side, one_rank

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
TIMEOUT = 8.0
Rank = Callable[[Any], str]
"""What a rank does with its transport: gives a digest of what it holds in the end."""


class Resumed(Load):
    """The newest checkpoint, chosen by all ranks, and loaded."""

    def prepare(self, transport: Any) -> tuple[Catalog, dict[str, Want], session.Prepared]:
        """See `Load`."""
        wanted = ResumeRequest(str(self.source), self.host(transport.rank), digests=True)
        chosen, skipped = choose_checkpoint(transport, wanted)
        if chosen is None:
            raise CheckpointError(f"no checkpoint is whole: {skipped}")
        wants = self.wants(transport.rank, chosen.catalog)
        ready = session.prepare(transport, chosen.seen, chosen.catalog, wants, self.options, self.hardware, {})
        return chosen.catalog, wants, ready


def job(kind: str, mode: str, source: Path, beside: Path) -> Rank:
    """What every rank does."""
    if kind == "transfer":
        return _transfer
    made = Resumed if kind == "resume" else Load
    target = load_strategy(beside / "target.ckpt")
    load = made(source, load_strategy(beside / "strategy.ckpt"), target, mode=mode, bucket_bytes=64 << 10)
    return lambda transport: _digest(load.rank(transport).contents)


def _transfer(transport: Any) -> str:
    """From the layout of one golden case to that of another, three times."""
    sides = [golden_side(GOLDEN, case, load_strategy(GOLDEN / case / "strategy.ckpt")) for case in ("dp2_tp2", "tp4")]
    options = LoadOptions(bucket_bytes=16 << 10)
    return _digest(one_rank(transport, *sides, (), 3, lambda rank: "one", None, options).contents)


def _digest(contents: dict[str, bytes]) -> str:
    digest = xxhash.xxh3_128()
    for name, held in sorted(contents.items()):
        digest.update(f"{name} {len(held)} ".encode() + held)
    return digest.hexdigest()


def main(kind: str, mode: str, source: str, beside: str, rank: str = "", meeting: str = "") -> None:
    """See the module."""
    before = len(os.listdir("/proc/self/fd"))
    work = None
    if rank:
        from tests.chaos.sockets import Sockets

        with _told(int(rank)) as told:
            work = job(kind, mode, Path(source), Path(beside))
            with contextlib.closing(Sockets(Path(meeting), int(rank), SIZE)) as transport:
                told.update(digest=work(transport))
            del transport
        ranks = {rank: told}
    else:
        ranks = _threads(kind, mode, Path(source), Path(beside))
    del work
    print(json.dumps({"ranks": ranks, **_left(before)}), flush=True)


def _threads(kind: str, mode: str, source: Path, beside: Path) -> dict[str, Any]:
    world, told = LocalWorld(SIZE, TIMEOUT), {}
    with _told(0) as problem:
        work = job(kind, mode, source, beside)
        told = dict(enumerate(world.run(work)))
    found = {rank: {"digest": digest} for rank, digest in told.items()}
    errors = {rank: _named(error) for rank, error in world.errors.items()}
    return {str(rank): found.get(rank) or errors.get(rank) or problem for rank in range(SIZE)}


@contextlib.contextmanager
def _told(rank: int) -> Iterator[dict[str, Any]]:
    told: dict[str, Any] = {}
    try:
        yield told
    except Exception as error:
        told.update(_named(error))


def _named(error: BaseException) -> dict[str, Any]:
    ours = any("/ms_ckpt_ext/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    error = errors.named(error, "load")  # a load into a network makes its steps by `on_all`, which does so
    named = isinstance(error, CheckpointError) or (isinstance(error, MemoryError) and not ours)  # a network's memory
    trace: Optional[str] = (
        None if named else "".join(traceback.format_exception(type(error), error, error.__traceback__))
    )
    return {"error": type(error).__name__, "named": named, "message": str(error), "traceback": trace}


def _left(before: int) -> dict[str, Any]:
    """Threads that were left, but for those that wait for a next call; and descriptors."""
    deadline = time.monotonic() + 2
    while True:
        threads = [t.name for t in threading.enumerate() if t is not threading.main_thread() and t.is_alive()]
        threads = [name for name in threads if name != "ms_ckpt_ext caller"]
        if not threads or time.monotonic() > deadline:
            return {"threads": threads, "descriptors": len(os.listdir("/proc/self/fd")) - before}
        time.sleep(0.02)


if __name__ == "__main__":
    main(*sys.argv[1:])
