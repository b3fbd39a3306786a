"""What one rank packs, sends, receives and unpacks in a round: the byte layout of its collectives.

A block is what one rank sends to another in one round. Both ends derive it from the plan alone: pieces widest element
first, so every piece is aligned to its element; blocks padded to `ALIGNMENT`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, LocalPiece
from ms_ckpt_ext.core.exchange.plan import Delivery, ExchangePlan, GroupGather, Round, SlicePart
from ms_ckpt_ext.core.exchange.tiers import carrier, teams_of


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
    """One rank's side of a gather: its group, the bytes of a share, what it gives, and what lies in the stream.

    With a `root` it is a broadcast: the stream is the share of that rank.
    """

    ranks: tuple[int, ...]
    share: int
    given: tuple[Contribution, ...]
    items: tuple[Item, ...]
    root: int = EVERYBODY

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return self.share * len(self.ranks) if self.root == EVERYBODY else self.share

    @property
    def gives(self) -> int:
        """Bytes of a buffer from which this rank gives; none for a broadcast, which has one buffer."""
        return self.share if self.root == EVERYBODY else 0


class Forward(NamedTuple):
    """What a carrier sends on: `nbytes` at `source` of what it received, to `target` of its second send buffer."""

    source: int
    target: int
    nbytes: int


class SecondHop(NamedTuple):
    """One rank's side of the second all-to-all of a round, inside the servers: as the first; nothing is read for it."""

    outgoing: tuple[Forward, ...]
    send_counts: tuple[int, ...]
    incoming: tuple[Item, ...]
    receive_counts: tuple[int, ...]


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
    spread: Optional[SecondHop]
    """None on all ranks alike where no rank sends anything on."""
    exchanges: bool
    """Some rank sends something by all-to-all in this round; False on all ranks alike when none does."""

    @property
    def late(self) -> tuple[Item, ...]:
        """What comes by the second all-to-all."""
        return () if self.spread is None else self.spread.incoming


def turns_of(plan: ExchangePlan, rank: int) -> list[RankRound]:
    """One rank's side of every round."""
    return [rank_round(plan, round_, rank) for round_ in plan.rounds]


def completed_by(turns: Sequence[RankRound], local: Sequence[LocalPiece]) -> dict[int, list[int]]:
    """Round -> the demands whose last piece it brings to this rank; `local` is placed during the first one."""
    last = dict.fromkeys((piece.demand for piece in local), 0)
    for number, current in enumerate(turns):
        for items in (current.own, current.incoming, current.late, *(gather.items for gather in current.gathers)):
            last.update((item.part.demand, number) for item in items)
    complete: dict[int, list[int]] = {}
    for demand, number in last.items():
        complete.setdefault(number, []).append(demand)
    return complete


def rank_round(plan: ExchangePlan, round_: Round, rank: int) -> RankRound:
    """This rank's side of `round_`."""
    out, into, on, late = _blank(plan), _blank(plan), _blank(plan), _blank(plan)
    own: list[Item] = []
    for number in round_.parts:
        part = plan.parts[number]
        if part.gathered:
            continue
        reader = plan.chunks[part.chunk].reader
        for delivery in part.deliveries:
            if reader == rank:
                for to in _first_hop(plan, delivery, reader, part.turn):
                    if to == rank:
                        own.append(Item(part, delivery, part.offset, part.nbytes))
                    else:
                        out[to].append((part, delivery))
            elif rank in delivery.ranks:
                away = _teams_away(plan, delivery, reader)
                team = next((team for team in away if rank in team), (rank,))
                by = carrier(team, part.turn)
                (into[reader] if by == rank else late[by]).append((part, delivery))
                for to in team if by == rank else ():
                    if to != rank:
                        on[to].append((part, delivery))
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
        _spread(plan, on, late, incoming) if round_.spreads else None,
        round_.exchanges,
    )


_Blank = list[list[tuple[SlicePart, Delivery]]]


def _blank(plan: ExchangePlan) -> _Blank:
    return [[] for _ in range(plan.world)]


def _teams_away(plan: ExchangePlan, delivery: Delivery, reader: int) -> tuple[tuple[int, ...], ...]:
    """In a tiered plan, who wants a delivery on every server but the reader's."""
    if not plan.servers:
        return ()
    teams = teams_of(delivery.ranks, plan.servers)
    return tuple(team for server, team in teams.items() if server != plan.servers[reader])


def _first_hop(plan: ExchangePlan, delivery: Delivery, reader: int, turn: float) -> tuple[int, ...]:
    """Whom the reader sends a delivery to, itself included."""
    if not plan.servers:
        return delivery.ranks
    near = teams_of(delivery.ranks, plan.servers).get(plan.servers[reader], ())
    return near + tuple(carrier(team, turn) for team in _teams_away(plan, delivery, reader))


def _spread(plan: ExchangePlan, on: _Blank, late: _Blank, received: Sequence[Item]) -> SecondHop:
    lying = {(id(item.part), id(item.delivery)): item.offset for item in received}
    outgoing, send_counts = _blocks(plan, on)
    incoming, receive_counts = _blocks(plan, late)
    forwards = (Forward(lying[id(i.part), id(i.delivery)], i.offset, i.nbytes) for i in outgoing)
    return SecondHop(tuple(forwards), send_counts, incoming, receive_counts)


def _gather(plan: ExchangePlan, gather: GroupGather, rank: int) -> RankGather:
    begin = gather.ranks.index(rank) * gather.share if gather.root == EVERYBODY else 0
    reads = zip(gather.chunks, gather.places)
    given = tuple(Contribution(n, at - begin) for n, at in reads if plan.chunks[n].reader == rank)
    parts = (plan.parts[number] for number in gather.parts)
    mine = ((part, delivery) for part in parts for delivery in part.deliveries if rank in delivery.ranks)
    items = tuple(Item(part, delivery, part.offset, part.nbytes) for part, delivery in mine)
    return RankGather(gather.ranks, gather.share, given, items, gather.root)


def _blocks(
    plan: ExchangePlan, by_rank: Sequence[list[tuple[SlicePart, Delivery]]]
) -> tuple[tuple[Item, ...], tuple[int, ...]]:
    items: list[Item] = []
    counts: list[int] = []
    at = 0
    for pieces in by_rank:
        start = at
        for part, delivery in sorted(pieces, key=lambda pair: -pair[0].dtype.bits):
            nbytes = part.dtype.nbytes(delivery.in_part.size)
            items.append(Item(part, delivery, at, nbytes))
            at += nbytes
        at += -at % ALIGNMENT
        counts.append(at - start)
    return tuple(items), tuple(counts)
