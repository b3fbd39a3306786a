"""A transfer, planned by all ranks at once: who holds what, which Parameter takes what, the plan.

Collective: every rank of the job takes part, also one that holds no part of either side. An error on one rank is raised
on all; nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import xxhash

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.memory import bytes_to_come, contents_of, on_device
from ms_ckpt_ext.bridge.together import host_name, join
from ms_ckpt_ext.bridge.transfer.asked import GivenSide, ReadStrategy, TransferRequest
from ms_ckpt_ext.bridge.transfer.matching import Matching, differs, match_sides, tell_casts, tell_missing
from ms_ckpt_ext.bridge.transfer.moving import PlannedMove
from ms_ckpt_ext.bridge.transfer.sides import SideHere
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.engine.transfer.held import Holds, members_of, share_holds
from ms_ckpt_ext.engine.transfer.prepare import prepare_transfer
from ms_ckpt_ext.engine.transfer.sources import catalog_of_holders, slice_holders, untold
from ms_ckpt_ext.engine.unlisted.proven import ruled
from ms_ckpt_ext.errors import StrategyError, name_ranks
from ms_ckpt_ext.transport.agree import agree, on_all, share_numbers, told_by_all
from ms_ckpt_ext.transport.base import Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule

_SAMPLES, _SAMPLE = 16, 4096
"""Of a Parameter on a device that no layout lists: how many samples ranks compare, and the bytes of each."""


def transport_among(timeout: float) -> Transport[Any]:
    """All ranks meet; the caller closes the transport. A single NPU has buffers on the device. Raises as `join`."""
    transport = join(timeout)
    if transport.size > 1 or not on_device():
        return transport
    from ms_ckpt_ext.bridge.npu.alone import OneDevice

    transport.close()
    return OneDevice()


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
    return plan_between(transport, request, Sides(source, sources, target, targets))


class Sides(NamedTuple):
    """What this rank has of the two sides, None where it has no part; and the ranks of each, by their places.

    `partial`: some of the source is lost. A Parameter of the target of which any part is lost takes nothing.
    """

    source: Optional[SideHere]
    sources: Sequence[int]
    target: Optional[SideHere]
    targets: Sequence[int]
    partial: bool = False


def plan_between(transport: Transport[Any], request: TransferRequest, sides: Sides) -> PlannedMove:
    """Plan a transfer between sides that are known. Collective. Raises as `plan_move`."""
    source, sources, target, targets, partial = sides
    mine = source.parameters if source else {}
    holds = on_all(transport, lambda: source.holds(sources.index(transport.rank)) if source else {})
    holders = slice_holders(share_holds(transport, holds), sources)
    differing = _differing(transport, untold(holders), mine, holds, request.options.verify != "none")
    catalog = on_all(transport, lambda: catalog_of_holders(holders, sources, differing, not partial))
    naming = _naming(transport, request, holders, target)
    named = on_all(transport, lambda: naming.of(_ruled(catalog, request.rules, differing)))

    def match() -> Matching:
        if target is None:
            return Matching()
        at = target, targets.index(transport.rank), len(targets)
        how = request.strict, request.strict or request.exact
        found = match_sides(catalog, named, *at, naming, *how, {} if partial else differing)
        return found.held(target.boxes, at[1]) if partial else found

    matching = on_all(transport, match)
    if not partial:
        tell_missing({**catalog.tensors, **catalog.extras, **differing}, matching, naming)
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


def _ruled(catalog: Catalog, rules: Sequence[Rule], differing: Mapping[str, str]) -> Catalog:
    """The source as weight rules present it. Raises LayoutMismatchError: one takes what differs by rank."""
    if not rules:
        return catalog
    from ms_ckpt_ext.core.planning.apply_rules import sources_among

    for name in sources_among(differing, rules):
        raise differs(name, differing[name], "a rule")
    return ruled(catalog, rules)


def _naming(
    transport: Transport[Any], request: TransferRequest, holders: Mapping[str, Any], target: Optional[SideHere]
) -> Naming:
    """How the source is called in the target; the same on all ranks."""
    if request.pairs is None:
        return request.naming
    told: list[list[str]] = told_by_all(transport, lambda: list(target.parameters) if target else [], [str])
    names = list(dict.fromkeys(name for names in told for name in names))
    pairs = request.pairs
    return on_all(transport, lambda: pairs(list(holders), names))


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
    worlds = share_numbers(transport, strategy.world if strategy else 0)
    if max(worlds) not in (0, len(ranks)):
        raise StrategyError(
            f"{argument}_strategy is for {max(worlds)} ranks, and the {argument} has {len(ranks)}, "
            f"{name_ranks(ranks)}: give the strategy of these, or {argument}_ranks"
        )
    return found


def _differing(
    transport: Transport[Any], names: Sequence[str], mine: Mapping[str, Any], holds: Holds, whole: bool
) -> dict[str, str]:
    """Of `names`, which no layout lists, those whose contents differ between ranks -> which ranks, in words."""

    def digests() -> dict[str, str]:
        return {name: _digest(mine[name], whole) for name in names if name in holds}

    told: list[dict[str, str]] = told_by_all(transport, digests, {str: str})
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
    """Digest of a Parameter's shape, dtype and contents; on a device, of samples of these unless `whole`."""
    if parameter.has_init:
        parameter.init_data()
    state = xxhash.xxh3_128(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
    for piece in contents_of(parameter, None if whole else (_SAMPLES, _SAMPLE)).pieces:
        state.update(piece)
    return str(state.hexdigest())
