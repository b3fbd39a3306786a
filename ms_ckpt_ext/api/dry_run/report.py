"""What a dry run found, as values: for `--json`, for the text that people read, and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.exchange.cost import cooperates, cooperative_seconds, direct_seconds
from ms_ckpt_ext.core.exchange.ragged import Ints
from ms_ckpt_ext.core.exchange.totals import RoundTally
from ms_ckpt_ext.engine.load.estimate import DryRun, PlannedSource
from ms_ckpt_ext.engine.load.profiles import Profile
from ms_ckpt_ext.engine.load.session import traffic_of

RANK_COLUMNS = ("read", "sent", "received", "messages", "inside", "between", "reads", "staging")


class Spread(NamedTuple):
    """A figure over all ranks, and which ranks have the least and the most (the lowest of equals)."""

    total: int
    least: int
    least_rank: int
    mean: float
    most: int
    most_rank: int


class Prediction(NamedTuple):
    """Seconds on one machine; `auto` is the mode that would be chosen there."""

    profile: str
    title: str
    direct_seconds: float
    cooperative_seconds: float
    auto: str
    origins: Mapping[str, str]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class PlanReport:
    """A load that was planned, not made. Sizes are in bytes.

    Attributes:
        source, target: what was given.
        mode: what the load would be asked for; "auto" chooses by the machine.
        files: files of the source.
        ranks: of the target.
        parameters: how many are loaded.
        unique: bytes of them, each byte counted once.
        source_copies: files that hold a slice, on average over bytes: above 1 there are replicas to choose from.
        target_copies: ranks that want a byte, on average.
        direct: "wanted": bytes of every rank's own slices. "read": what direct mode reads for them: small gaps between
            the rows of a slice are read over.
        direct_counted: ranks for which "read" was counted; where not all were, it is an estimate from those.
        cooperative: "read", "sent", "received", "messages", "inside", "between", "reads" and "staging" of every rank.
            "inside" and "between" are what it hands to the collectives for its own server and for others.
        servers: how many servers the ranks lie on.
        way: "flat", or "tiered": what several ranks of a server want crosses to it once.
        calls: collectives of the rank that makes the most.
        groups: groups of ranks that gather, beside those of all ranks.
        crossing: bytes that arrive at a server from others.
        balance: bytes of the busiest reader, as a multiple of a fair share.
        bucket, chunk: the limits of a round and of a read.
        rounds: the rounds, in order.
        predictions: one for every machine. Of a transfer, "direct" is to read the wanted bytes from storage instead.
        kept: for a transfer, bytes that every rank takes from its own memory; None for a load.
    """

    source: str
    target: str
    mode: str
    files: int
    ranks: int
    parameters: int
    unique: int
    source_copies: float
    target_copies: float
    direct: Mapping[str, Spread]
    direct_counted: int
    cooperative: Mapping[str, Spread]
    servers: int
    way: str
    calls: int
    groups: int
    crossing: Spread
    balance: float
    bucket: int
    chunk: int
    rounds: tuple[RoundTally, ...]
    predictions: tuple[Prediction, ...]
    kept: Optional[Spread] = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as `json` can write it."""
        found = asdict(self)
        for mode in ("direct", "cooperative"):
            found[mode] = {name: spread._asdict() for name, spread in getattr(self, mode).items()}
        found["crossing"] = self.crossing._asdict()
        found["kept"] = None if self.kept is None else self.kept._asdict()
        found["rounds"] = [each._asdict() for each in self.rounds]
        found["predictions"] = [each._asdict() for each in self.predictions]
        return found


def report_of(
    done: DryRun,
    source: PlannedSource,
    profiles: Iterable[Profile],
    mode: str,
    origin: str,
    target: str,
    kept: Optional[Ints] = None,
) -> PlanReport:
    """Sum up a dry run. `origin` and `target` say what was planned, `mode` what is asked for; `kept`: as there."""
    tally, demands = done.tally, done.table.demands
    sizes = {d.name: d.tensor.meta.dtype.nbytes(math.prod(d.tensor.meta.shape)) for d in demands}
    unique = sum(sizes.values())
    columns = {name: getattr(tally, name) for name in RANK_COLUMNS}
    return PlanReport(
        source=origin,
        target=target,
        mode=mode,
        files=source.files,
        ranks=done.table.world,
        parameters=len(sizes),
        unique=unique,
        source_copies=_copies(done),
        target_copies=float(tally.wanted.sum()) / max(unique, 1),
        direct={"wanted": _spread(tally.wanted), "read": _spread(done.direct.nbytes)},
        direct_counted=done.direct.counted,
        cooperative={name: _spread(column) for name, column in columns.items()},
        servers=len(tally.crossing),
        way="tiered" if done.table.ways.tiered else "flat",
        calls=tally.calls,
        groups=sum(map(done.table.is_of_some, done.table.chunks.groups)),
        crossing=_spread(tally.crossing),
        balance=_balance(tally.read if kept is None else tally.sent),
        bucket=done.limits.bucket,
        chunk=done.limits.read,
        rounds=tally.rounds,
        predictions=tuple(_prediction(done, profile) for profile in profiles),
        kept=None if kept is None else _spread(kept),
    )


def _balance(column: Ints) -> float:
    return float(column.max()) / max(float(column.mean()), 1e-9)


def _spread(column: Ints) -> Spread:
    least, most = int(column.argmin()), int(column.argmax())
    return Spread(int(column.sum()), int(column[least]), least, float(column.mean()), int(column[most]), most)


def _copies(done: DryRun) -> float:
    """Files per slice, weighted by bytes."""
    held = total = 0.0
    known: dict[int, float] = {}
    for demand in done.table.demands:
        nbytes = demand.tensor.meta.dtype.nbytes(math.prod(demand.tensor.meta.shape))
        for placement in demand.tensor.placements[:1]:
            mean = known.get(id(placement.holders))
            if mean is None:
                sizes = [len(files) for files in placement.holders.values()]
                mean = known[id(placement.holders)] = sum(sizes) / max(len(sizes), 1)
            held, total = held + mean * nbytes, total + nbytes
    return held / total if total else 1.0


def _prediction(done: DryRun, profile: Profile) -> Prediction:
    tally = done.tally
    wanted = tally.wanted.tolist()
    traffic, hardware = traffic_of(tally), profile.hardware
    figures = {key: None if value == math.inf else value for key, value in hardware._asdict().items()}
    return Prediction(
        profile.name,
        profile.title,
        direct_seconds(wanted, hardware),
        cooperative_seconds(traffic, hardware),
        "cooperative" if cooperates(wanted, traffic, hardware) else "direct",
        profile.origins,
        figures,
    )


def condensed(rounds: Sequence[RoundTally], most: int) -> list[dict[str, Any]]:
    """At most `most` groups of consecutive rounds: first round, how many, and the largest of each figure."""
    step = max(1, -(-len(rounds) // most))
    found = []
    for first in range(0, len(rounds), step):
        group = rounds[first : first + step]
        largest = [max(column) for column in zip(*group)]
        found.append({"first": first, "count": len(group), **RoundTally(*largest)._asdict()})
    return found
