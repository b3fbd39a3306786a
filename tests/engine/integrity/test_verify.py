"""`verify` on golden checkpoints: every layout against the truth, and every kind of damage found where it is."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import load, unified_safetensors, verify
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.integrity.compare import Comparison, DifferingElement, compare
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.folder import ManifestCheck
from ms_ckpt_ext.engine.integrity.manifest import update_manifest
from ms_ckpt_ext.engine.integrity.pairing import Mismatch, pair_up
from ms_ckpt_ext.engine.integrity.soundness import Gap, NotFinite, Unequal
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, UsageError
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import CASES, FULL, cut, scalars, source, strategy_of
from tests.support.verifying import checked, compared

KEY = b"0123456789ABCDEF"


@pytest.mark.parametrize("case", CASES)
def test_every_layout_equals_the_truth(case: str, golden: Path) -> None:
    found = compared(golden / case / "shards", golden / FULL[case], strategy=golden / case / "strategy.ckpt")
    truth = load_file_sizes(golden / FULL[case] / "model.safetensors")
    assert found == Comparison(len(truth), sum(truth.values()))
    assert found.ok


def load_file_sizes(path: Path) -> dict[str, int]:
    return {name: entry.nbytes for name, entry in read_index(str(path)).tensors.items()}


@pytest.mark.parametrize("form", ["ckpt", "ckpt_crc", "dedup", "safetensors"])
def test_formats_are_one_model(form: str, golden: Path) -> None:
    root = golden / "formats_dp2_tp4"
    strategy = root / "strategy.ckpt"
    assert compared(root / form, root / "safetensors", strategy=strategy, strategy_b=strategy).ok
    weights = compared(
        golden / "full", root / form, strategy_b=strategy, exclude=["*_step", "epoch_num", "*_num", "*sc*"]
    )
    assert weights.only_b == ("learning_rate",)
    assert not weights.differences


def test_an_encrypted_file_is_the_plain_one(golden: Path) -> None:
    """Ranks 0 and 1 are there in every cipher."""
    plain = next((golden / "formats_dp2_tp4" / "ckpt" / "rank_1").iterdir())
    for folder in ("ckpt_aes_gcm", "ckpt_aes_cbc", "ckpt_sm4_cbc"):
        sealed = next((golden / "formats_dp2_tp4" / folder / "rank_1").iterdir())
        assert compared(sealed, plain, dec_key=KEY).ok
        assert compared(plain, sealed, dec_key_b=KEY).ok


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A source under dp2 tp2, and its parameters with the scalars, whole."""
    root = source(tmp_path / "source")
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "merged")
    merged = {
        **load_file(tmp_path / "merged" / "part0.safetensors"),
        **load_file(tmp_path / "merged" / "hyper_param.safetensors"),
    }
    return root, {name: array.copy() for name, array in merged.items()}


def against(root: Path, arrays: Mapping[str, np.ndarray], tmp_path: Path, **options: Any) -> Comparison:
    other = tmp_path / "other.safetensors"
    save_file(dict(arrays), other)
    return compared(root / "shards", other, strategy=root / "strategy.ckpt", **options)


def test_differences_are_told_by_place_and_size(pair: Any, tmp_path: Path) -> None:
    root, arrays = pair
    b = arrays["b.w"]
    before = float(b[40, 3])
    b[40, 3] = np.nextafter(np.float32(before), np.float32(np.inf))
    b[63, 31] += 1
    b[2, 1] = np.nan
    found = against(root, arrays, tmp_path)
    (only,) = found.differences
    assert (only.name, only.count, only.total, only.nans) == ("b.w", 3, 64 * 32, 1)
    assert [place.at for place in only.first] == [(2, 1), (40, 3), (63, 31)]
    assert only.first[1] == DifferingElement((40, 3), str(np.float32(before)), str(b[40, 3]))
    assert only.max_abs == pytest.approx(1)
    assert only.max_ulp is not None
    assert only.max_ulp > 1
    assert not found.ok


def test_missing_extra_and_mismatched_parameters(pair: Any, tmp_path: Path) -> None:
    root, arrays = pair
    arrays["a.w"] = arrays["a.w"].astype(np.float16)
    arrays["c.w"] = arrays["c.w"].reshape(32, 64)
    del arrays["d.w"], arrays["global_step"]
    arrays["new"] = np.zeros(1, np.int8)
    found = against(root, arrays, tmp_path)
    assert found.mismatches == (
        Mismatch("a.w", "F32[64, 32]", "F16[64, 32]"),
        Mismatch("c.w", "F32[64, 32]", "F32[32, 64]"),
    )
    assert (found.only_a, found.only_b, found.differences) == (("d.w", "global_step"), ("new",), ())
    assert (found.parameters, found.nbytes) == (2, 64 * 32 * 4 + 4)


def test_names_and_filters(pair: Any, tmp_path: Path) -> None:
    root, arrays = pair
    arrays["x"] = arrays.pop("a.w")
    assert against(root, arrays, tmp_path, name_map={"x": "a.w"}).ok
    assert against(root, arrays, tmp_path, match="b.*").parameters == 1
    assert against(root, arrays, tmp_path, exclude=["a.w", "x"]).ok


def test_names_and_choices_are_those_of_the_job(pair: Any, tmp_path: Path) -> None:
    """What a merge left out, renamed and gave a second name is compared by the same arguments."""
    root, _ = pair
    how: dict[str, Any] = {
        "choice_func": lambda name: name != "b.w" and (f"net.{name}" if "." in name else True),
        "name_map": {"tied": "net.a.w"},
    }
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "b", **how)
    parts = {path.name: load_file(path) for path in (tmp_path / "b").glob("*.safetensors")}
    found = compared(root / "shards", tmp_path / "b", strategy=root / "strategy.ckpt", **how)
    assert found.ok and found.parameters == sum(map(len, parts.values())) == 6
    assert not compared(root / "shards", tmp_path / "b", strategy=root / "strategy.ckpt").ok
    next(part for part in parts.values() if "tied" in part)["tied"][0, 0] += 1
    for name, part in parts.items():
        save_file(part, tmp_path / "b" / name)
    found = compared(root / "shards", tmp_path / "b", strategy=root / "strategy.ckpt", **how)
    assert [each.name for each in found.differences] == ["tied"]
    assert compared(
        root / "shards", tmp_path / "b", strategy=root / "strategy.ckpt", match="net.a.w", **how
    ).differences, "globs are of the names in a: both of the parameters that come of it"
    for alone in how.items():
        with pytest.raises(UsageError, match="give b, or leave them out"):
            verify(root / "shards", strategy=root / "strategy.ckpt", **dict([alone]))


@pytest.mark.parametrize(
    "names",
    [{"x": "y", "y": "w"}, {"y": "w", "x": "y"}, {"x": "y", "z": "y", "y": "w"}, {"x": "y", "y": "x"}, {"z": "q"}],
)
def test_maps_that_change_places(names: dict[str, str], tmp_path: Path) -> None:
    """Every entry of a map refers to the names in the source, whatever its order."""
    save_file({name: np.full(2, n, "f4") for n, name in enumerate("wxy")}, tmp_path / "a.safetensors")
    with load(tmp_path / "a.safetensors", name_map=names) as held:
        arrays = {name: np.array(value) for name, value in held.arrays().items()}
    save_file(arrays, tmp_path / "b.safetensors")
    found = compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors", name_map=names)
    assert found.ok and found.parameters == len(arrays)
    for name in arrays:
        save_file({**arrays, name: arrays[name] + 1}, tmp_path / "b.safetensors")
        found = compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors", name_map=names)
        assert [each.name for each in found.differences] == [name] and found.parameters == len(arrays)


def test_small_blocks_find_the_same(golden: Path, tmp_path: Path) -> None:
    """Blocks of a few rows and parts of rows, on several threads, against two layouts."""
    changed = load_bytes(golden / "full" / "model.safetensors")
    offset = len(changed) - 5
    changed[offset] ^= 0x10
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes(changed)
    a = open_catalog(str(golden / "dp3_tp8" / "shards"), load_strategy(golden / "dp3_tp8" / "strategy.ckpt"))
    b = open_catalog(str(tmp_path / "full"), None)
    told = {compare(pair_up(a.tensors, b.tensors), a, b, 3, block).differences for block in (1 << 20, 512, 80)}
    (found,) = told
    assert [(d.count, d.dtype, len(d.first)) for d in found] == [(1, "F32", 1)]


def load_bytes(path: Path) -> bytearray:
    return bytearray(path.read_bytes())


def test_each_side_is_read_once(golden: Path) -> None:
    case = golden / "dp2_tp4"
    a = open_catalog(str(case / "shards"), load_strategy(case / "strategy.ckpt"))
    b = open_catalog(str(golden / "full"), None)
    counted = []
    pairing = pair_up(a.tensors, b.tensors)
    found = compare(pairing, a, b, 2, progress=counted.append)
    assert (
        sum(counted)
        == found.nbytes
        == pairing.nbytes
        == sum(load_file_sizes(golden / "full" / "model.safetensors").values())
    )


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Two blocks a side and what assembles them, for parameters of any size; rows are cut over both axes."""
    full = {"w": np.arange(8 << 20, dtype=np.float32).reshape(4096, 2048)}
    strategy = strategy_of({"w": Layout((2, 4), ((1,), (0,)))}, tmp_path / "s.ckpt")
    cut(strategy, full, tmp_path / "shards")
    (tmp_path / "whole").mkdir()
    save_file(full, tmp_path / "whole" / "model.safetensors")
    del full
    a, b = open_catalog(str(tmp_path / "shards"), strategy), open_catalog(str(tmp_path / "whole"), None)
    pairing = pair_up(a.tensors, b.tensors)
    tracemalloc.start()
    found = compare(pairing, a, b, 1, 1 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.ok, found.nbytes) == (True, 32 << 20)
    assert peak < 8 << 20


def test_a_side_that_lacks_a_slice_is_an_error(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "dp2_tp4_zero" / "shards", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "rank_3")
    with pytest.raises(CoverageError, match="rank 3"):
        verify(tmp_path / "shards", golden / "full", strategy=golden / "dp2_tp4_zero" / "strategy.ckpt")


# --- by itself


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoints_are_sound(case: str, golden: Path) -> None:
    found = checked(golden / case / "shards", strategy=golden / case / "strategy.ckpt")
    truth = load_file_sizes(golden / FULL[case] / "model.safetensors")
    assert found.ok
    assert found.parameters == len(truth)
    # The truth has one NaN in every parameter: counted once, however many hold it.
    assert found.not_finite == tuple(NotFinite(p.name, 1, 0) for p in found.not_finite)
    assert {p.name for p in found.not_finite} == set(truth)


def test_a_missing_rank_is_told_by_region(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "dp2_tp4_zero" / "shards", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "rank_3")
    found = checked(tmp_path / "shards", strategy=golden / "dp2_tp4_zero" / "strategy.ckpt", match="head.weight")
    assert found.gaps == (Gap("head.weight", "[72:84, 0:24]", (3,)),)
    assert not found.ok


def test_dropped_replicas_are_no_fault_and_lost_ones_neither(golden: Path, tmp_path: Path) -> None:
    case = golden / "formats_dp2_tp4"
    assert checked(case / "dedup", strategy=case / "strategy.ckpt").ok
    shutil.copytree(golden / "dp2_tp4" / "shards", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "rank_3")  # rank 7 holds the same
    assert checked(tmp_path / "shards", strategy=golden / "dp2_tp4" / "strategy.ckpt").ok


def test_copies_that_differ(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "dp2_tp4" / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "rank_6" / "net.safetensors"
    entry = read_index(str(path)).tensors["layers.0.w1.weight"]
    data = load_bytes(path)
    data[entry.extents[0].offset + 7] ^= 1
    path.write_bytes(data)
    found = checked(tmp_path / "shards", strategy=golden / "dp2_tp4" / "strategy.ckpt")
    files = tuple((str(tmp_path / "shards" / f"rank_{rank}" / "net.safetensors"),) for rank in (2, 6))
    assert found.unequal == (Unequal("layers.0.w1.weight", "[24:36, 0:24]", files),)
    assert not found.ok


def test_scalars_that_differ_between_ranks(tmp_path: Path) -> None:
    root = source(tmp_path / "source")
    arrays = load_file(root / "shards" / "rank_2" / "net.safetensors")
    save_file({**arrays, "global_step": np.array([1], np.int32)}, root / "shards" / "rank_2" / "net.safetensors")
    (found,) = checked(root / "shards", strategy=root / "strategy.ckpt").unequal
    assert (found.name, found.region, [len(group) for group in found.groups]) == ("global_step", "whole", [3, 1])


def test_parameters_of_the_strategy_that_are_nowhere(tmp_path: Path) -> None:
    strategy = strategy_of({"a": Layout((2,), ((0,),)), "b": Layout((2,), ((0,),))}, tmp_path / "s.ckpt")
    only_a = strategy_of({"a": Layout((2,), ((0,),))}, tmp_path / "a.ckpt")
    cut(only_a, {"a": np.array([1, np.inf, -np.inf, np.nan], np.float32)}, tmp_path / "shards", scalars(0))
    found = checked(tmp_path / "shards", strategy=strategy)
    assert (found.absent, found.not_finite, found.ok) == (("b",), (NotFinite("a", 1, 2),), False)
    assert checked(tmp_path / "shards", strategy=strategy, match="a").ok


# --- by manifest


def test_a_manifest_of_a_folder_and_of_its_rank_folders(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "tp4" / "shards", tmp_path / "shards")
    for rank in range(3):
        path = tmp_path / "shards" / f"rank_{rank}" / "net.safetensors"
        where, name = (path.parent, path.name) if rank else (tmp_path / "shards", "rank_0/net.safetensors")
        update_manifest(str(where), {name: digest_file(read_index(str(path)))})
    found = verify(tmp_path / "shards", manifest=True)
    assert isinstance(found, ManifestCheck)
    assert (found.ok, found.files, len(found.manifests)) == (True, 3, 3)
    assert found.unlisted == (str(tmp_path / "shards" / "rank_3" / "net.safetensors"),)
    damaged = tmp_path / "shards" / "rank_1" / "net.safetensors"
    data = load_bytes(damaged)
    data[-1] ^= 1
    damaged.write_bytes(data)
    (tmp_path / "shards" / "rank_0" / "net.safetensors").unlink()
    found = verify(tmp_path / "shards", manifest=True)
    assert isinstance(found, ManifestCheck)
    assert [(fault.file, fault.tensor is None) for fault in found.faults] == [
        ("rank_0/net.safetensors", True),
        ("rank_1/net.safetensors", False),
    ]


def test_what_is_asked_must_make_sense(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="holds no ms_ckpt_ext.digests.json"):
        verify(golden / "full", manifest=True)
    with pytest.raises(UsageError, match="takes no b"):
        verify(golden / "full", golden / "full", manifest=True)
    with pytest.raises(DiscoveryError, match="no such file or directory"):
        verify(tmp_path / "nothing")
    with pytest.raises(DiscoveryError, match="is a strategy file"):
        verify(golden / "tp4" / "strategy.ckpt")
    with pytest.raises(DiscoveryError, match="the strategy that cut them is needed"):
        verify(golden / "tp4" / "shards", golden / "full")
