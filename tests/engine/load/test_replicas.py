"""Digests of slices, and their comparison between ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from ms_ckpt_ext.core.exchange.demand import Demand, Grid
from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.engine.load.replicas import Digest, Digester, SliceBytes, compare_replicas
from ms_ckpt_ext.errors import ChecksumError
from ms_ckpt_ext.transport.local import LocalWorld

TIED = Demand(
    "tied",
    stored_whole(TensorMeta("tied", BY_MINDSPORE["Float32"], (4, 2)), (0,)),
    (Grid((2, 1), {(0, 0): (0, 2), (1, 0): (1, 3)}), Grid((1, 1), {(0, 0): (4, 5)})),
)
"""Shared by two pipeline stages that cut it differently: halves on ranks 0 to 3, whole on 4 and 5."""


def compare(*digests: tuple[str, str]) -> None:
    LocalWorld(6, timeout=10.0).run(lambda each: compare_replicas(each, [TIED], {0: Digest(*digests[each.rank])}))


def test_regions_are_compared_in_their_dtype() -> None:
    """Other regions, other grids and other dtypes differ as they like."""
    compare(("F32", "a"), ("F32", "b"), ("F32", "a"), ("F32", "b"), ("F32", "c"), ("F32", "c"))
    compare(("F32", "a"), ("F32", "b"), ("BF16", "x"), ("BF16", "y"), ("F32", "c"), ("F16", "z"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (3, "'tied', region [2:4, 0:2]: rank 1 holds digest b, rank 3 odd"),
        (5, "'tied', region [0:4, 0:2]: rank 4 holds digest c, rank 5 odd"),
    ],
)
def test_an_odd_one_is_named(changed: int, says: str) -> None:
    digests = [("F32", value) for value in "ababcc"]
    digests[changed] = ("F32", "odd")
    with pytest.raises(ChecksumError) as error:
        compare(*digests)
    assert says in str(error.value)


def test_a_digest_is_that_of_all_pieces_and_few_copies_wait() -> None:
    made: list[int] = []
    gone: list[int] = []
    most = 0

    def copies() -> Iterator[np.ndarray]:
        nonlocal most
        for n in range(50):
            piece = np.full(1 << 16, n, np.uint8)
            made.append(n)
            most = max(most, len(made) - len(gone))
            weakref.finalize(piece, gone.append, n)
            yield piece
            del piece

    whole = np.repeat(np.arange(50, dtype=np.uint8), 1 << 16)
    with Digester() as digester:
        digester.add(7, SliceBytes("Float32", copies(), copied=True))
        digester.add(8, SliceBytes("Int8", iter((whole,))))
        digests = digester.wait()
    expected = xxhash.xxh3_128(whole.tobytes()).hexdigest()
    assert digests == {7: Digest("Float32", expected), 8: Digest("Int8", expected)}
    assert most <= 4
