"""What one rank packs, sends, receives and unpacks in a round: the byte layout of its collectives.

A block is what one rank sends to another in one round. Both ends derive it from the plan alone: pieces widest element
first, so every piece is aligned to its element; blocks padded to `ALIGNMENT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.exchange.plan import Delivery, ExchangePlan, Gather, Round, SlicePart


class Item(NamedTuple):
    """A piece in a block: the delivery of a part, `offset` bytes into the buffer, `nbytes` long."""

    part: SlicePart
    delivery: Delivery
    offset: int
    nbytes: int


class Contribution(NamedTuple):
    """A chunk of this rank that goes to byte `offset` of its share."""

    chunk: int
    offset: int


class RankGather(NamedTuple):
    """One rank's side of a gather: its group, the bytes of a share, what it gives, and what lies in the stream."""

    ranks: tuple[int, ...]
    share: int
    given: tuple[Contribution, ...]
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return self.share * len(self.ranks)


class RankRound(NamedTuple):
    """One rank's side of a round. Items of `outgoing` are to be packed, all others to be placed.

    Attributes:
        chunks: chunks this rank reads before the round.
        own: deliveries from its own chunks to itself; their offset is that of the part in its chunk.
        outgoing, send_counts: the all-to-all's send buffer, blocks in rank order.
        incoming, receive_counts: its receive buffer.
        gathers: what it gathers with groups that it is in.
    """

    chunks: tuple[int, ...]
    own: tuple[Item, ...]
    outgoing: tuple[Item, ...]
    send_counts: tuple[int, ...]
    incoming: tuple[Item, ...]
    receive_counts: tuple[int, ...]
    gathers: tuple[RankGather, ...]
    exchanges: bool
    """Some rank sends something by all-to-all in this round; False on all ranks alike when none does."""


def rank_round(plan: ExchangePlan, round_: Round, rank: int) -> RankRound:
    """This rank's side of `round_`."""
    out: list[list[tuple[SlicePart, Delivery]]] = [[] for _ in range(plan.world)]
    into: list[list[tuple[SlicePart, Delivery]]] = [[] for _ in range(plan.world)]
    own: list[Item] = []
    exchanges = False
    for number in round_.parts:
        part = plan.parts[number]
        if part.gathered:
            continue
        reader = plan.chunks[part.chunk].reader
        for delivery in part.deliveries:
            exchanges = exchanges or delivery.ranks != (reader,)
            if reader == rank:
                for to in delivery.ranks:
                    if to == rank:
                        own.append(Item(part, delivery, part.offset, part.nbytes))
                    else:
                        out[to].append((part, delivery))
            elif rank in delivery.ranks:
                into[reader].append((part, delivery))
    outgoing, send_counts = _blocks(plan, out)
    incoming, receive_counts = _blocks(plan, into)
    mine = tuple(chunk for chunk in round_.chunks if plan.chunks[chunk].reader == rank)
    return RankRound(
        mine,
        tuple(own),
        outgoing,
        send_counts,
        incoming,
        receive_counts,
        tuple(_gather(plan, gather, rank) for gather in round_.gathers if rank in gather.ranks),
        exchanges,
    )


def _gather(plan: ExchangePlan, gather: Gather, rank: int) -> RankGather:
    begin = gather.ranks.index(rank) * gather.share
    reads = zip(gather.chunks, gather.places)
    given = tuple(Contribution(n, at - begin) for n, at in reads if plan.chunks[n].reader == rank)
    parts = (plan.parts[number] for number in gather.parts)
    items = tuple(Item(part, _delivery_to(part, rank), part.offset, part.nbytes) for part in parts)
    return RankGather(gather.ranks, gather.share, given, items)


def _delivery_to(part: SlicePart, rank: int) -> Delivery:
    return next(delivery for delivery in part.deliveries if rank in delivery.ranks)


def _blocks(
    plan: ExchangePlan, by_rank: Sequence[list[tuple[SlicePart, Delivery]]]
) -> tuple[tuple[Item, ...], tuple[int, ...]]:
    items: list[Item] = []
    counts: list[int] = []
    at = 0
    for pieces in by_rank:
        start = at
        for part, delivery in sorted(pieces, key=lambda pair: -plan.dtype(pair[0]).bits):
            nbytes = plan.dtype(part).nbytes(delivery.in_part.size)
            items.append(Item(part, delivery, at, nbytes))
            at += nbytes
        at += -at % ALIGNMENT
        counts.append(at - start)
    return tuple(items), tuple(counts)
