"""A load that ranks make together, whatever holds their parameters: agree, plan, exchange, compare.

The steps are collective: every rank calls them in this order, and an error on one is raised on all.

A rank's wants are names with layouts; its box follows from its rank. Every rank tells its wants, and all derive the
same list of demands. Ranks of one pipeline stage want the same, so a description travels once per distinct content,
from the lowest rank that has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import xxhash

from ms_ckpt_ext import log
from ms_ckpt_ext.core.exchange import cost
from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, Sees, Ways, boxes_moved
from ms_ckpt_ext.core.exchange.parts import Located
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, ExchangeTable, decide, plan_of
from ms_ckpt_ext.core.exchange.tiers import shares_a_server
from ms_ckpt_ext.core.exchange.totals import RankTotals, tally
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, layout_from_json
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.load.options import LoadOptions, LoadReport
from ms_ckpt_ext.engine.load.profiles import bucket_for, left_on_all, limits_for
from ms_ckpt_ext.engine.load.survey import Survey, header_digest
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CoverageError, TransportError, UsageError
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.agree import LAYOUT, NATURAL, agree, common_groups, parsed, share_alike, share_values
from ms_ckpt_ext.transport.base import SAME_VERSION, B, Transport, TransportTraits

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import Digest
    from ms_ckpt_ext.engine.load.slabs import Mover, SliceSink

_AS_GOOD_AS = 1.02
"""Where reading takes longest, both ways take the same time; the one that sends less between servers is chosen then."""


class Want(NamedTuple):
    """One thing a rank wants: a parameter of the catalog, cut by a layout; the box is that of the rank within it."""

    source: str
    layout: Layout


def share_wants(transport: Transport[Any], wants: Mapping[str, Want]) -> list[Mapping[str, Want]]:
    """Every rank's wants, by rank. Ranks with equal wants share one mapping."""
    return share_alike(transport, _encode(wants), _decode)


def _encode(wants: Mapping[str, Want]) -> bytes:
    layouts = list(dict.fromkeys(want.layout for want in wants.values()))
    number = {layout: n for n, layout in enumerate(layouts)}
    return json.dumps([layouts, [[name, w.source, number[w.layout]] for name, w in wants.items()]]).encode()


def _decode(content: bytes) -> Mapping[str, Want]:
    described, wants = parsed(content, ([LAYOUT], [(str, str, NATURAL)]))
    layouts = [layout_from_json(raw) for raw in described]
    return {name: Want(source, layouts[number]) for name, source, number in wants}


def demands_of(catalog: Catalog, wants_by_rank: Sequence[Mapping[str, Want]]) -> list[Demand]:
    """One demand per wanted name, in the catalog's order; parameters without elements are left out."""
    alike: dict[int, list[int]] = {}
    for rank, wants in enumerate(wants_by_rank):
        alike.setdefault(id(wants), []).append(rank)
    found: dict[tuple[str, str], list[_Wanted]] = {}
    for ranks in map(tuple, alike.values()):
        wanted: dict[int, _Wanted] = {}  # by identity of the layout: those of a mapping are few
        for name, (source, layout) in wants_by_rank[ranks[0]].items():
            if source not in catalog.tensors and source not in catalog.extras:
                raise TransportError(
                    f"rank {ranks[0]} wants {source!r} for {name!r}, which the checkpoint does not hold; {SAME_VERSION}"
                )
            each = wanted.get(id(layout)) or wanted.setdefault(id(layout), _Wanted(layout, ranks))
            found.setdefault((source, name), []).append(each)
    order = {name: number for number, name in enumerate((*catalog.tensors, *catalog.extras))}
    grids: dict[tuple[int, ...], tuple[Grid, ...]] = {}
    demands = []
    for source, name in sorted(found, key=lambda key: (order[key[0]], key[1])):
        tensor, each_wanted = _tensor_of(catalog, source), found[source, name]
        if all(tensor.meta.shape):
            key = tuple(map(id, each_wanted))
            demands.append(Demand(name, tensor, grids.get(key) or grids.setdefault(key, _grids(each_wanted))))
    return demands


class _Wanted(NamedTuple):
    """A layout, and ranks that want something cut by it."""

    layout: Layout
    ranks: tuple[int, ...]


def _grids(wanted: Sequence[_Wanted]) -> tuple[Grid, ...]:
    """How ranks want a parameter: one value for all parameters that are wanted alike."""
    grids: dict[Shape, dict[Cell, list[int]]] = {}
    for layout, ranks in wanted:
        by_parts, cells = grids.setdefault(layout.parts, {}), layout.cells
        for rank in ranks:
            by_parts.setdefault(cells[rank % len(cells)], []).append(rank)
    return tuple(Grid(parts, {cell: tuple(held) for cell, held in cells.items()}) for parts, cells in grids.items())


def _tensor_of(catalog: Catalog, source: str) -> SourceTensor:
    """A parameter of the catalog, by its name there."""
    return catalog.tensors[source] if source in catalog.tensors else catalog.extras[source]


@dataclass(frozen=True)
class Prepared:
    """A load that all ranks agree on."""

    catalog: Catalog
    demands: tuple[Demand, ...]
    plan: ExchangePlan
    cooperative: bool


def prepare(
    transport: Transport[Any],
    seen: Survey,
    catalog: Catalog,
    wants: Mapping[str, Want],
    options: LoadOptions,
    hardware: cost.Hardware,
    more_facts: Mapping[str, str],
    to_come: int = 0,
) -> Prepared:
    """Agree on the inputs, learn what all ranks want, plan, and choose the mode.

    Args:
        to_come: bytes that this rank's Parameters will still take of its device.

    Raises:
        DisagreementError: ranks were started with different inputs.
        CoverageError: a region that some rank wants is in no file that anyone sees.
        TransportError: the backend delivers other bytes than were sent.
    """
    headers = xxhash.xxh3_128("".join(header_digest(index) for index in catalog.files).encode()).hexdigest()
    agree(transport, {**options.facts(), "checkpoint": headers, **more_facts})
    demands = demands_of(catalog, share_wants(transport, wants))
    sees = seen.by_number
    left = left_on_all(transport, to_come, demands, hardware)
    limits = limits_for(demands, transport.size, bucket_for(options.bucket_bytes, transport.traits.call_bytes, left))
    known = common_groups(transport)
    ways = Ways(groups=transport.traits.groups, known=known, servers=servers_of(seen.host_of))
    try:
        table = choose_way(demands, transport.size, catalog.stored, limits, sees, ways, hardware)
    except CoverageError as error:
        raise CoverageError(f"{error} (hosts asked: {', '.join(seen.hosts)})") from error
    plan = plan_of(table)
    agree(transport, {"plan": table.digest()})
    mode = _possible_mode(options.mode, demands, sees)
    cooperative = _cooperative(plan, sees is None, mode, hardware, transport.traits)
    if cooperative:
        transport.prove()
    return Prepared(catalog, tuple(demands), plan, cooperative)


def _possible_mode(mode: str, demands: Sequence[Demand], sees: Optional[Sees]) -> str:
    """The mode that was asked for, or "cooperative" where a rank may want bytes that its host does not see."""
    unseen = _unseen(demands, sees) if mode == "direct" and sees is not None else ""
    if not unseen:
        return mode
    log.warning("mode='direct' is not possible: %s; what a rank does not see it is sent by one that does", unseen)
    return "cooperative"


def _unseen(demands: Sequence[Demand], sees: Sees) -> str:
    """A rank that may want a file which it does not see, in words; nothing if there is none."""
    for demand in demands:
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                boxes = boxes_moved(demand.tensor, grid.region(cell, demand.tensor.meta.shape))
                able = [sees[file] for box in boxes for sourced in box.pieces for file in sourced.files]
                lacking = next((rank for rank in ranks if any(rank not in each for each in able)), None)
                if lacking is not None:
                    return f"rank {lacking} does not see all files that hold its slice of {demand.name!r}"
    return ""


def servers_of(hosts: Sequence[str]) -> tuple[int, ...]:
    """A number for every rank's host; none where there is only one."""
    known = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return tuple(known[host] for host in hosts) if len(known) > 1 else ()


def choose_way(
    demands: Sequence[Demand],
    world: int,
    stored: Located,
    limits: ExchangeLimits,
    sees: Optional[Sees],
    ways: Ways,
    hardware: cost.Hardware,
    in_memory: bool = False,
) -> ExchangeTable:
    """Decide a load by the ways that there are, and take the fastest by the cost model.

    Where not all of a group see a file, one of them may send each a copy, or broadcast it. What several ranks of a
    server want may cross to it for each, or once (tiered); of what takes as long, that which crosses less.

    Arguments and errors are those of `decide`.
    """

    def decided(more: Ways) -> ExchangeTable:
        return decide(demands, world, stored, limits, sees, more, in_memory)

    found = decided(ways)
    if sees is not None:
        sent = decided(ways._replace(broadcast=True))
        if any(group.root != EVERYBODY for group in sent.chunks.groups):
            copied, broadcast = _Counted.of(found, hardware), _Counted.of(sent, hardware)
            log.info("predicted: copies %.3f s, broadcasts %.3f s", copied.seconds, broadcast.seconds)
            found = sent if broadcast.seconds < copied.seconds else found
    sets = found.chunks.parts.sets.members
    if not ways.servers or not any(shares_a_server(members, ways.servers) for members in sets):
        return found
    flat = _Counted.of(found, hardware)
    if not flat.crossing:
        return found
    table = decided(found.ways._replace(tiered=True))
    tiered = _Counted.of(table, hardware)
    log.info("predicted: flat %.3f s, by tiers %.3f s", flat.seconds, tiered.seconds)
    better = tiered.crossing < flat.crossing and tiered.seconds <= flat.seconds * _AS_GOOD_AS
    return table if better else found


class _Counted(NamedTuple):
    """How long a load takes, and how many bytes cross to other servers."""

    seconds: float
    crossing: int

    @classmethod
    def of(cls, table: ExchangeTable, hardware: cost.Hardware) -> _Counted:
        """Count it."""
        counted = tally(table)
        return cls(cost.cooperative_seconds(traffic_of(counted), hardware), int(counted.crossing.sum()))


def traffic_of(counted: RankTotals) -> cost.Traffic:
    """What the cost model takes of a plan's totals."""
    columns = (counted.inside, counted.between, counted.crossing)
    figures = (counted.read.tolist(), counted.received.tolist(), len(counted.rounds), counted.calls)
    return cost.Traffic(*figures, *(column.tolist() for column in columns))


def _cooperative(
    plan: ExchangePlan, all_see_all: bool, mode: str, hardware: cost.Hardware, traits: TransportTraits
) -> bool:
    if mode != "direct" and traits.all_to_all != "collective":
        return _without_all_to_all(all_see_all, traits)
    if mode != "auto" or not all_see_all:
        return mode != "direct"
    traffic, wanted = cost.Traffic(plan.bytes_read(), plan.bytes_received(), len(plan.rounds)), plan.bytes_wanted()
    together, alone = cost.cooperative_seconds(traffic, hardware), cost.direct_seconds(wanted, hardware)
    log.info("predicted: direct %.3f s, cooperative %.3f s", alone, together)
    return cost.cooperates(wanted, traffic, hardware)


def _without_all_to_all(all_see_all: bool, traits: TransportTraits) -> bool:
    """What takes the place of a collective that a product lacks for these ranks. Raises UsageError if nothing can."""
    if all_see_all:
        log.warning(
            "%s has no all-to-all for these ranks: every rank reads its own bytes (direct mode)", traits.product
        )
        return False
    if traits.all_to_all:
        log.warning("%s has no all-to-all for these ranks: it is made of sends from rank to rank", traits.product)
        return True
    raise UsageError(
        f"{traits.product} has no all-to-all for these ranks, and not every rank sees every file, so no rank can read "
        "for another: put the checkpoint where all hosts see it"
    )


def exchange(
    transport: Transport[B],
    prepared: Prepared,
    mover: Mover[B],
    sinks: Mapping[int, SliceSink[B]],
    readers: ReaderPool,
    options: LoadOptions,
) -> LoadReport:
    """Run a prepared cooperative load, and digest what lands unless `verify` is "none". Raises as `run_exchange`."""
    from ms_ckpt_ext.engine.load.run_exchange import run_exchange
    from ms_ckpt_ext.log import Trace

    trace = Trace(transport.rank, bool(options.trace))
    how = options.prefetch, options.threads, trace
    run = partial(run_exchange, prepared.plan, transport, mover, sinks, readers, *how)
    digests: dict[int, Digest] = {}
    if options.verify == "none":
        run()
    else:
        from ms_ckpt_ext.engine.load.replicas import Digester

        with Digester(trace) as digester:
            run(digester)
            digests = digester.wait()
    if options.trace:
        events: list[list[dict[str, Any]]] = share_values(transport, trace.events, [dict])
        if transport.rank == 0:
            Trace.save_all(events, options.trace)
    received = prepared.plan.bytes_received()[transport.rank]
    return LoadReport("cooperative", readers.count, received, len(prepared.plan.rounds), digests)
