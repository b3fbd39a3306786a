"""A transfer on which all ranks agree, planned by each of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, LocalPiece, Ways, local_pieces
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, plan_of
from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.planning.pieces import SourceTensor, locate
from ms_ckpt_ext.engine.load.hosts import told_apart
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.profiles import bucket_for, left_on_all, limits_for
from ms_ckpt_ext.engine.load.session import choose_way, servers_of
from ms_ckpt_ext.engine.transfer.addresses import Addresses
from ms_ckpt_ext.engine.transfer.compared import require_moved
from ms_ckpt_ext.engine.transfer.wanted import Wants, demands_among, share_wanted
from ms_ckpt_ext.errors import CoverageError, UsageError, name_ranks
from ms_ckpt_ext.transport.agree import agree, share_texts
from ms_ckpt_ext.transport.base import Transport


class PreparedTransfer(NamedTuple):
    """A transfer, planned.

    Attributes:
        demands: what all ranks want.
        plan: what travels.
        local: what this rank takes from its own memory.
        addresses: where slices lie, in the plan's address space.
        bucket: staging memory of a rank for one round, in bytes.
    """

    demands: tuple[Demand, ...]
    plan: ExchangePlan
    local: tuple[LocalPiece, ...]
    addresses: Addresses
    bucket: int

    def numbers(self, rank: int) -> dict[str, int]:
        """Name -> number of the demand, for what a rank wants."""
        wanting = ((number, demand.name, grid) for number, demand in enumerate(self.demands) for grid in demand.grids)
        return {name: number for number, name, grid in wanting if any(rank in some for some in grid.ranks.values())}

    @property
    def bytes_local(self) -> int:
        """Bytes that this rank takes from its own memory."""
        return sum(piece.dtype.nbytes(piece.in_source.size) for piece in self.local)

    def bytes_sent(self, rank: int) -> int:
        """Payload that a rank sends to others."""
        total = 0
        for part in self.plan.parts:
            if self.plan.chunks[part.chunk].reader == rank:
                total += sum(part.dtype.nbytes(each.in_part.size) * len(each.ranks) for each in part.deliveries)
        return total


def prepare_transfer(
    transport: Transport[Any],
    tensors: Mapping[str, SourceTensor],
    wants: Wants,
    places: Mapping[int, int],
    options: LoadOptions,
    hardware: Hardware,
    host: str,
    facts: Mapping[str, str],
    to_come: int = 0,
) -> PreparedTransfer:
    """Agree on the inputs, learn what all ranks want, and plan. Collective.

    Args:
        tensors: the source, by the names that `wants` uses.
        wants: what this rank wants.
        places: rank of the target -> its place in the layouts.
        host: key of this rank's host.
        facts: what must be the same on all ranks, besides the options.
        to_come: bytes of device memory that this rank's target will still take.

    Raises:
        DisagreementError: ranks were started with different inputs.
        CoverageError: no rank holds a region that some rank wants.
        UsageError: the product has no all-to-all for these ranks; or `verify="full"`, and a rule computes something.
        TransportError: the backend delivers other bytes than were sent.
    """
    described = repr([(name, tensor.meta, tensor.placements) for name, tensor in tensors.items()])
    agree(transport, {**options.facts(), "what the source holds": described, **facts})
    demands = demands_among(tensors, share_wanted(transport, wants), places)
    if options.verify == "full":
        require_moved(demands)
    if not transport.traits.all_to_all:
        raise UsageError(f"{transport.traits.product} has no all-to-all for these ranks, which a transfer needs")
    hosts = told_apart(share_texts(transport, host))
    ways = Ways(gather=False, servers=servers_of(hosts))
    left = left_on_all(transport, to_come, demands, hardware)
    bucket = bucket_for(options.bucket_bytes, transport.traits.call_bytes, left)
    limits = limits_for(demands, transport.size, bucket)
    addresses = Addresses(demand.tensor for demand in demands)
    require_held(demands)
    table = choose_way(demands, transport.size, addresses.stored, limits, None, ways, hardware, in_memory=True)
    plan = plan_of(table, transport.rank)
    agree(transport, {"plan": table.digest()})
    if plan.rounds:
        transport.prove()
    local = [piece for number, demand in enumerate(demands) for piece in local_pieces(demand, number, transport.rank)]
    return PreparedTransfer(tuple(demands), plan, tuple(local), addresses, bucket)


def require_held(demands: Sequence[Demand]) -> None:
    """Raise CoverageError for the first wanted region that no rank holds; names the ranks that want it."""
    known = set()
    for demand in demands:
        tensor = demand.tensor
        lying = (tensor.meta.shape, *((p.parts, id(p.holders)) for p in tensor.placements))
        key = (lying, *((grid.parts, id(grid.ranks)) for grid in demand.grids))
        if tensor.recipe is None and key in known:
            continue
        known.add(key)
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                box = grid.region(cell, demand.tensor.meta.shape)
                try:
                    locate(demand.tensor, box)
                except CoverageError as error:
                    raise CoverageError(_unheld(demand, box, ranks)) from error


def _unheld(demand: Demand, box: Region, ranks: Sequence[int]) -> str:
    told = []
    for placement in demand.tensor.placements:
        holding = sorted({rank for some in placement.holders.values() for rank in some})
        told.append(f"in {list(placement.parts)} slices by {name_ranks(holding)}")
    return (
        f"parameter {demand.name!r}: the source does not hold all of region {box} of its shape "
        f"{list(demand.tensor.meta.shape)}, which {name_ranks(ranks)} want; "
        f"it is held {' and '.join(told) or 'in parts'}: check source_strategy, and that every rank of the source "
        "gives its network"
    )
