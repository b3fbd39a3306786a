"""What no strategy lists: `verify` compares it over all ranks, and calls nothing equal that is incomplete."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import inspect, verify
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.integrity.compare import Comparison
from ms_ckpt_ext.engine.integrity.pairing import Mismatch
from ms_ckpt_ext.engine.integrity.soundness import Health
from ms_ckpt_ext.engine.unlisted.alike import compared as standing
from tests.support.command_line import as_json, run
from tests.support.outside import Content, Source, listed, slices, source, whole

FROZEN = np.arange(48, dtype=np.float32).reshape(8, 6)
ROWS = slices(Layout((2,), ((0,), ())), FROZEN, 2)
STEP = np.array([7], np.int32)
BY_RANK: dict[str, Content] = {
    "a frozen matrix that is cut": ROWS,
    "the state of a random generator": lambda rank: np.arange(625, dtype=np.uint32) + rank,
    "a cursor": lambda rank: np.array(rank, np.int64),
    "other shapes": lambda rank: np.ones((rank + 1, 3), np.float16),
    "other dtypes": lambda rank: np.ones(4, [np.float32, np.float16][rank]),
}


def made(root: Path, outside: dict[str, Content], ranks: int = 2) -> Source:
    root.mkdir(exist_ok=True)
    return source(root / "src", listed(ranks), {"global_step": STEP, **outside})


def checked(src: Source, **options: Any) -> Health:
    found = verify(src.shards, strategy=src.strategy, **options)
    assert isinstance(found, Health)
    return found


def against(src: Source, other: Path, **options: Any) -> Comparison:
    found = verify(src.shards, other, strategy=src.strategy, **options)
    assert isinstance(found, Comparison)
    return found


def merged_by_hand(root: Path, frozen: np.ndarray, name: str = "x") -> Path:
    root.mkdir()
    save_file({"w0.0": whole("w0.0"), name: frozen, "global_step": STEP}, root / "net.safetensors", {"format": "ms"})
    return root


@pytest.mark.parametrize("what", BY_RANK)
def test_by_itself_it_is_unequal(what: str, tmp_path: Path) -> None:
    src = made(tmp_path, {"x": BY_RANK[what]})
    found = checked(src)
    assert not found.ok and found.outside == ("x",)
    (unequal,) = found.unequal
    assert (unequal.name, unequal.groups) == ("x", ((str(src.file(0)),), (str(src.file(1)),)))
    words = ("verify", src.shards, "--strategy", src.strategy)
    ran = run(*words)
    assert ran.code == 1 and "1 of these is not in the strategy" in ran.out and "x " in ran.out
    assert as_json(*words, code=1)["outside"] == ["x"]
    assert checked(src, exclude="x").ok


def test_alike_is_sound(tmp_path: Path) -> None:
    found = checked(made(tmp_path, {"x": FROZEN}))
    assert found.ok and found.outside == ()


@pytest.mark.parametrize("what", BY_RANK)
def test_against_a_copy_every_ranks_own_is_compared(what: str, tmp_path: Path) -> None:
    src = made(tmp_path, {"x": BY_RANK[what]})
    shutil.copytree(src.shards, tmp_path / "copy")
    assert against(src, tmp_path / "copy", strategy_b=src.strategy).ok
    path = tmp_path / "copy/rank_1/net.safetensors"
    held = load_file(path)
    held["x"] = np.asarray(held["x"] + 1, held["x"].dtype)
    save_file(held, path, {"format": "ms"})
    found = against(src, tmp_path / "copy", strategy_b=src.strategy)
    assert not found.ok
    assert [(d.name, d.of) for d in found.differences] == [("x", "what rank 1 has of its own")] or found.mismatches


@pytest.mark.parametrize("half", [FROZEN[:4], FROZEN, np.concatenate([FROZEN[:4], FROZEN[:4]])])
def test_against_a_merge_it_is_never_equal(half: np.ndarray, tmp_path: Path) -> None:
    """Half of it against a whole: nothing tells how the halves belong together."""
    src = made(tmp_path, {"x": ROWS})
    other = merged_by_hand(tmp_path / "merged", half)
    mismatch = Mismatch("x", "F32[4, 6] of its own on ranks 0, 1", f"F32{list(half.shape)}")
    assert against(src, other).mismatches == (mismatch,)
    back = verify(other, src.shards, strategy_b=src.strategy)
    assert isinstance(back, Comparison) and back.mismatches == (Mismatch("x", mismatch.b, mismatch.a),)


def test_against_a_merge_without_it(tmp_path: Path) -> None:
    src = made(tmp_path, {"x": ROWS})
    found = against(src, merged_by_hand(tmp_path / "merged", FROZEN, "y"))
    assert (found.only_a, found.only_b) == (("x",), ("y",))


def test_names_of_what_ranks_have_of_their_own(tmp_path: Path) -> None:
    src = made(tmp_path, {"x": ROWS})
    shutil.copytree(src.shards, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.safetensors"):
        held = load_file(path)
        held["y"] = held.pop("x")
        save_file(held, path, {"format": "ms"})
    options = {"strategy_b": src.strategy}
    assert against(src, tmp_path / "copy", name_map={"y": "x"}, **options).ok
    assert against(src, tmp_path / "copy", choice_func=lambda n: "y" if n == "x" else True, **options).ok
    assert not against(src, tmp_path / "copy", **options).ok


def test_one_byte_on_one_rank_that_stands_for_nobody(tmp_path: Path) -> None:
    """What a job takes as alike after a few looks is read from every rank by `verify`."""
    big = np.random.default_rng(0).random(200_000).astype(np.float32)

    def odd(rank: int) -> np.ndarray:
        mine = big.copy()
        mine[17_000] += rank == 7
        return mine

    src = made(tmp_path, {"x": odd}, ranks=8)
    assert set(standing(src.catalog()).extras) == {"global_step", "x"}
    found = checked(src)
    assert [len(group) for group in found.unequal[0].groups] == [7, 1] and found.outside == ("x",)
    merged = tmp_path / "merged"
    merged_by_hand(merged, big)
    assert [m.name for m in against(src, merged).mismatches] == ["x"]


def test_inspect_tells_what_differs_by_rank(tmp_path: Path) -> None:
    """From headers, scalars and samples; a matrix is no scalar, alike or not."""
    big = np.random.default_rng(0).random((700, 300)).astype(np.float32)
    held: dict[str, Content] = {
        "x": slices(Layout((2,), ((0,), ())), big, 2),
        "seed": lambda rank: np.array(rank + 5, np.int64),
        "ragged": lambda rank: np.ones((rank + 1, 3), np.float16),
        "alike": FROZEN,
    }
    src = made(tmp_path, held)
    found = inspect(src.shards, strategy=src.strategy)
    told = {p.name: p for p in found.parameters}
    assert {name for name, p in told.items() if p.differs} == {"x", "seed", "ragged"}
    assert told["x"].shape is None and told["x"].slice_shapes == ((350, 300),) and told["x"].group == "weights"
    assert "on rank 0" in told["x"].differs and "on rank 1" in told["x"].differs
    assert told["ragged"].differs == "F16[1, 3] on rank 0, F16[2, 3] on rank 1"
    assert told["alike"].differs == "" and told["alike"].shape == (8, 6) and told["alike"].group == "weights"
    assert found.scalars == {"global_step": [7], "seed": {0: 5, 1: 6}}
    words = ("inspect", src.shards, "--strategy", src.strategy)
    ran = run(*words)
    assert ran.code == 0 and "each rank's own" in ran.out and "outside the strategy, by rank" in ran.out
    plain = {p["name"]: p["differs"] for p in as_json(*words)["parameters"]}
    assert plain["ragged"] == told["ragged"].differs and plain["alike"] == ""


def test_names_that_begin_like_accumulated_gradients(tmp_path: Path) -> None:
    """MindSpore's `accu_grads.*` are zero between steps and are ignored; similar names are compared."""
    held: dict[str, Content] = {
        "accu_gradsX.w": lambda rank: np.full(4, rank, np.float32),
        "accu_grads.w": lambda rank: np.full(4, rank, np.float32),
        "accu_grads_scale": np.ones(3, np.float32),
    }
    src = made(tmp_path, held)
    found = checked(src)
    assert found.outside == ("accu_gradsX.w",) and found.parameters == 4
    assert {p.name for p in inspect(src.shards, strategy=src.strategy).parameters} == {
        "w0.0", "global_step", "accu_gradsX.w", "accu_grads_scale",
    }  # fmt: skip
