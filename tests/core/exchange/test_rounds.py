"""Which parts travel together, beside a model that takes one part at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Optional

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY, Chunks, chunks_of
from ms_ckpt_ext.core.exchange.demand import ExchangeLimits, Ways
from ms_ckpt_ext.core.exchange.rounds import Shares, classes_of, rounds_of, shares_of
from tests.core.exchange.test_chunks import ALONE, Part, apart, parts_of


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        (Shares(1, 1, 2), Shares(225, 225, 350)),  # the least of each is 100, and 500 are shared out
        (Shares(0, 0, 0), Shares(100, 100, 100)),
        (Shares(1, 0, 0), Shares(600, 100, 100)),
        (Shares(0, 0, 1), Shares(100, 100, 600)),
        (Shares(1, 1, 1), Shares(266, 266, 266)),
    ],
)
def test_a_bucket_is_shared_out_as_the_whole_load_needs_it(totals: Shares, expected: Shares) -> None:
    assert shares_of(totals, ExchangeLimits(800)) == expected


@pytest.mark.parametrize("totals", [Shares(1, 2, 3), Shares(0, 0, 3)])
def test_a_bucket_of_three_blocks_has_nothing_to_share_out(totals: Shares) -> None:
    assert shares_of(totals, ExchangeLimits(40)) == Shares(16, 16, 16)


WORLD = 5


class Model:
    """Rounds by what `core.exchange.rounds` says of them, a part at a time."""

    def __init__(self, chunks: Chunks, ways: Ways, world: int = WORLD) -> None:
        parts, rows = chunks.parts, chunks.parts.rows
        members = parts.sets.members
        self.carries = 2 if ways.tiered else 1
        kind = [tuple(number for number, ranks in enumerate(members) if rank in ranks) for rank in range(world)]
        alike = Counter(kind)
        self.queues: dict[int, list[int]] = {}
        self.workers: dict[int, tuple[int, ...]] = {rank: (rank,) for rank in range(world)}
        self.workers.update(
            (world + n, members[each.ranks] if each.root == EVERYBODY else (each.root,))
            for n, each in enumerate(chunks.groups)
        )
        self.read, self.sent, self.gets, self.wanted = [], [], [], Counter[tuple[int, ...]]()
        kept = Counter[int]()  # what a reader sends to itself
        bounds = chunks.start.tolist()
        owner = [
            (chunk, at == low) for chunk, (low, high) in enumerate(zip(bounds, bounds[1:])) for at in range(low, high)
        ]
        for (chunk, first), row in zip(owner, parts.row.tolist()):
            reader, nbytes = int(chunks.reader[chunk]), int(rows.nbytes[row])
            some = [(members[rows.ranks[n]], int(rows.moved[n])) for n in range(rows.start[row], rows.start[row + 1])]
            gets = Counter[tuple[int, ...]]()
            for ranks, moved in some:
                for each in {kind[rank] for rank in ranks}:
                    gets[each] += moved
            self.wanted.update(gets)
            own = sum(moved for ranks, moved in some if reader in ranks)
            copies = sum(moved * self.copies(ranks, ways) for ranks, moved in some)
            group = reader >= world
            if not group:
                kept[reader] += own
                if alike[kind[reader]] == 1:
                    gets.pop(kind[reader], None)
            self.read.append(nbytes if group else int(chunks.nbytes[chunk]) * first)
            self.sent.append(nbytes if group else copies - own)
            self.gets.append(gets)
        order = sorted(range(len(bounds) - 1), key=lambda n: (min(parts.demand[bounds[n] : bounds[n + 1]]), n))
        for chunk in order:
            self.queues.setdefault(int(chunks.reader[chunk]), []).extend(range(*bounds[chunk : chunk + 2]))
        self.room_of = kind
        self.kept = kept

    @staticmethod
    def copies(ranks: tuple[int, ...], ways: Ways) -> int:
        """Ranks that a reader sends to at most."""
        if not ways.tiered:
            return len(ranks)
        teams = Counter(ways.servers[rank] for rank in ranks)
        return len(teams) - 1 + max(teams.values())

    def shares(self, limits: ExchangeLimits) -> Shares:
        """What a rank may do in a round."""
        reads, sent = Counter[int](), Counter(self.kept)
        for reader, queue in self.queues.items():
            for total, column in ((reads, self.read), (sent, self.sent)):
                total.update(self.work(reader, sum(column[part] for part in queue)))
        most = (max(column.values(), default=0) for column in (reads, sent, self.wanted))
        return shares_of(Shares(*most)._replace(received=max(self.wanted.values(), default=0) * self.carries), limits)

    def work(self, reader: int, nbytes: int) -> dict[int, int]:
        """What every rank does of what a reader reads or sends."""
        return dict.fromkeys(self.workers[reader], -(-nbytes // len(self.workers[reader])))

    def rounds(self, limits: ExchangeLimits) -> list[int]:
        """The round of every part."""
        shares, found, number = self.shares(limits), [-1] * len(self.read), 0
        left = {reader: list(queue) for reader, queue in sorted(self.queues.items())}
        while any(left.values()):
            ranks = [rank for rank in self.workers if self.workers[rank] == (rank,)]
            sent, read = (dict.fromkeys(ranks, share) for share in (shares.sent, shares.read))
            room = dict.fromkeys(self.room_of, shares.received // self.carries)
            active, empty = [reader for reader in left if left[reader]], True
            while active:
                offers = {reader: left[reader][0] for reader in active}
                rooms = read, sent, room
                needs = {
                    r: (self.work(r, self.read[n]), self.work(r, self.sent[n]), self.gets[n]) for r, n in offers.items()
                }
                fit = [r for r in offers if all(map(_fits, needs[r], rooms))]
                offered = Counter[int](), Counter[int](), Counter[tuple[int, ...]]()
                taken = []
                for reader in fit:
                    for so_far, need in zip(offered, needs[reader]):
                        so_far.update(need)
                    if all(
                        _fits({each: so_far[each] for each in need}, room)
                        for so_far, need, room in zip(offered, needs[reader], rooms)
                    ):
                        taken.append(reader)
                for reader in taken or active[:1] * empty:
                    found[left[reader].pop(0)] = number
                    for room, need in zip(rooms, needs[reader]):
                        for each, nbytes in need.items():
                            room[each] -= nbytes
                active, empty = [reader for reader in fit if left[reader]], False
            number += 1
        return found


def _fits(need: Mapping[Any, int], room: Mapping[Any, int]) -> bool:
    return all(nbytes <= room[each] for each, nbytes in need.items())


RANKS = st.sets(st.integers(0, WORLD - 1), min_size=1, max_size=WORLD).map(lambda ranks: tuple(sorted(ranks)))


@st.composite
def laid(draw: st.DrawFn) -> list[Part]:
    """Some dozens of parts of up to three files; a few that several want some of, or one rank in two boxes."""
    found = []
    wishes = draw(st.lists(st.lists(RANKS, min_size=1, max_size=3), min_size=1, max_size=4))
    for file in range(draw(st.integers(1, 3))):
        at = 0
        for _ in range(draw(st.integers(0, 12))):
            nbytes, (first, *rest) = draw(st.sampled_from([10, 20, 60, 300])), draw(st.sampled_from(wishes))
            others = tuple((ranks, max(1, nbytes // draw(st.integers(1, 3)))) for ranks in rest)
            moved = None if draw(st.booleans()) else max(1, nbytes // 2)
            found.append(Part(file, at, nbytes, first, others, moved, draw(st.integers(0, 2))))
            at += nbytes + draw(st.sampled_from([0, 5]))
    return found


@given(
    laid(),
    st.sampled_from([200, 1000, 1600]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.lists(RANKS, min_size=3, max_size=3),
)
@example([Part(0, 0, 300, (0, 1)), Part(0, 300, 10, (0, 1), moved=5)], 1600, False, True, False, None)
@example([Part(0, 10 * n, 10, (0, 1, 2, 3, 4)) for n in range(40)], 512, True, False, False, None)
@example([Part(0, 97 * n, 97, (0, 1, 2, 3, 4)) for n in range(9)], 512, True, False, False, None)
@settings(max_examples=60, deadline=None)
def test_rounds_are_those_of_one_part_at_a_time(
    parts: list[Part], bucket: int, fed: bool, tiered: bool, few: bool, seen: Optional[list[tuple[int, ...]]]
) -> None:
    limits = ExchangeLimits(bucket, 64)
    ways = Ways(gather=fed, groups=fed, broadcast=True, servers=(0, 0, 1, 1, 0), tiered=tiered)
    sees = None if seen is None else {file: frozenset(ranks) for file, ranks in enumerate(seen)}
    chunks = chunks_of(parts_of(parts[:4] if few else parts), WORLD, limits, sees, ways)
    found = rounds_of(chunks, classes_of(chunks, WORLD), limits, ways).tolist()
    assert found == Model(chunks, ways).rounds(limits)


@given(laid())
@settings(max_examples=50, deadline=None)
def test_a_class_gets_of_every_row_what_each_of_its_ranks_gets(parts: list[Part]) -> None:
    chunks = chunks_of(parts_of(parts), WORLD, ExchangeLimits(), None, ALONE)
    classes, rows, members = classes_of(chunks, WORLD), chunks.parts.rows, chunks.parts.sets.members
    assert Counter(classes.of_rank.tolist()) == dict(enumerate(classes.size.tolist()))
    assert len(classes.start) == len(parts) + 1
    for row in range(len(parts)):
        gets = Counter[int]()
        for entry in range(*classes.start[row : row + 2]):
            gets[int(classes.gets[entry])] += int(classes.nbytes[entry])
        for rank in range(WORLD):
            wanted = [n for n in range(*rows.start[row : row + 2]) if rank in members[rows.ranks[n]]]
            assert gets[int(classes.of_rank[rank])] == sum(rows.moved[wanted])


def many(*wanted: tuple[int, tuple[int, ...]]) -> list[Part]:
    """So many parts of 10 bytes each, no neighbours, that some ranks want."""
    return apart(*((10, ranks) for count, ranks in wanted for _ in range(count)))


FLAT, TIERED = ALONE, Ways(gather=False, servers=(0, 0, 0, 1, 1), tiered=True)
FED = Ways(broadcast=True)
ALL = (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("parts", "ways", "seeing", "rounds"),
    [
        # of 800 bytes rank 0 may read 225 a round and send 412: 40 of each of the first parts, none of the others
        (many((20, (1, 2, 3, 4)), (20, (0,))), FLAT, (0,), [10, 22, 8]),
        # rank 0 may send 457 a round, and keeps one copy of five: 40 of each
        (many((20, ALL)), FLAT, (0,), [11, 9]),
        # a rank may receive 155 a round, and each is sent 200
        (many((20, (1,)), (20, (2,)), (20, (3,)), (20, (4,))), FLAT, (0,), [15, 20, 20, 20, 5]),
        # rank 0 may send 350 a round: one part to two ranks, and once to the other server
        (many((20, (1, 2, 3, 4))), TIERED, (0,), [11, 9]),
        # of 266 a round a rank may receive half; as much it may send on
        (many((20, (1,)), (20, (2,))), TIERED, (0,), [13, 20, 7]),
        # all gather: each may receive 457 a round, and reads and gives a fifth of all
        (many((80, ALL)), FED, ALL, [45, 35]),
        # rank 0 reads, and broadcasts what it may read in a round: 266
        (many((40, ALL)), FED, (0,), [26, 14]),
    ],
)
def test_a_round_ends_when_one_share_is_full(
    parts: list[Part], ways: Ways, seeing: tuple[int, ...], rounds: list[int]
) -> None:
    limits = ExchangeLimits(800, 4096)
    chunks = chunks_of(parts_of(parts), WORLD, limits, {0: frozenset(seeing)}, ways)
    found = rounds_of(chunks, classes_of(chunks, WORLD), limits, ways).tolist()
    assert found == Model(chunks, ways).rounds(limits)
    assert found == [number for number, count in enumerate(rounds) for _ in range(count)]


@pytest.mark.parametrize("rank", range(WORLD))
def test_what_a_rank_gathers_and_what_it_is_sent_fill_one_share(rank: int) -> None:
    """Ranks that want something of their own each; one of them is sent much beside what all gather."""
    parts = many((80, ALL), *((1, (one,)) for one in ALL))
    parts += [part._replace(file=1) for part in many((40, (rank,)))]
    sees = {0: frozenset(ALL), 1: frozenset({(rank + 1) % WORLD})}
    limits = ExchangeLimits(800, 4096)
    chunks = chunks_of(parts_of(parts), WORLD, limits, sees, FED)
    assert rounds_of(chunks, classes_of(chunks, WORLD), limits, FED).tolist() == Model(chunks, FED).rounds(limits)


def test_parts_of_two_lengths_that_come_to_one_rank_in_a_turn() -> None:
    """Of 800 bytes 300 are for receiving: seven turns of 40, and then one more of 10 twice."""
    lengths = {0: 10, 1: 30}
    parts = [Part(reader, 2 * n * each, each, (4,)) for reader, each in lengths.items() for n in range(20)]
    sees = {reader: frozenset({reader}) for reader in lengths}
    limits = ExchangeLimits(800, 4096)
    chunks = chunks_of(parts_of(parts), WORLD, limits, sees, FLAT)
    found = rounds_of(chunks, classes_of(chunks, WORLD), limits, FLAT).tolist()
    assert found == Model(chunks, FLAT).rounds(limits)
    assert [found[20 * reader :].index(1) for reader in lengths] == [9, 7]


def test_of_what_lies_in_memory_nothing_is_read_so_there_is_more_room_to_send() -> None:
    """Of 800 bytes 350 are for sending, and as many for receiving."""
    parts = parts_of([Part(0, 20 * n, 10, (1,)) for n in range(70)], holders=[(0,)])
    limits = ExchangeLimits(800, 4096)
    chunks = chunks_of(parts, 2, limits, None, ALONE)
    assert rounds_of(chunks, classes_of(chunks, 2), limits, ALONE).tolist() == [0] * 35 + [1] * 35


def test_a_part_with_two_boxes_for_one_rank_waits_until_there_is_room_for_both() -> None:
    """77 bytes are left of what rank 1 may receive in the first round: room for each of its boxes, not for both."""
    parts = [Part(file, 1000 * n, 120, (1,), (((1,), 60),), 60) for file in (0, 2) for n in range(4)]
    limits = ExchangeLimits(1000, 4096)
    chunks = chunks_of(parts_of(parts), 3, limits, {0: frozenset({0}), 2: frozenset({2})}, ALONE)
    assert rounds_of(chunks, classes_of(chunks, 3), limits, ALONE).tolist() == [0, 0, 1, 1, 0, 1, 2, 2]


def test_what_a_rank_keeps_takes_no_room() -> None:
    """Rank 0 reads as much of what it wants as either of two others sends it."""
    sees = {0: frozenset({1}), 1: frozenset({2}), 2: frozenset({0}), 3: frozenset({1}), 4: frozenset({2})}
    parts = [Part(0, 0, 10, (1,)), Part(1, 0, 10, (2,))]
    parts += [Part(file, 1000 * n, 10, (0,)) for file in (2, 3, 4) for n in range(20)]
    limits = ExchangeLimits(320, 4096)
    chunks = chunks_of(parts_of(parts), 3, limits, sees, ALONE)
    found = rounds_of(chunks, classes_of(chunks, 3), limits, ALONE).tolist()
    assert found == Model(chunks, ALONE, 3).rounds(limits)
    assert max(found) == 2


def test_what_fits_exactly_travels() -> None:
    """Of 320 bytes a rank may receive 140 a round, and two others send it 70 each, then 80."""
    parts = [Part(file, 1000 * n, nbytes, (1,)) for file in (0, 2) for n, nbytes in enumerate((70, 80))]
    limits = ExchangeLimits(320, 4096)
    chunks = chunks_of(parts_of(parts), 3, limits, {0: frozenset({0}), 2: frozenset({2})}, ALONE)
    assert rounds_of(chunks, classes_of(chunks, 3), limits, ALONE).tolist() == [0, 1, 0, 2]


def test_three_parts_that_fill_all_shares_exactly_are_a_round() -> None:
    """Of 792 bytes 264 each are for reading, sending and receiving."""
    limits = ExchangeLimits(792, 4096)
    chunks = chunks_of(parts_of(apart(*[(88, (1,))] * 6)), 2, limits, {0: frozenset({0})}, ALONE)
    assert rounds_of(chunks, classes_of(chunks, 2), limits, ALONE).tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("parts", "rounds"),
    [
        # a reader may read, send, and its receiver receive 266 bytes of 800 a round, where all are alike
        (apart(*[(133, (1,))] * 4), [0, 0, 1, 1]),
        (apart(*[(134, (1,))] * 4), [0, 1, 2, 3]),
        (apart(*[(400, (1,))] * 2), [0, 1]),  # too large for any
        (apart((400, (1,)), (10, (1,))), [0, 1]),
        (apart((10, (1,)), (400, (1,)), (10, (1,))), [0, 1, 2]),
        # of the parameters in their order; of one of them first what is needed before the rest
        ([part._replace(demand=1 - n // 2) for n, part in enumerate(apart(*[(133, (1,))] * 4))], [1, 1, 0, 0]),
        ([part._replace(early=n > 1) for n, part in enumerate(apart(*[(133, (1,))] * 4))], [1, 1, 0, 0]),
        (
            [part._replace(early=n == 3, demand=n // 3) for n, part in enumerate(apart(*[(133, (1,))] * 4))],
            [0, 0, 1, 1],
        ),
    ],
)
def test_rounds_of_one_reader(parts: list[Part], rounds: list[int]) -> None:
    limits = ExchangeLimits(800, 4096)
    chunks = chunks_of(parts_of(parts), 2, limits, {0: frozenset({0})}, ALONE)
    assert rounds_of(chunks, classes_of(chunks, 2), limits, ALONE).tolist() == rounds
