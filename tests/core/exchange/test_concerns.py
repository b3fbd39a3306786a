"""A plan made of what concerns one rank, beside the whole plan: the same rounds, as far as that rank goes."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.demand import ExchangeLimits
from ms_ckpt_ext.core.exchange.one_rank import RankRound, rank_round
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, decide, plan_of
from ms_ckpt_ext.core.planning.pieces import TensorMeta
from tests.support.exchanges import DTYPE, Pair, all_ways, cuts, demands_for, source_of


def told(plan: ExchangePlan, turn: RankRound) -> Any:
    """A rank's side of a round, without the numbers that parts and chunks have in their plan."""

    def items(some: Any) -> list[Any]:
        return [
            (item.part._replace(chunk=0, deliveries=()), item.part.gathered, item.delivery, item.offset, item.nbytes)
            for item in some
        ]

    spread = turn.spread
    late = None if spread is None else (spread.outgoing, spread.send_counts, items(spread.incoming))
    gathers = [
        (g.ranks, g.share, g.root, [(plan.chunks[c.chunk], c.offset) for c in g.given], items(g.items))
        for g in turn.gathers
    ]
    sent, got = (items(turn.outgoing), turn.send_counts), (items(turn.incoming), turn.receive_counts)
    read = [plan.chunks[chunk] for chunk in turn.chunks]
    return sorted(map(repr, read)), items(turn.own), sent, got, gathers, late, turn.exchanges


@given(cuts(), st.lists(DTYPE, min_size=1, max_size=2), st.sampled_from([512, 1 << 16]), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_what_concerns_a_rank(case: Pair, dtypes: list[Any], bucket: int, in_memory: bool, data: st.DataObject) -> None:
    before, after, shape = case
    world = max(before.devices, after.devices)
    source = source_of(before, [TensorMeta(f"w{n}", dtype, shape) for n, dtype in enumerate(dtypes)])
    wanting = sorted(data.draw(st.sets(st.integers(0, after.devices - 1), min_size=1)))
    demands = demands_for(source.tensors, after, wanting)
    ways = data.draw(all_ways(world))
    if in_memory:
        ways = ways._replace(gather=False, groups=False, broadcast=False)
    table = decide(demands, world, source.stored, ExchangeLimits(bucket, 256), None, ways, in_memory)
    whole = plan_of(table)
    assert (
        table.digest()
        == decide(demands, world, source.stored, ExchangeLimits(bucket, 256), None, ways, in_memory).digest()
    )
    for rank in range(world):
        mine = plan_of(table, rank)
        assert len(mine.rounds) == len(whole.rounds)
        assert mine.bytes_received()[rank] == whole.bytes_received()[rank]
        for one, other in zip(mine.rounds, whole.rounds):
            assert told(mine, rank_round(mine, one, rank)) == told(whole, rank_round(whole, other, rank))
