"""An exchange played out on arrays: the plan of all ranks, without files, threads or transports.

Every rank reads, packs, sends, gathers and places what its side of each round says, and what it does is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, Demand, LocalPiece, boxes_moved
from ms_ckpt_ext.core.exchange.one_rank import Item, RankGather, RankRound, rank_round
from ms_ckpt_ext.core.exchange.plan import Chunk, ExchangePlan, Round
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View

Bytes = np.ndarray
"""Flat uint8."""


def elements(data: Bytes, dtype: DType) -> np.ndarray:
    """Flat bytes as elements, each a row of bytes; of a packed type, as bytes."""
    return data.reshape(-1, dtype.bits // 8 or 1)


def scaled(shape: Shape, dtype: DType) -> Shape:
    """A shape in elements; of a packed type, in bytes, of which the last axis has whole ones."""
    if not dtype.bits % 8:
        return shape
    last, rest = divmod(shape[-1] * dtype.bits, 8)
    assert not rest
    return (*shape[:-1], last)


def scaled_box(box: Region, dtype: DType) -> Region:
    """A box, as `scaled`."""
    return Region(scaled(box.start, dtype), scaled(box.stop, dtype))


class Hop(NamedTuple):
    """Bytes from one rank to another in one collective, padding included."""

    sender: int
    receiver: int
    nbytes: int


class Call(NamedTuple):
    """A collective of one group: an all-gather of shares of `nbytes`, or what `root` broadcasts."""

    ranks: tuple[int, ...]
    nbytes: int
    root: Optional[int] = None


def hops_of(call: Call, server: Callable[[int], int]) -> list[Hop]:
    """An all-gather as HCCL makes it, step by step: over servers with as many ranks each a share crosses to the rank at
    its place, which passes it on; else every rank of a ring passes a share to the next, in every step."""
    teams: dict[int, list[int]] = {}
    for rank in call.ranks:
        teams.setdefault(server(rank), []).append(rank)
    ranks, nbytes = call.ranks, call.nbytes
    if len({len(team) for team in teams.values()}) > 1:
        return [Hop(rank, ranks[(n + 1) % len(ranks)], nbytes) for n, rank in enumerate(ranks)] * (len(ranks) - 1)
    made = []
    for origin in ranks:
        place = teams[server(origin)].index(origin)
        for where, team in teams.items():
            carries = origin if where == server(origin) else team[place]
            made += [Hop(origin, carries, nbytes)] if carries != origin else []
            made += [Hop(carries, rank, nbytes) for rank in team if rank != carries]
    return made


class Box:
    """What one rank wants of a demand, or computes with: contents, and how often each element was placed."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        self.shape, self._dtype = shape, dtype
        self.contents = elements(np.zeros(dtype.nbytes(prod(shape)), np.uint8), dtype)
        self.times = np.zeros((len(self.contents), 1), np.uint8)

    def place(self, piece: np.ndarray, in_target: Region, view: Optional[View]) -> None:
        """Place elements of `in_target`, row-major."""
        box = scaled_box(in_target, self._dtype)
        self._seen(self.times, in_target, view)[box.slices] += 1
        where = self._seen(self.contents, in_target, view)[box.slices]
        where[...] = piece.reshape(where.shape)

    def _seen(self, held: np.ndarray, in_target: Region, view: Optional[View]) -> np.ndarray:
        if view is None:
            return held.reshape(*scaled(self.shape, self._dtype), held.shape[1])
        last = view.offset + sum((high - 1) * stride for high, stride in zip(in_target.stop, view.strides))
        assert 0 <= view.offset <= last < len(held)
        steps = (*(stride * held.strides[0] for stride in view.strides), held.strides[1])
        return np.lib.stride_tricks.as_strided(held[view.offset :], (*in_target.stop, held.shape[1]), steps)


@dataclass
class Counted:
    """What the ranks did, one number a rank."""

    world: int
    wire: list[Hop] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        none = np.zeros(self.world, np.int64)
        self.wanted, self.sent, self.received, self.read, self.reads, self.messages, self.collectives = (
            none.copy() for _ in range(7)
        )
        self.payload = np.zeros((self.world, self.world), np.int64)
        self.buffers: dict[str, np.ndarray] = {}
        self.rounds: list[tuple[int, int, int, int, int]] = []
        """Of every round the bytes read, those of the rank with the most, bytes moved, the most received, messages."""

    def hold(self, name: str, rank: int, nbytes: int) -> None:
        """A buffer of a rank, as large as its largest use."""
        held = self.buffers.setdefault(name, np.zeros(self.world, np.int64))
        held[rank] = max(held[rank], nbytes)


class Played:
    """A world of ranks.

    Attributes:
        last: rank, number of the demand -> the round in which the last of it came.
        boxes: rank, number of the demand, number of the box (0: the one that is wanted) -> what came there.
        counted: what the ranks did.
    """

    def __init__(self, plan: ExchangePlan, stored: Mapping[int, Bytes], in_memory: bool = False) -> None:
        """`stored`: the bytes of every file; or, `in_memory`, of what every rank holds."""
        self.plan, self._stored, self._in_memory = plan, stored, in_memory
        self.boxes: dict[tuple[int, int, int], Box] = {}
        self.last: dict[tuple[int, int], int] = {}
        self.counted = Counted(plan.world)
        for number, demand in enumerate(plan.demands):
            self._make(number, demand)

    def _make(self, number: int, demand: Demand) -> None:
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                for box in boxes_moved(demand.tensor, grid.region(cell, demand.tensor.meta.shape)):
                    self.boxes.update({(rank, number, box.into): Box(box.shape, box.dtype) for rank in ranks})

    def take(self, rank: int, piece: LocalPiece, slice_: Bytes) -> None:
        """What a rank takes of a slice in its own memory."""
        held = elements(slice_, piece.dtype).reshape(*piece.shape, -1)[piece.in_source.slices]
        self.boxes[rank, piece.demand, piece.into].place(held, piece.in_target, piece.view)
        self.last[rank, piece.demand] = 0

    def play(self) -> list[list[RankRound]]:
        """All rounds, one after another; returns every rank's side of each."""
        self._chunks: dict[int, Bytes] = {}
        return [self._round(each) for each in self.plan.rounds]

    def _round(self, each: Round) -> list[RankRound]:
        world, counted = range(self.plan.world), self.counted
        turns = [rank_round(self.plan, each, rank) for rank in world]
        before = counted.received.copy(), counted.messages.copy()
        reads = [sum(self._read(rank, number) for number in turns[rank].chunks) for rank in world]
        slabs = [np.zeros(sum(turn.send_counts), np.uint8) for turn in turns]
        for rank, turn in enumerate(turns):
            for item in turn.own:
                part = self._chunks[item.part.chunk][item.part.offset :][: item.part.nbytes]
                self._land(rank, item, self._cut(item, part))
            for item in turn.outgoing:
                part = self._chunks[item.part.chunk][item.part.offset :][: item.part.nbytes]
                slabs[rank][item.offset :][: item.nbytes] = self._cut(item, part).reshape(-1)
        sends, receives = [turn.send_counts for turn in turns], [turn.receive_counts for turn in turns]
        got = self._all_to_all(slabs, sends, receives, "send", "receive")
        assert {turn.exchanges for turn in turns} == {any(map(any, sends))}, "on all ranks alike"
        self._placed([turn.incoming for turn in turns], receives, got)
        self._spread(turns, got)
        self._gather(each, turns)
        received, messages = counted.received - before[0], counted.messages - before[1]
        numbers = sum(reads), max(reads), int(received.sum()), int(received.max()), int(messages.sum())
        counted.rounds.append(numbers)
        return turns

    def _read(self, rank: int, number: int) -> int:
        chunk: Chunk = self.plan.chunks[number]
        assert chunk.reader == rank and number not in self._chunks
        held = self._stored[rank if self._in_memory else chunk.file]
        self._chunks[number] = np.concatenate([held[at : at + length] for at, length in chunk.extents])
        assert self._chunks[number].size == chunk.nbytes
        if self._in_memory:
            return 0
        self.counted.read[rank] += chunk.nbytes
        self.counted.reads[rank] += 1
        return chunk.nbytes

    def _cut(self, item: Item, part: Bytes) -> np.ndarray:
        """The box of a part that a delivery wants."""
        dtype = item.part.dtype
        whole = elements(part, dtype).reshape(*scaled(item.part.shape, dtype), -1)
        return whole[scaled_box(item.delivery.in_part, dtype).slices]

    def _land(self, rank: int, item: Item, piece: np.ndarray) -> None:
        delivery = item.delivery
        assert rank in delivery.ranks
        box = self.boxes[rank, item.part.demand, delivery.into]
        assert delivery.target_shape == box.shape
        box.place(piece, delivery.in_target, delivery.view)
        self.last[rank, item.part.demand] = len(self.counted.rounds)
        self.counted.wanted[rank] += piece.size

    def _all_to_all(
        self,
        slabs: Sequence[Bytes],
        sends: Sequence[Sequence[int]],
        receives: Sequence[Sequence[int]],
        outgoing: str,
        incoming: str,
    ) -> list[Bytes]:
        counted, world = self.counted, range(self.plan.world)
        got: list[list[Bytes]] = [[] for _ in world]
        for sender in world:
            assert all(count % ALIGNMENT == 0 for count in sends[sender])
            stops = np.cumsum(sends[sender])
            counted.hold(outgoing, sender, sum(sends[sender]))
            counted.hold(incoming, sender, sum(receives[sender]))
            for receiver in world:
                nbytes = sends[sender][receiver]
                assert nbytes == receives[receiver][sender], "both ends agree"
                got[receiver].append(slabs[sender][stops[receiver] - nbytes : stops[receiver]])
                if nbytes:
                    assert sender != receiver, "what a rank keeps does not travel"
                    counted.wire.append(Hop(sender, receiver, nbytes))
                    counted.messages[sender] += 1
        counted.collectives += bool(sum(map(sum, sends)))
        return [np.concatenate(blocks) for blocks in got]

    def _placed(self, items: Sequence[Sequence[Item]], counts: Sequence[Sequence[int]], got: Sequence[Bytes]) -> None:
        for rank, incoming in enumerate(items):
            stops = np.cumsum(counts[rank])
            for item in incoming:
                assert item.offset % min(item.part.dtype.bits // 8 or 1, ALIGNMENT) == 0, (
                    "views of a device are aligned"
                )
                self._land(rank, item, elements(got[rank][item.offset :][: item.nbytes], item.part.dtype))
                sender = int(np.searchsorted(stops, item.offset, side="right"))
                self._moved(sender, rank, item.nbytes)

    def _moved(self, sender: int, receiver: int, nbytes: int) -> None:
        self.counted.sent[sender] += nbytes
        self.counted.received[receiver] += nbytes
        self.counted.payload[sender, receiver] += nbytes

    def _spread(self, turns: Sequence[RankRound], got: Sequence[Bytes]) -> None:
        assert len({turn.spread is None for turn in turns}) == 1, "on all ranks alike"
        late = [turn.spread for turn in turns if turn.spread is not None]
        if not late:
            return
        slabs = [np.zeros(sum(each.send_counts), np.uint8) for each in late]
        for rank, each in enumerate(late):
            for source, target, nbytes in each.outgoing:
                slabs[rank][target : target + nbytes] = got[rank][source : source + nbytes]
        sends, receives = [each.send_counts for each in late], [each.receive_counts for each in late]
        servers = self.plan.servers
        for sender, counts in enumerate(sends):
            assert all(servers[sender] == servers[r] for r, count in enumerate(counts) if count), "stays in its server"
        after = self._all_to_all(slabs, sends, receives, "send on", "receive late")
        self._placed([each.incoming for each in late], receives, after)

    def _gather(self, each: Round, turns: Sequence[RankRound]) -> None:
        slots = np.zeros(self.plan.world, np.int64)
        waiting = [list(turn.gathers) for turn in turns]
        for gather in each.gathers:
            sides = [waiting[rank].pop(0) for rank in gather.ranks]
            assert {(side.ranks, side.root) for side in sides} == {(gather.ranks, gather.root)}
            self._gathered(gather.ranks, sides, slots)
            slots[list(gather.ranks)] += 1
        assert not any(waiting)

    def _gathered(self, ranks: tuple[int, ...], sides: Sequence[RankGather], slots: np.ndarray) -> None:
        """`slots`: how many groups every rank has gathered with before, in this round."""
        counted, root, share = self.counted, sides[0].root, sides[0].share
        shares, given = [], []
        for side in sides:
            assert side.share == share and share % ALIGNMENT == 0
            mine = np.zeros(share, np.uint8)
            for number, at in side.given:
                mine[at : at + self.plan.chunks[number].nbytes] = self._chunks[number]
            shares.append(mine)
            given.append(sum(self.plan.chunks[number].nbytes for number, _ in side.given))
        stream = np.concatenate(shares) if root == EVERYBODY else shares[ranks.index(root)]
        counted.calls.append(Call(ranks, share, None if root == EVERYBODY else root))
        for rank, side, own in zip(ranks, sides, given):
            assert side.nbytes == stream.size and side.gives == (share if root == EVERYBODY else 0)
            assert root == EVERYBODY or bool(side.given) == (rank == root), "one reads, and all have the stream"
            for item in side.items:
                part = stream[item.part.offset :][: item.part.nbytes]
                self._land(rank, item, self._cut(item, part))
            counted.hold(f"give {slots[rank]}", rank, side.gives)
            counted.hold(f"gather {slots[rank]}", rank, side.nbytes)
            for peer in ranks:
                if peer != rank:
                    self._moved(rank, peer, own)
            counted.messages[rank] += len(ranks) - 1 if root in (EVERYBODY, rank) else 0
            counted.collectives[rank] += 1
