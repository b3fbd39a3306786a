"""What training jobs leave, and ranks as threads that choose from it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, Callable, Optional

from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import update_manifest
from ms_ckpt_ext.engine.resume.newest import Chosen, ResumeRequest, Skipped, choose_checkpoint
from ms_ckpt_ext.engine.resume.records import Record, home_of, write_record
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.checkpoints import source

RANKS = 4


def save(root: Path, step: int, noted: bool = True, prefix: str = "net") -> None:
    """What 4 ranks leave at a step: `rank_N/net-1_STEP.safetensors`, and unless told otherwise their notes."""
    made = source(root.parent / f"made_{step}", seed=step)
    strategy = load_strategy(made / "strategy.ckpt")
    for rank in range(RANKS):
        path = root / f"rank_{rank}" / f"{prefix.format(rank=rank)}-1_{step}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made / "shards" / f"rank_{rank}" / "net.safetensors", path)
        if noted:
            note(path, rank, step, strategy if rank == 0 else None)


def note(path: Path, rank: int, step: int, strategy: Any, world: int = RANKS, sharded: bool = True) -> bool:
    home = home_of(str(path), rank)
    update_manifest(str(path.parent), {path.name: digest_file(read_index(str(path)))})
    size = path.stat().st_size
    record = Record(rank, world, home.file, size, time.time(), sharded, epoch=1, step=step, loss_scale=64.0)
    return write_record(home, record, strategy)


def look(
    root: Path, ranks: int = RANKS, host: Callable[[int], str] = lambda rank: "one", **more: Any
) -> tuple[Optional[Chosen], tuple[Skipped, ...]]:
    """All ranks choose; they must come to the same answer."""
    where = more.pop("where", lambda rank: root)

    def rank(transport: LocalTransport) -> tuple[Optional[Chosen], tuple[Skipped, ...]]:
        return choose_checkpoint(transport, ResumeRequest(str(where(transport.rank)), host(transport.rank), **more))

    answers = LocalWorld(ranks, timeout=20).run(rank)
    for chosen, skipped in answers:
        assert skipped == answers[0][1]
        assert (chosen and chosen.candidate) == (answers[0][0] and answers[0][0].candidate)
        assert (chosen and chosen.strategy) == (answers[0][0] and answers[0][0].strategy)
    return answers[0]


def step_of(chosen: Optional[Chosen]) -> Any:
    assert chosen is not None
    value = chosen.scalars["global_step"]
    assert not isinstance(value, str)
    return value.item() - 7  # see tests.support.checkpoints.scalars


def no_note(root: Path) -> None:
    """Step 20 is not noted as complete, nor by rank 3."""
    folder = root / "ms_ckpt_ext" / "net-1_20.safetensors"
    (folder / "complete.json").unlink()
    (folder / "rank_3.json").unlink()
