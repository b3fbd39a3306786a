"""A transfer by all ranks at once: match, agree, plan; then move, as often as wanted.

Collective: every rank of the job takes part, also one that holds no part of either side. An error on one rank is raised
on all; before the first round nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import numpy as np
import xxhash

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Match
from ms_ckpt_ext.bridge.memory import bytes_to_come, contents_of, kept_on_host, on_device
from ms_ckpt_ext.bridge.request import half_done
from ms_ckpt_ext.bridge.together import host_name, mover_of, sinks_of
from ms_ckpt_ext.bridge.transfer.distributed import own_boxes
from ms_ckpt_ext.bridge.transfer.matching import Matching, match_sides, tell_casts
from ms_ckpt_ext.bridge.transfer.overlap import refuse_overlaps, stays
from ms_ckpt_ext.bridge.transfer.sides import (
    SideHere,
    check_boxes,
    may_be_staged,
    named_parameters,
    side_of,
    split_boxes,
)
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.exchange.holders import LocalPiece
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.replicas import Digester, compare_replicas
from ms_ckpt_ext.engine.load.run_exchange import ExchangeRun, turns_of
from ms_ckpt_ext.engine.load.trace import Trace
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.engine.transfer.held import Holds, members_of, share_holds
from ms_ckpt_ext.engine.transfer.holdings import Holdings
from ms_ckpt_ext.engine.transfer.prepare import PreparedTransfer, prepare_transfer
from ms_ckpt_ext.engine.transfer.report import TransferReport
from ms_ckpt_ext.engine.transfer.sources import catalog_of_holders, slice_holders, untold
from ms_ckpt_ext.engine.unlisted.proven import ruled
from ms_ckpt_ext.errors import StrategyError, UsageError, name_ranks
from ms_ckpt_ext.transport.agree import agree, on_all, told_by_all
from ms_ckpt_ext.transport.base import Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule

_SAMPLES, _SAMPLE = 16, 4096
"""Of a Parameter on a device that no layout lists: how many samples ranks compare, and the bytes of each."""


class GivenSide(NamedTuple):
    """What this rank's caller gives of a side: Parameters, and layouts in any form; None where it has no part of it."""

    parameters: Any
    layouts: Any

    def side(self, argument: str, rank: int, ranks: Sequence[int], read: ReadStrategy) -> SideHere:
        """What it comes to on a rank, one of the side's. Raises as `side_of` and `as_strategy`."""
        rest, boxes = split_boxes(self.layouts, f"{argument}_strategy")
        if rest is None and not boxes and isinstance(self.parameters, ms.nn.Cell):
            from ms_ckpt_ext.bridge.restore import layouts_of

            rest = layouts_of(self.parameters)
        strategy = read(rest, ranks.index(rank), f"{argument}_strategy")
        found = side_of(self.parameters, argument)
        assert found is not None
        boxes = {**own_boxes(named_parameters(self.parameters, argument), rank), **boxes}
        check_boxes(found, boxes, f"{argument}_strategy")
        return SideHere(found, strategy, boxes, may_be_staged(self.parameters, strategy, len(ranks)))


ReadStrategy = Callable[[Any, int, str], Optional[Strategy]]
"""Reads layouts in any form, of the rank of a place; the last is what they are called in messages."""


class TransferRequest(NamedTuple):
    """What is moved, and how; one rank's.

    Attributes:
        source, target: what this rank has of each; None where it has no part.
        read: reads layouts.
        source_ranks, target_ranks: the ranks of each side in the order of their places; None: those that have a part.
        strict: every Parameter of the target must take something, by its exact name.
        rules, naming: as of a load.
        offload_source, load_target: Parameters of the source go to host memory after each run, those of the target come
            to the device before it.
        options: how the ranks exchange.
    """

    source: Optional[GivenSide]
    target: Optional[GivenSide]
    read: ReadStrategy
    source_ranks: Optional[tuple[int, ...]] = None
    target_ranks: Optional[tuple[int, ...]] = None
    strict: bool = True
    rules: tuple[Rule, ...] = ()
    naming: Naming = Naming()
    offload_source: bool = False
    load_target: bool = False
    options: LoadOptions = LoadOptions()

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks before anything is shared."""
        told = self.source_ranks, self.target_ranks, self.strict, self.offload_source, self.load_target
        return {
            "source_ranks, target_ranks, strict, offload_source, load_target": repr(told),
            "rules": repr(self.rules),
            "name_map": repr(sorted(self.naming.name_map.items())),
        }


class PlannedMove:
    """A transfer, planned on this rank: `run` moves the present values.

    Attributes:
        report: what every run moves on this rank.
    """

    def __init__(
        self,
        transport: Transport[Any],
        request: TransferRequest,
        source: Mapping[str, Any],
        matching: Matching,
        ready: PreparedTransfer,
    ) -> None:
        self._transport, self._request, self._source, self._ready = transport, request, source, ready
        self.changes = tuple(match.parameter.name for match in matching.matches)
        turns = turns_of(ready.plan, transport.rank)
        given = {ready.addresses.at(ready.plan.chunks[n].extents[0].offset).name for t in turns for n in t.chunks}
        numbered = _numbered(ready, matching)
        pieces: dict[int, list[LocalPiece]] = {}
        for piece in ready.local:
            pieces.setdefault(piece.demand, []).append(piece)
        self._idle = {n: match for n, match in numbered.items() if stays(match, pieces.get(n, ()), source)}
        self._filled = {n: match for n, match in numbered.items() if n not in self._idle}
        local = [piece for piece in ready.local if piece.demand not in self._idle]
        self._read = {name: source[name] for name in sorted(given | {piece.name for piece in local})}
        holdings = Holdings(ready.plan, turns, ready.addresses, local, self._bytes_of)
        self._run = ExchangeRun(ready.plan, turns, transport, mover_of(transport), holdings, 0, Trace())
        self._kept: frozenset[int] = frozenset()
        received = ready.plan.bytes_received()[transport.rank]
        moved = ready.bytes_local, ready.bytes_sent(transport.rank), received, len(ready.plan.rounds)
        self.report = TransferReport(len(matching.matches), matching.missing, matching.unused, *moved)

    def run(self) -> TransferReport:
        """Move. Collective.

        Raises:
            UsageError: Parameters of both sides share memory; nothing was moved.
            LoadError: it stopped on the way; `changed` names the Parameters of this rank that may hold new bytes.
            ChecksumError: verify, and ranks hold different bytes of one region afterwards.
            PeerError, TransportError: another rank refused, or is gone; nothing was moved.
        """
        sinks = on_all(self._transport, self._begin)
        verify = self._request.options.verify
        try:
            if verify == "none":
                self._run.go(sinks)
            else:
                with Digester() as digester:
                    for number, match in self._idle.items():
                        digester.add(number, contents_of(match.parameter))
                    self._run.go(sinks, digester)
                    compare_replicas(self._transport, self._ready.demands, digester.wait())
        except Exception as error:
            raise half_done(error, self.changes, "transfer", "run it again") from error
        if self._request.offload_source and on_device():
            for parameter in self._read.values():
                parameter._offload()
        return self.report

    def _begin(self) -> dict[int, Any]:
        """The sinks of this run. Where Parameters lie may have changed since the last."""
        written = [match.parameter for match in self._filled.values()]
        if self._request.load_target and on_device():
            for parameter in written:
                if not parameter.has_init:
                    parameter._load()
        for name, parameter in self._read.items():
            if getattr(parameter, "is_meta", False):
                raise UsageError(f"parameter {name!r} of the source is a meta Parameter, which has no contents")
            if parameter.has_init:
                parameter.init_data()
        refuse_overlaps(written, self._read)
        self._kept = kept_on_host([*self._read.values()]) if self._transport.traits.on_device else frozenset()
        sink_of = sinks_of(self._transport, written, tell=False)
        return {number: sink_of(match) for number, match in self._filled.items()}

    def _bytes_of(self, name: str) -> Any:
        """What this rank holds under a name, as flat bytes where they are cut."""
        parameter = self._read[name]
        if not self._transport.traits.on_device:
            return np.ascontiguousarray(parameter.asnumpy()).reshape(-1).view(np.uint8)
        if id(parameter) in self._kept:
            return _uploaded(self._transport, parameter)
        flat = parameter.view(-1) if parameter.shape else parameter.view(1)
        return flat if flat.dtype == ms.int8 else flat.view(ms.int8)

    def close(self) -> None:
        """Let go of buffers, and leave the other ranks."""
        self._transport.close()


def _uploaded(transport: Transport[Any], parameter: Any) -> Any:
    """A copy on the device of a Parameter that was offloaded."""
    host = np.ascontiguousarray(parameter.asnumpy()).reshape(-1).view(np.uint8)
    buffer = transport.allocate(host.nbytes)
    transport.upload(host, buffer, 0)
    return buffer


def _numbered(ready: PreparedTransfer, matching: Matching) -> dict[int, Match]:
    """The demands of this rank by number; a Parameter without elements is none."""
    numbers = {demand.name: number for number, demand in enumerate(ready.demands)}
    return {numbers[m.parameter.name]: m for m in matching.matches if m.parameter.name in numbers}


def plan_move(transport: Transport[Any], request: TransferRequest) -> PlannedMove:
    """Plan a transfer. Collective.

    Raises:
        UsageError, ArgumentTypeError, StrategyError, UnsupportedError: wrong arguments, on the rank that has them.
        CoverageError: the source lacks a Parameter, or a region of one.
        LayoutMismatchError: layouts contradict each other, or shapes or dtypes do not fit.
        DisagreementError, PeerError, TransportError: ranks differ, another failed, or is gone.
    """
    agree(transport, request.facts())
    sources = members_of(transport, request.source is not None, request.source_ranks, "source")
    targets = members_of(transport, request.target is not None, request.target_ranks, "target")
    source = _side(transport, request.source, request.read, sources, "source")
    target = _side(transport, request.target, request.read, targets, "target")
    mine = source.parameters if source else {}
    holds = on_all(transport, lambda: source.holds(sources.index(transport.rank)) if source else {})
    holders = slice_holders(share_holds(transport, holds), sources)
    differing = _differing(transport, untold(holders), mine, holds, request.options.verify != "none")
    catalog = on_all(transport, lambda: catalog_of_holders(holders, sources, differing))
    named = on_all(transport, lambda: request.naming.of(ruled(catalog, request.rules)))
    matching = Matching()

    def match() -> Matching:
        if target is None:
            return Matching()
        at = target, targets.index(transport.rank), len(targets)
        return match_sides(catalog, named, *at, request.naming, request.strict, differing)

    matching = on_all(transport, match)
    tell_casts(matching.matches)
    traits = transport.traits
    asked = request.options.hardware
    hardware = on_all(transport, lambda: profiles.chosen(asked, traits.product, traits.on_device).hardware)
    facts = {"hardware": repr(hardware), "choice_func": repr([(*named.tensors,), (*named.extras,)])}
    wants = matching.wants(target.boxes if target else {})
    places = {rank: place for place, rank in enumerate(targets)}
    tensors = {**named.tensors, **named.extras}
    to_come = bytes_to_come([match.parameter for match in matching.matches])
    told = request.options, hardware, host_name(request.options), facts, to_come
    ready = prepare_transfer(transport, tensors, wants, places, *told)
    planned = on_all(transport, lambda: PlannedMove(transport, request, mine, matching, ready))
    log.info("planned a transfer of %s", planned.report)
    return planned


def _side(
    transport: Transport[Any], given: Optional[GivenSide], read: ReadStrategy, ranks: Sequence[int], argument: str
) -> Optional[SideHere]:
    """What this rank has of a side; None where it has no part. Raises StrategyError: its layouts are of another job."""

    def find() -> Optional[SideHere]:
        if given is None or transport.rank not in ranks:
            return None
        return given.side(argument, transport.rank, ranks, read)

    found = on_all(transport, find)
    strategy = found.strategy if found else None
    worlds = [int(told) for told in transport.share(str(strategy.world if strategy else 0).encode())]
    if max(worlds) not in (0, len(ranks)):
        raise StrategyError(
            f"{argument}_strategy is for {max(worlds)} ranks, and the {argument} has {len(ranks)}, "
            f"{name_ranks(ranks)}: give the strategy of these, or {argument}_ranks"
        )
    return found


def _differing(
    transport: Transport[Any], names: Sequence[str], mine: Mapping[str, Any], holds: Holds, whole: bool
) -> dict[str, str]:
    """Of names that no layout lists those whose contents differ between the ranks that hold them: which, in words."""

    def digests() -> dict[str, str]:
        return {name: _digest(mine[name], whole) for name in names if name in holds}

    told = told_by_all(transport, digests)
    found = {}
    for name in names:
        groups: dict[str, list[int]] = {}
        for rank, digest in enumerate(each.get(name) for each in told):
            if digest is not None:
                groups.setdefault(digest, []).append(rank)
        if len(groups) > 1:
            found[name] = ", ".join(f"{name_ranks(ranks)}: {digest[:8]}" for digest, ranks in groups.items())
    return found


def _digest(parameter: Any, whole: bool) -> str:
    """Of a Parameter's shape, dtype and contents; on a device of samples of them, unless `whole`."""
    if parameter.has_init:
        parameter.init_data()
    state = xxhash.xxh3_128(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
    for piece in contents_of(parameter, None if whole else (_SAMPLES, _SAMPLE)).pieces:
        state.update(piece)
    return str(state.hexdigest())
