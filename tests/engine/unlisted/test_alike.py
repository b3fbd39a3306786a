"""What lies outside the strategy is compared: differences are found, equal copies pass, and little is read."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.pieces import locate
from ms_ckpt_ext.engine.source.sharded import of_rank, side_by_side
from ms_ckpt_ext.engine.unlisted.alike import SAMPLE, SAMPLES, SMALL, compared, recorded, samples
from ms_ckpt_ext.engine.unlisted.whole_slices import Alone
from tests.support.outside import Source, listed, slices, source
from tests.support.strategies import layouts

RNG = np.random.default_rng(5)
LARGE = RNG.standard_normal((512, 96), np.float32)  # 192 KiB: more than the samples see
SMALLER = RNG.standard_normal((64, 96), np.float32)  # 24 KiB: the samples see all of it
STEP = np.array([7], np.int32)


def changed(array: np.ndarray, at: int) -> np.ndarray:
    other = array.copy()
    other.reshape(-1)[at] += 1
    return other


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (STEP, "extras"),
        (np.array(3.5, np.float32), "extras"),
        (np.zeros((0, 4), np.float32), "extras"),
        (np.array([True, False]), "extras"),
        (SMALLER, "extras"),
        (LARGE, "extras"),
        (lambda rank: STEP + rank, "own"),
        (lambda rank: np.array(rank == 3), "own"),  # 0-d, and only the last rank differs
        (lambda rank: np.array([0, rank // 3], np.uint8), "own"),
        (lambda rank: changed(SMALLER, 900) if rank % 2 else SMALLER, "own"),
        (lambda rank: changed(LARGE, 0) if rank % 2 else LARGE, "own"),
        (lambda rank: changed(LARGE, LARGE.size - 1) if rank % 2 else LARGE, "own"),
        (lambda rank: changed(LARGE, 2000) if rank % 2 else LARGE, "own"),  # between two samples
        (lambda rank: LARGE[rank // 2 :: 2], "own"),  # along the other half of a (2, 2) that nobody lists
        (lambda rank: LARGE[: 4 + rank], "own"),
        (lambda rank: LARGE.astype(np.float16 if rank else np.float32), "own"),
        (lambda rank: LARGE if rank == 2 else None, "extras"),  # one holder
        (lambda rank: LARGE if rank > 1 else None, "extras"),
    ],
)
def test_alike_or_own(content, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    held = source(tmp_path / "s", listed(4), {"x": content, "global_step": STEP}).catalog()
    found = compared(held)
    assert found.extras.keys() >= {"global_step"} and not found.unproven
    assert [name for name in ("extras", "own") if "x" in getattr(found, name)] == [kind]


def test_headers_alone_tell_shapes_and_dtypes(tmp_path: Path) -> None:
    kinds = {
        "x": lambda rank: LARGE[: 4 + rank % 2],
        "y": lambda rank: STEP.astype(np.int64 if rank == 3 else np.int32),
    }
    held = source(tmp_path / "s", listed(4), {**kinds, "z": LARGE}).catalog()
    assert (set(held.own), set(held.unproven), set(held.extras)) == ({"x", "y"}, {"z"}, set())
    assert held.own["x"].differences() == "F32[4, 96] on ranks 0, 2, F32[5, 96] on ranks 1, 3"
    assert held.own["y"].differences() == "I32[1] on ranks 0, 1, 2, I64[1] on rank 3"


def test_only_what_is_asked_for_is_compared(tmp_path: Path) -> None:
    held = source(tmp_path / "s", listed(2), {"x": LARGE, "y": lambda rank: STEP + rank, "z": STEP}).catalog()
    look = Alone(held)
    found = compared(held, ["z", "y", "unheard of"], look)
    assert (set(found.unproven), set(found.own), set(found.extras)) == ({"x"}, {"y"}, {"z"})
    assert look.count.nbytes == 4 * STEP.nbytes


def test_where_it_differs_is_told(tmp_path: Path) -> None:
    held = source(
        tmp_path / "s", listed(4), {"x": lambda r: changed(LARGE, LARGE.size - 1) if r % 2 else LARGE}
    ).catalog()
    one, two = compared(held).own["x"].groups
    assert (one.ranks, two.ranks) == ((0, 2), (1,))
    start, length = samples(LARGE.nbytes)[-1]
    assert one.holds.endswith(f"in bytes {start} to {start + length}") and one.holds != two.holds
    assert start + length == LARGE.nbytes and length < SAMPLE + 16


def test_stages_are_compared_by_their_first_holders(tmp_path: Path) -> None:
    held = source(tmp_path / "s", listed(2, stages=2), {"x": lambda rank: changed(LARGE, 2000) if rank > 1 else LARGE})
    assert [group.ranks for group in compared(held.catalog()).own["x"].groups] == [(0, 1), (2, 3)]


@pytest.mark.parametrize("ranks", [8, 64])
def test_bytes_do_not_grow_with_ranks(ranks: int, tmp_path: Path) -> None:
    held = source(tmp_path / "s", listed(ranks, matrices=[(2, ranks // 2)]), {"x": LARGE, "s": SMALLER, "n": STEP})
    catalog = held.catalog()
    look = Alone(catalog)
    assert set(compared(catalog, None, look, partial(recorded, catalog)).extras) == {"x", "s", "n"}
    axes, divisors = 2, ranks.bit_length() - 1  # strides 1, 2, 4, …; two of them are listed
    looked_at = 1 + divisors
    sampled = sum(length for _, length in samples(LARGE.nbytes))
    expected = (1 + axes) * LARGE.nbytes + looked_at * (sampled + SMALLER.nbytes) + ranks * STEP.nbytes
    assert look.count.nbytes == expected
    assert STEP.nbytes <= SMALL < SMALLER.nbytes <= SAMPLES * SAMPLE < LARGE.nbytes


def record(held: Source) -> None:
    """Digests of every rank's file on record, as a recorder leaves them."""
    from ms_ckpt_ext.engine.integrity.digests import digest_file
    from ms_ckpt_ext.engine.integrity.manifest import update_manifest
    from ms_ckpt_ext.formats.registry import read_index

    files = {f"rank_{rank}/net.safetensors": digest_file(read_index(str(held.file(rank)))) for rank in held.held}
    update_manifest(str(held.shards), files)


def test_digests_on_record_tell_of_all_ranks_for_nothing(tmp_path: Path) -> None:
    held = source(tmp_path / "s", listed(4), {"x": lambda r: changed(LARGE, 1) if r == 3 else LARGE, "y": LARGE})
    record(held)
    catalog = held.catalog()
    look = Alone(catalog)
    found = compared(catalog, None, look, partial(recorded, catalog))
    assert look.count.nbytes == 0 and set(found.extras) == {"y"}
    assert [group.ranks for group in found.own["x"].groups] == [(0, 1, 2), (3,)]


@pytest.mark.parametrize("spoilt", ["newer", "size", "one lacks it", "not a manifest"])
def test_digests_that_may_not_be_of_these_files_count_for_nothing(spoilt: str, tmp_path: Path) -> None:
    held = source(tmp_path / "s", listed(2), {"x": LARGE})
    record(held)
    path = held.shards / "ms_ckpt_ext.digests.json"
    if spoilt == "newer":  # saved again over the old file, by a program that knows nothing of manifests
        other = source(tmp_path / "o", listed(2), {"x": lambda rank: changed(LARGE, 1) if rank else LARGE})
        held.file(1).write_bytes(other.file(1).read_bytes())
        status = path.stat()
        os.utime(held.file(1), ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif spoilt == "not a manifest":
        path.write_text("{}")
    else:
        content = json.loads(path.read_text())
        if spoilt == "size":
            content["files"]["rank_0/net.safetensors"]["size"] += 1
        else:
            del content["files"]["rank_1/net.safetensors"]["tensors"]["x"]
        path.write_text(json.dumps(content))
    catalog = held.catalog()
    look = Alone(catalog)
    assert ("x" in compared(catalog, None, look, partial(recorded, catalog)).own) == (spoilt == "newer")
    assert look.count.nbytes


def test_each_rank_has_its_own_whole_and_side_by_side(tmp_path: Path) -> None:
    contents = {"x": lambda rank: LARGE[rank : rank + 4 + rank % 2], "n": lambda rank: np.array(rank, np.int64)}
    held = source(tmp_path / "s", listed(4), contents)
    catalog = compared(held.catalog())
    for name, each in catalog.own.items():
        for rank in range(4):
            mine = of_rank(each, catalog.files, rank)
            assert mine.meta.shape == held.held[rank][name].shape
            (piece,) = locate(mine, Region.whole(mine.meta.shape))
            assert piece.files == (rank,) and piece.stored_name == name
    both = list(side_by_side(catalog.own["x"], catalog.files, 4))
    assert [(tensor.meta.shape, ranks) for tensor, ranks in both] == [((16, 96), (0, 2)), ((20, 96), (1, 3))]
    ((numbers, ranks),) = side_by_side(catalog.own["n"], catalog.files, 4)
    assert numbers.meta.shape == (4,) and ranks == (0, 1, 2, 3)
    assert [sourced.files for sourced in locate(numbers, Region((1,), (3,)))] == [(1,), (2,)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=layouts(2, 16), data=st.data())
def test_a_cut_that_no_strategy_lists_is_found(hidden: Layout, data: st.DataObject, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    matrices = data.draw(st.lists(st.permutations(hidden.dev_matrix).map(tuple), min_size=1, max_size=2))
    full = np.arange(np.prod(hidden.parts) * 2, dtype=np.int32).reshape(
        [extent * 2 if n else extent for n, extent in enumerate(hidden.parts)]
    )
    root = tmp_path_factory.mktemp("hidden")
    strategy = listed(
        hidden.devices, matrices=[matrix for matrix in matrices if 48 % matrix[0] == 0] or [(hidden.devices,)]
    )
    held = source(root / "s", strategy, {"x": slices(hidden, full, hidden.devices)}).catalog()
    found = compared(held)
    cut = len(set(hidden.cells)) > 1
    assert ("x" in found.own) == cut and ("x" in found.extras) == (not cut)
