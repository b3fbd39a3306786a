"""How long loads take by the model, worked out by hand."""

from __future__ import annotations

import math

import pytest

from ms_ckpt_ext.core.exchange.cost import Hardware, Traffic, cooperates, cooperative_seconds, direct_seconds

LOCAL = Hardware(storage=100.0, shared=False, ranks_per_host=2, link=10.0, latency=0.5)
SHARED = LOCAL._replace(shared=True)
READ = (100, 300, 50, 0, 200)
"""Of ranks on three hosts: 400, 50 and 200 bytes."""


def test_a_machine_of_which_little_is_known() -> None:
    """It has no limits, and nothing takes time beside what is said."""
    assert (
        LOCAL._replace(
            host=math.inf, between=0, upload=math.inf, reader=math.inf, per_rank=0, counts=0, memory=0, call=0
        )
        == LOCAL
    )
    assert Traffic((1,), (2,), 3) == ((1,), (2,), 3, 0, (), (), ())


@pytest.mark.parametrize(
    ("hardware", "seconds"),
    [
        (LOCAL, 4.0),  # the busiest host
        (LOCAL._replace(reader=60.0), 5.0),  # the busiest rank
        (LOCAL._replace(reader=300.0), 4.0),
        (LOCAL._replace(upload=50.0), 6.0),
        (LOCAL._replace(upload=150.0), 4.0),
        (LOCAL._replace(ranks_per_host=5), 6.5),
        (LOCAL._replace(ranks_per_host=1), 3.0),
        (SHARED, 6.5),  # all together
        (SHARED._replace(host=40.0), 10.0),
        (SHARED._replace(host=80.0), 6.5),
        (SHARED._replace(reader=30.0), 10.0),
    ],
)
def test_every_rank_reads_its_own(hardware: Hardware, seconds: float) -> None:
    assert math.isclose(direct_seconds(READ, hardware), seconds)
    assert direct_seconds((), hardware._replace(upload=1.0, reader=1.0)) == 0


@pytest.mark.parametrize(
    ("hardware", "traffic", "seconds"),
    [
        (LOCAL, Traffic((40, 10), (0, 0), 1), 0.5 + 0.5),
        (LOCAL, Traffic((40, 10), (30, 20), 1), 3.0 + 0.5),
        (LOCAL, Traffic((40, 10), (30, 20), 3), 3.0 + 1.5),
        (LOCAL, Traffic((40, 10), (30, 20), 3, calls=4), 3.0 + 2.0),
        (LOCAL._replace(upload=8.0), Traffic((40, 10), (30, 20), 1), 5.0 + 0.5),
        (LOCAL._replace(per_rank=0.25), Traffic((40, 10), (30, 20), 1), 3.0 + 0.5 + 2 * 0.25),
        (LOCAL._replace(counts=5.0), Traffic((40, 10), (30, 20), 1), 3.0 + 0.5 + 5.0 * 4 / 10),
        (LOCAL._replace(counts=5.0, between=2.0), Traffic((40, 10), (30, 20), 1), 3.0 + 0.5 + 5.0 * 4 / 2),
        # sent: near and far bytes of the same rank one after another, by links of different speed
        (LOCAL._replace(between=2.0), Traffic((40,), (0,), 1, 0, (50, 10), (0, 20)), 11.0 + 0.5),
        (LOCAL, Traffic((40,), (0,), 1, 0, (50, 10), (0, 20)), 5.0 + 0.5),
        # what arrives on a server comes over the links of all its ranks
        (LOCAL._replace(between=2.0), Traffic((40,), (0,), 1, crossing=(8, 80)), 20.0 + 0.5),
        (LOCAL._replace(counts=5.0), Traffic((40, 10, 0), (30, 20, 0), 1), 3.0 + 0.5 + 5.0 * 9 / 10),
        (LOCAL._replace(upload=8.0), Traffic((), (), 0), 0.0),
    ],
)
def test_ranks_exchange(hardware: Hardware, traffic: Traffic, seconds: float) -> None:
    """Reading, uploading and exchanging overlap: the longest counts, and a latency a collective."""
    assert math.isclose(cooperative_seconds(traffic, hardware), seconds)


def test_the_cheaper_way_is_chosen() -> None:
    assert cooperates((400, 400), Traffic((50, 50), (30, 30), 1), LOCAL)  # 8 s against 3.5 s
    assert not cooperates((400, 400), Traffic((50, 50), (90, 90), 1), LOCAL)  # 9.5 s
    assert not cooperates((400, 400), Traffic((50, 50), (0, 0), 1), LOCAL), "nothing to exchange"
    assert not cooperates((200, 200), Traffic((50, 50), (35, 35), 1), LOCAL), "as long: the simpler way"
