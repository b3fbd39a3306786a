"""Digests of what passes through a sink, in whatever order and from whatever thread it comes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.storage.digest_sink import DigestingSink, streams_of
from ms_ckpt_ext.storage.sink import FileSink

# "b" lies in two stretches, as a long tensor of a .ckpt does; 60..63 are framing.
TENSORS = {
    "a": (Extent(0, 20),),
    "none": (Extent(20, 0),),
    "b": (Extent(20, 40), Extent(63, 100)),
    "c": (Extent(163, 37),),
}
SIZE = 200


def expected(data: bytes) -> dict[Optional[str], str]:
    held = {name: b"".join(data[o : o + n] for o, n in extents) for name, extents in TENSORS.items()}
    digests = {name: xxhash.xxh3_128_hexdigest(part) for name, part in held.items()}
    return {None: xxhash.xxh3_128_hexdigest(data[60:63]), **digests}


@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, SIZE - 1)), order=st.randoms(use_true_random=False))
def test_any_order(cuts: set[int], order: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = np.random.default_rng(len(cuts)).bytes(SIZE)
    bounds = [0, *sorted(cuts), SIZE]
    pieces = list(zip(bounds, bounds[1:]))
    order.shuffle(pieces)  # type: ignore[attr-defined]
    path = tmp_path_factory.mktemp("any") / "f"
    sink = DigestingSink(FileSink(str(path), SIZE), lambda: streams_of(TENSORS, SIZE))
    for low, high in pieces:
        sink.write(low, memoryview(data[low:high]))
    assert sink.digests() == expected(data)
    sink.finish()
    sink.close()
    assert path.read_bytes() == data


def test_many_threads(tmp_path: Path) -> None:
    """Pieces that come while another thread digests are not lost."""
    data, step = np.random.default_rng(1).bytes(8 << 20), 7001
    sink = DigestingSink(FileSink(str(tmp_path / "f"), len(data)), lambda: {"w": (Extent(0, len(data)),)})
    barrier = threading.Barrier(8)

    def work(first: int) -> None:
        barrier.wait()
        for low in range(first * step, len(data), 8 * step):
            sink.write(low, memoryview(data[low : low + step]))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sink.digests() == {"w": xxhash.xxh3_128_hexdigest(data)}
    sink.finish()
