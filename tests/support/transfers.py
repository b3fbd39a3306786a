"""Transfers between arrays by all ranks of a world of threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Union

import numpy as np

from ms_ckpt_ext.core.exchange.one_rank import turns_of
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.run_exchange import ExchangeRun
from ms_ckpt_ext.engine.load.slabs import HostMover, HostSink
from ms_ckpt_ext.engine.transfer.held import HeldSlice, members_of, share_holds
from ms_ckpt_ext.engine.transfer.holdings import Holdings
from ms_ckpt_ext.engine.transfer.prepare import PreparedTransfer, prepare_transfer
from ms_ckpt_ext.engine.transfer.sources import catalog_of_holders, slice_holders
from ms_ckpt_ext.engine.transfer.wanted import WantedBox
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.checkpoints import Stored, read_file, shard
from tests.support.counting import counted

CPU = profiles.profile(profiles.CPU).hardware
How = Union[Layout, Box, None]
Side = Mapping[int, Mapping[str, tuple[Stored, How]]]
"""Rank of the job -> name -> the slice it holds (or is to hold), and how it lies."""
POISON = 0xAA


class Moved(NamedTuple):
    """What one rank ended with."""

    contents: dict[str, bytes]
    prepared: PreparedTransfer
    given: Mapping[int, int]


def golden_side(golden: Path, case: str, strategy: Strategy, first: int = 0) -> Side:
    """The shards of a golden case, on the ranks from `first` on."""
    found = {}
    for rank in range(strategy.world):
        held = read_file(shard(golden / case / "shards" / f"rank_{rank}"))
        found[first + rank] = {name: (stored, strategy.layout(name, rank)) for name, stored in held.items()}
    return found


def transfer(
    source: Side,
    target: Side,
    world: int,
    rules: Sequence[Rule] = (),
    runs: int = 1,
    host: Callable[[int], str] = lambda rank: "one",
    between: Optional[Callable[[int, dict[str, np.ndarray]], None]] = None,
    **options: Any,
) -> list[Moved]:
    """Move the contents of one side into arrays of the other, on every rank.

    Args:
        between: called before every run with its number and this rank's arrays of the source.
    """

    def rank(transport: LocalTransport) -> Moved:
        return one_rank(
            transport, source, target, rules, runs, host, between, LoadOptions(bucket_bytes=1 << 20, **options)
        )

    return LocalWorld(world, timeout=20.0).run(rank)


def one_rank(
    transport: LocalTransport,
    source: Side,
    target: Side,
    rules: Sequence[Rule],
    runs: int,
    host: Callable[[int], str],
    between: Optional[Callable[[int, dict[str, np.ndarray]], None]],
    options: LoadOptions,
) -> Moved:
    """What one rank of it does; of any transport."""
    rank, counts = transport.rank, counted(transport)
    mine, theirs = source.get(rank, {}), target.get(rank, {})
    ranks = members_of(transport, rank in source, None, "source")
    takers = members_of(transport, rank in target, None, "target")
    holds = {name: _held(stored, how) for name, (stored, how) in mine.items()}
    catalog = catalog_of_holders(slice_holders(share_holds(transport, holds), ranks), ranks, {})
    tensors = apply_rules({**catalog.tensors, **catalog.extras}, rules)
    wants = {name: WantedBox(name, _where(stored, how)) for name, (stored, how) in theirs.items()}
    places = {rank: place for place, rank in enumerate(takers)}
    told = host(rank)
    ready = prepare_transfer(transport, tensors, wants, places, options, CPU, told, {})
    arrays = {name: np.frombuffer(stored.data, np.uint8).copy() for name, (stored, _) in mine.items()}
    memory = {name: np.full(len(stored.data), POISON, np.uint8) for name, (stored, _) in theirs.items()}
    sinks = {
        number: HostSink(memory[name], theirs[name][0].shape, ready.demands[number].tensor.meta.dtype)
        for name, number in ready.numbers(rank).items()
    }
    turns = turns_of(ready.plan, rank)
    holdings = Holdings(ready.plan, turns, ready.addresses, ready.local, arrays.__getitem__)
    run = ExchangeRun(ready.plan, turns, transport, HostMover(), holdings, 0, Trace())
    for number in range(runs):
        if between is not None:
            between(number, arrays)
        run.go(sinks)
    return Moved({name: array.tobytes() for name, array in memory.items()}, ready, dict(counts.given))


def _held(stored: Stored, how: How) -> HeldSlice:
    if isinstance(how, Box):
        return HeldSlice(stored.dtype, stored.shape, box=how)
    return HeldSlice(stored.dtype, stored.shape, layout=how)


def _where(stored: Stored, how: How) -> Any:
    if isinstance(how, Box):
        return how.region
    return (how or Layout((1,), ((),) * len(stored.shape))).over(len(stored.shape))


def received(moved: Sequence[Moved]) -> list[int]:
    """Payload that every rank got from others."""
    return [held.prepared.plan.bytes_received()[rank] for rank, held in enumerate(moved)]


def lower_bound(source: Side, target: Side, full: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that have to travel: of every target slice what its rank does not hold itself."""
    total = 0
    for rank, wanted in target.items():
        places = _places(target), _places(source)
        for name, (stored, how) in wanted.items():
            box = _mask(full[name], how, stored, places[0][rank])
            if name in source.get(rank, {}):
                own, own_how = source[rank][name]
                box &= ~_mask(full[name], own_how, own, places[1][rank])
            total += int(box.sum()) * (len(stored.data) // max(prod(stored.shape), 1))
    return total


def _places(side: Side) -> dict[int, int]:
    return {rank: place for place, rank in enumerate(sorted(side))}


def _mask(full: tuple[int, ...], how: How, stored: Stored, place: int) -> np.ndarray:
    mask = np.zeros(full, bool)
    if isinstance(how, Box):
        region = how.region
    else:
        layout = _where(stored, how)
        region = layout.region(place % layout.devices, full)
    assert region is not None
    mask[region.slices] = True
    return mask
