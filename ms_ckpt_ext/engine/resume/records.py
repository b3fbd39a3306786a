"""What a training job records beside a checkpoint when it saves it, so that a later job can tell whether it is whole.

Every rank records its own file once it is written; none waits for another. A rank that finds that all have done so
writes the one file that says the checkpoint is complete. In the folder that holds the rank folders:

    rank_0/net-1_300.safetensors
    rank_0/ms_ckpt_ext.digests.json                             digest of every tensor (`engine.integrity.manifest`)
    ms_ckpt_ext/net-1_300.safetensors/rank_0.json               this rank's record
    ms_ckpt_ext/net-1_300.safetensors/strategy/stage_0.ckpt     layouts, by the first rank of every pipeline stage
    ms_ckpt_ext/net-1_300.safetensors/complete.json             all ranks' records, once there are as many as ranks

A checkpoint is named by what its files' names have in common. A rank knows only its own file's, so the last `rank_N` of
a name loses its N: in a rank folder always, since it is the rank's or, as in `lora_rank_8`, the same on all ranks;
elsewhere only where it is this rank's. Two saves that differ only in such a number share one place; a record names its
file.
Paths are relative to the rank folders' parent, so a checkpoint can be moved or copied with its records.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import MAX_RANKS
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import FormatError, storage_error
from ms_ckpt_ext.formats.table import CKPT
from ms_ckpt_ext.storage.linux import is_below, read_small
from ms_ckpt_ext.storage.reader import from_json

RECORDS_FOLDER = "ms_ckpt_ext"
STRATEGY_FOLDER = "strategy"
COMPLETE = "complete.json"
_FORMAT = "ms_ckpt_ext.record"
_RANK_FOLDER = re.compile(r"^rank_([0-9]+)\Z")
_LAST_RANK = re.compile(r"rank_(\d+)(?!.*rank_\d)")


@dataclass(frozen=True)
class Record:
    """One rank's record.

    Attributes:
        rank, world: the rank that saved, and the number of ranks.
        file: relative to the folder that has the records' folder, with `/`.
        size: of the file, in bytes.
        saved: when, in seconds since 1970.
        sharded: layouts were recorded; else every rank holds whole parameters.
        epoch, step: of the training; step counts from its very start.
        loss_scale: of the training, where there is one.
    """

    rank: int
    world: int
    file: str
    size: int
    saved: float
    sharded: bool
    epoch: Optional[int] = None
    step: Optional[int] = None
    loss_scale: Optional[float] = None


class Home(NamedTuple):
    """Where a checkpoint file belongs: the folder of all ranks, the name their files share, and its path in there."""

    folder: str
    name: str
    file: str


def home_of(path: str, rank: int) -> Home:
    """The `Home` of a rank's checkpoint file.

    >>> home_of("/out/rank_3/qwen_rank_3-1_20.ckpt", 3)
    Home(folder='/out', name='qwen_rank_-1_20.ckpt', file='rank_3/qwen_rank_3-1_20.ckpt')
    >>> home_of("/out/net.ckpt", 0)
    Home(folder='/out', name='net.ckpt', file='net.ckpt')
    >>> home_of("/out/rank_8/lora_rank_8-1_20.ckpt", 8).name == home_of("/out/rank_3/lora_rank_8-1_20.ckpt", 3).name
    True
    """
    folder, file = os.path.split(os.path.abspath(path))
    above, own = os.path.split(folder)
    if _RANK_FOLDER.match(own):
        return Home(above, home_name(f"{own}/{file}", rank), f"{own}/{file}")
    return Home(folder, home_name(file, rank), file)


def home_name(file: str, rank: int) -> str:
    """The name under which the records of a file lie; `file` as in a `Home`.

    >>> home_name("rank_8/lora_rank_8-1_20.ckpt", 8), home_name("lora_rank_8-1_20.ckpt", 0)
    ('lora_rank_-1_20.ckpt', 'lora_rank_8-1_20.ckpt')
    """
    owner, _, name = file.rpartition("/")
    found = _LAST_RANK.search(name)
    if found is None or not (owner or rank == int(found[1])):
        return name
    return name[: found.start(1)] + name[found.end(1) :]


def write_record(home: Home, record: Record, strategy: Optional[Strategy]) -> bool:
    """Record a file; returns whether the checkpoint is complete with it.

    Args:
        home: of the file.
        record: what to write.
        strategy: the layouts of this rank's pipeline stage, from the stage's first rank; None from the others.

    Raises:
        StorageError: the record cannot be written.
    """
    from ms_ckpt_ext.formats.strategies.file import save_strategy
    from ms_ckpt_ext.storage.linux import write_atomically

    folder = Path(home.folder, RECORDS_FOLDER, home.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if strategy is not None:
            save_strategy(strategy, folder / STRATEGY_FOLDER / f"stage_{strategy.stage_of(record.rank)}{CKPT.suffix}")
        with suppress(FileNotFoundError):  # of an older checkpoint of the same name
            (folder / COMPLETE).unlink()
        write_atomically(folder / f"rank_{record.rank}.json", _to_json([record]))
        return _complete(folder, record)
    except OSError as error:
        raise storage_error("record the checkpoint in", str(folder), error) from error


def _complete(folder: Path, own: Record) -> bool:
    """Write `complete.json` if this rank was the last; two ranks that both find themselves last write the same."""
    if any(not (folder / f"rank_{rank}.json").exists() for rank in range(own.world)):
        return False
    records = _parse(folder / f"rank_{rank}.json" for rank in range(own.world))
    if any((r.world, r.step) != (own.world, own.step) for r in records):
        return False  # records of an older checkpoint of the same name are still being replaced
    from ms_ckpt_ext.storage.linux import write_atomically

    mine = folder / f".complete_{own.rank}"
    write_atomically(mine, _to_json(records))
    os.replace(mine, folder / COMPLETE)
    return True


def read_records(folder: str, name: str) -> list[Record]:
    """The records of a checkpoint, ranks ascending; empty when there are none.

    Raises:
        FormatError: a record is damaged.
        StorageError: one cannot be read.
    """
    home = Path(folder, RECORDS_FOLDER, name)
    if (home / COMPLETE).exists():
        return _parse([home / COMPLETE])
    return sorted(_parse(home.glob("rank_*.json")), key=lambda record: record.rank)


def strategy_folder(folder: str, name: str) -> str:
    """Where the layouts of a checkpoint are recorded."""
    return os.path.join(folder, RECORDS_FOLDER, name, STRATEGY_FOLDER)


def forget_deleted(folder: str, rank: int) -> None:
    """Remove records of checkpoints whose file of this rank is gone: MindSpore deletes its oldest ones."""
    for note in Path(folder, RECORDS_FOLDER).glob(f"*/rank_{rank}.json"):
        with suppress(FormatError, OSError):  # another rank may be doing the same
            if not os.path.exists(os.path.join(folder, *_parse([note])[0].file.split("/"))):
                shutil.rmtree(note.parent)


def _to_json(records: Iterable[Record]) -> bytes:
    ranks = [asdict(record) for record in records]
    return json.dumps({"format": _FORMAT, "version": 1, "ranks": ranks}, indent=1, ensure_ascii=False).encode()


def _parse(paths: Iterable[Path]) -> list[Record]:
    return [record for path in paths for record in _read(path)]


def _read(path: Path) -> list[Record]:
    try:
        content: Any = from_json(read_small(path))
        if (content["format"], content["version"]) != (_FORMAT, 1):
            raise ValueError(f"version {content['version']!r}")
        return [record_from_json(held) for held in content["ranks"]]
    except OSError as error:
        raise storage_error("read the record", str(path), error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{str(path)!r} is not a checkpoint's record ({error!r}); remove it") from error


_KINDS: Mapping[str, tuple[type, ...]] = {
    "rank": (int,),
    "world": (int,),
    "file": (str,),
    "size": (int,),
    "saved": (int, float),
    "sharded": (bool,),
    "epoch": (int, type(None)),
    "step": (int, type(None)),
    "loss_scale": (int, float, type(None)),
}


def record_from_json(held: Mapping[str, Any]) -> Record:
    """A record from its JSON. Raises TypeError, KeyError or ValueError."""
    record = Record(**held)
    wrong = [name for name, kinds in _KINDS.items() if type(vars(record)[name]) not in kinds]
    if not wrong and not 0 <= record.rank < record.world <= MAX_RANKS:
        wrong = ["rank or world"]
    if not wrong and not math.isfinite(record.saved):
        wrong = ["time"]
    if not wrong and not is_below(record.file):
        wrong = ["file"]
    if wrong:
        raise ValueError(f"bad {', '.join(wrong)}")
    return record
