"""Probes of stored tensors: the same answers alone and by ranks that share the reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from ms_ckpt_ext.engine.source.catalog import Catalog, files_catalog
from ms_ckpt_ext.engine.unlisted.dealt import Together
from ms_ckpt_ext.engine.unlisted.whole_slices import Alone, Probe, Seen
from ms_ckpt_ext.errors import CheckpointError, PeerError, StorageError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld

WIDE = np.tile(np.arange(4, dtype=np.float64), 1 << 16)
"""Two MiB, which no single element repeats."""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    ones = np.full(300_000, 1.5, np.float64)
    late = ones.copy()
    late[-1] = 2
    for number in range(3):
        save_file(
            {f"wide{number}": WIDE, f"ones{number}": ones, f"late{number}": late}, tmp_path / f"{number}.safetensors"
        )
    return files_catalog([str(tmp_path / f"{number}.safetensors") for number in range(3)])


def test_digests_and_constants(catalog: Catalog) -> None:
    look = Alone(catalog)
    found = look(
        [
            Probe(0, "wide0", 0, WIDE.nbytes),
            Probe(1, "wide1", 16, 48),
            Probe(0, "ones0", 0, 2_400_000),
            Probe(0, "late0", 0, 2_400_000),
            Probe(0, "late0", 0, 2_399_992),
            Probe(0, "wide0", 8 << 3, 8),
        ]
    )
    assert [seen.constant for seen in found] == [False, False, True, False, True, True]
    assert found[0].digest == xxhash.xxh3_128_hexdigest(WIDE.tobytes())
    assert found[1].digest == xxhash.xxh3_128_hexdigest(WIDE.tobytes()[16:64])
    assert look.count.nbytes == WIDE.nbytes + 48 + 2 * 2_400_000  # each byte once, however many want it


def together(catalog: Catalog, probes: list[Probe], sees: Any = None) -> tuple[list[list[Seen]], list[int]]:
    """Every rank's answers, and the bytes that each read."""

    def rank(transport: LocalTransport) -> tuple[list[Seen], int]:
        look = Together(transport, catalog, sees)
        return look(probes), look.count.nbytes

    told = LocalWorld(4, timeout=20.0).run(rank)
    return [seen for seen, _ in told], [nbytes for _, nbytes in told]


def test_ranks_share_the_reading(catalog: Catalog) -> None:
    """Small stretches of one file go to one rank, which opens it once; long ones are spread whatever their file."""
    probes = [Probe(number % 3, f"wide{number % 3}", 4096 * number, 4096) for number in range(6)]
    answers, read = together(catalog, probes)
    assert answers == [Alone(catalog)(probes)] * 4
    assert read == [2 * 4096, 2 * 4096, 2 * 4096, 0]
    probes = [Probe(0, "wide0", start, 1 << 20) for start in (0, 1 << 20)] * 2
    answers, read = together(catalog, probes)
    assert answers == [Alone(catalog)(probes)] * 4
    assert read == [1 << 20] * 4


def test_who_sees_a_file_reads_it(catalog: Catalog) -> None:
    probes = [Probe(number, f"wide{number}", 0, 4096) for number in range(3)]
    sees = {0: frozenset((3,)), 1: frozenset((1, 2)), 2: frozenset((2,))}
    answers, read = together(catalog, probes, sees)
    assert answers == [Alone(catalog)(probes)] * 4
    assert read == [0, 4096, 4096, 4096]


def test_an_error_is_everybodys(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "1.safetensors").unlink()
    world = LocalWorld(4, timeout=20.0)
    probes = [Probe(number, f"wide{number}", 0, 64) for number in range(3)]
    with pytest.raises(CheckpointError):
        world.run(lambda transport: Together(transport, catalog, None)(probes))
    assert sorted(world.errors) == [0, 1, 2, 3]
    assert {type(error) for rank, error in world.errors.items() if rank != 1} == {PeerError}
    assert isinstance(world.errors[1], StorageError)
