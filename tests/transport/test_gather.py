"""Payloads that are too much for a hub are gathered by the backend."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.errors import PeerError
from ms_ckpt_ext.transport.base import Bytes
from ms_ckpt_ext.transport.gather import front_width, gather
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.counting import counted

CASES = {
    "all empty": [b""] * 3,
    "all equal": [b"abc"] * 4,
    "alike": [b"%d" % n * 7 for n in range(8)],
    "one is long": [b"", b"x", b"y" * 300_000, b"z"],
    "two are long and equal": [b"y" * 300_000, b"", b"y" * 300_000, b"z"],
    "zeros at the end": [b"a\0\0", b"a\0", b"a", b""],
    "alone": [b"what"],
}


@pytest.mark.parametrize("payloads", CASES.values(), ids=CASES)
def test_everybody_gets_everything(payloads: list[bytes]) -> None:
    assert LocalWorld(len(payloads)).run(lambda t: gather(t, payloads[t.rank], lambda b: b)) == [payloads] * len(
        payloads
    )


def test_a_payload_goes_around_once_however_many_have_it() -> None:
    def sent(t: LocalTransport) -> int:
        counts = counted(t)
        gather(t, b"same" * 250_000, lambda b: b)
        return counts.sent

    assert 0 < sum(LocalWorld(8).run(sent)) < 8 * 1_001_000


@pytest.mark.parametrize("length", [1, 1000, 10**7])
def test_lengths_that_are_alike_take_one_call_and_one_that_is_not_its_own(length: int) -> None:
    assert front_width([length] * 100) == length
    assert front_width([length] * 99 + [length - 1]) == length
    assert front_width([0] * 99 + [10**8]) == 0


class Full(LocalTransport):
    """Has no memory for more than a few bytes."""

    def allocate(self, nbytes: int) -> Bytes:
        """Fails when it is much."""
        if nbytes > 100_000:
            raise MemoryError(f"no {nbytes} bytes")
        return super().allocate(nbytes)


@pytest.mark.parametrize("payloads", [[b"%d" % n * 50_000 for n in range(4)], [b"", b"x" * 200_000, b"", b""]])
def test_a_rank_without_memory_tells_the_others_before_they_wait_for_it(payloads: list[bytes]) -> None:
    world = LocalWorld(4)

    def work(t: LocalTransport) -> str:
        mine, counts = Full(world, 2) if t.rank == 2 else t, counted(t)
        with pytest.raises(MemoryError if t.rank == 2 else PeerError, match="no [0-9]+ bytes"):
            gather(mine, payloads[t.rank], lambda b: b)
        assert counts.collectives["all_gather"] == (0 if t.rank == 2 else 1), "only notes were gathered"
        return "told"

    assert world.run(work) == ["told"] * 4
