"""Options of merge and re-cut: filters, new names, part sizes, buffers, naming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext import load_distributed_checkpoint, training_scalars, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import UsageError
from tests.support.checkpoints import (
    arrays,
    assert_merged,
    cut,
    merge,
    read_file,
    read_merged,
    scalars,
    source,
    strategy_of,
    tree,
)


def recut(root: Path, predicted: Any, target: Path, **more: Any) -> None:
    load_distributed_checkpoint(
        None, None, predicted, root / "strategy.ckpt", format="safetensors", unified_safetensors_dir=root / "shards",
        dst_safetensors_dir=target, **more
    )  # fmt: skip


def test_an_empty_checkpoint_is_not_written_on(tmp_path: Path) -> None:
    save_file({}, tmp_path / "net.safetensors", {"format": "ms"})
    for call in (ms_ckpt_ext.merge, ms_ckpt_ext.reshard):
        with pytest.raises(UsageError, match="holds no parameters .*net.safetensors"):
            call(tmp_path / "net.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_globs_that_match_nothing(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    with pytest.raises(UsageError, match=r"no parameter is left by match \['layers.\*'\]"):
        ms_ckpt_ext.merge(root / "shards", tmp_path / "out", strategy=root / "strategy.ckpt", match="layers.*")


def test_choice_filters_and_renames(tmp_path: Path) -> None:
    def choice(name: str) -> Any:
        return {"a.w": False, "b.w": "model.b", "c.w": True}.get(name, True)

    merge(source(tmp_path / "src"), tmp_path / "out", choice_func=choice)
    assert_merged(tmp_path / "out", names=lambda name: {"a.w": None, "b.w": "model.b"}.get(name, name))


@pytest.mark.parametrize("choice", [{"a.w": "global_step"}, {"global_step": "a.w"}])
def test_a_parameter_and_a_scalar_of_one_name(choice: dict[str, str], tmp_path: Path) -> None:
    """One would go to a part and the other to the scalars, and a load would take either."""
    root = source(tmp_path / "src")

    def renamed(name: str) -> Any:
        return choice.get(name, True)

    shards, strategy, target = root / "shards", root / "strategy.ckpt", tmp_path / "out"
    calls = [lambda: recut(root, strategy, target, choice_func=renamed)]
    if "a.w" in choice:  # merges do not ask about scalars
        calls.append(lambda: merge(root, target, choice_func=renamed))
        calls.append(lambda: ms_ckpt_ext.merge(shards, target, strategy=strategy, choice_func=renamed))
    for call in calls:
        with pytest.raises(UsageError, match="both 'a.w' and 'global_step' the name '(a.w|global_step)'; names must"):
            call()
    assert not (tmp_path / "out").exists()


def test_swapping_names_is_another_job(tmp_path: Path) -> None:
    """Same files, sizes and headers: only what goes where differs."""
    root = source(tmp_path / "src")
    merge(root, tmp_path / "out")
    swap = {"a.w": "b.w", "b.w": "a.w"}
    assert merge(root, tmp_path / "out", choice_func=lambda n: swap.get(n, n)).bytes_written > 0
    assert_merged(tmp_path / "out", names=lambda n: swap.get(n, n))


def test_a_strategy_of_the_same_slice_shapes_is_another_job(tmp_path: Path) -> None:
    """dp2 tp2 with the axes exchanged: every header is the same, ranks 1 and 2 change places."""
    root = source(tmp_path / "src", names=("w",))
    for axis, expected in ((0, 1), (1, 2)):
        strategy = strategy_of({"w": Layout((2, 2), ((axis,), ()))}, tmp_path / "target.ckpt")
        recut(root, strategy, tmp_path / "out")
        second = arrays(0, names=("w",))["w"][32:].tobytes()
        assert read_file(tmp_path / f"out/rank_{expected}/net.safetensors")["w"].data == second


def test_name_map_swapped_is_another_job(tmp_path: Path) -> None:
    root = source(tmp_path / "src", names=("a", "b", "c", "d"))
    strategy = strategy_of({n: Layout((1,), ((), ())) for n in "ab"}, tmp_path / "t.ckpt")
    for names in ({}, {"a": "b", "b": "a"}, {"a": "c", "b": "c"}):
        recut(root, strategy, tmp_path / "out", name_map=names)
        found = read_file(tmp_path / "out" / "rank_0" / "net.safetensors")
        for name in "ab":
            assert found[name].data == arrays(0, names=("a", "b", "c", "d"))[names.get(name, name)].tobytes()


def test_huggingface_names_and_limit(tmp_path: Path) -> None:
    root = source(tmp_path / "src", rows=64)  # four parameters of 8 KiB
    merge(root, tmp_path / "out", naming="huggingface", part_bytes=20_000)
    names = sorted(tree(tmp_path / "out"))
    assert names == [
        "hyper_param.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert_merged(tmp_path / "out", 0)
    assert {n: a.tobytes() for n, a in training_scalars(tmp_path / "out").items()} == {
        n: a.tobytes() for n, a in scalars(0).items()
    }
    load_distributed_checkpoint(
        None,
        None,
        None,
        format="safetensors",
        unified_safetensors_dir=tmp_path / "out",
        dst_safetensors_dir=tmp_path / "one",
    )
    found = read_file(tmp_path / "one" / "rank_0" / "net.safetensors")
    assert (
        found["c.w"].data == arrays(0)["c.w"].tobytes()
        and found["global_step"].data == scalars(0)["global_step"].tobytes()
    )


def test_huggingface_limit_holds(tmp_path: Path) -> None:
    root = source(tmp_path / "src", names=("a", "b", "c"))  # 8 KiB each
    merge(root, tmp_path / "out", naming="huggingface", part_bytes=13_000)
    sizes = [sum(len(t.data) for t in read_file(p).values()) for p in (tmp_path / "out").glob("model-*")]
    assert sizes == [8192] * 3


def test_a_change_of_naming_takes_the_old_result_away(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    for naming, parts in (("mindspore", 1 << 12), ("huggingface", 1 << 30), ("mindspore", 1 << 30)):
        merge(root, tmp_path / "out", naming=naming, part_bytes=parts)
        fresh = tmp_path / f"fresh_{naming}_{parts}"
        merge(root, fresh, naming=naming, part_bytes=parts)
        assert tree(tmp_path / "out") == tree(fresh)


def test_a_smaller_world_takes_the_old_ranks_away(tmp_path: Path) -> None:
    root = source(tmp_path / "src", names=("w",))
    for ways in (4, 2):
        recut(root, strategy_of({"w": Layout((ways,), ((0,), ()))}, tmp_path / "t.ckpt"), tmp_path / "out")
        assert sorted(tree(tmp_path / "out")) == [f"rank_{rank}/net.safetensors" for rank in range(ways)]


def test_a_renewed_source_is_a_new_job(tmp_path: Path) -> None:
    for seed in (1, 2):
        root = source(tmp_path / "src", seed)
        assert merge(root, tmp_path / "out").bytes_written > 0
        assert_merged(tmp_path / "out", seed)
    assert merge(root, tmp_path / "out").bytes_written == 0


@pytest.mark.parametrize("lost", ["param_name_map.json", "part0.safetensors", "hyper_param.safetensors"])
def test_a_result_that_lost_a_file_is_made_again(lost: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    merge(root, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    merge(root, tmp_path / "out")
    assert_merged(tmp_path / "out", 0)


def test_target_inside_the_source_directory(tmp_path: Path) -> None:
    """A merge may go next to the rank folders; without a strategy the merged files are then meant."""
    root = source(tmp_path / "src")
    merge(root, root / "shards")
    assert_merged(root / "shards", 0)
    merge(root, tmp_path / "out")
    load_distributed_checkpoint(
        None,
        None,
        None,
        format="safetensors",
        unified_safetensors_dir=root / "shards",
        dst_safetensors_dir=tmp_path / "one",
    )
    assert read_file(tmp_path / "one" / "rank_0" / "net.safetensors")["a.w"].data == arrays(0)["a.w"].tobytes()


def test_unicode_empty_scalar_and_wide(tmp_path: Path) -> None:
    full = {
        "模型.权重": np.arange(48, dtype=np.float64).reshape(8, 6),
        "empty": np.zeros((0, 5), np.float32),
        'quote"\\/\n': np.arange(4, dtype=np.uint8),
        "scalar": np.array(3, np.int64),
        "flags": np.array([True, False]),
    }
    layouts = {
        "模型.权重": Layout((2,), ((0,), ())),
        "empty": Layout((2,), ((), ())),
        'quote"\\/\n': Layout((2,), ((0,),)),
        "scalar": Layout((2,), ()),
        "flags": Layout((2,), ((),)),
    }
    strategy = strategy_of(layouts, tmp_path / "s.ckpt")
    cut(strategy, full, tmp_path / "shards", {"步数": np.array([1, 2], np.int16)})
    unified_safetensors(tmp_path / "shards", tmp_path / "s.ckpt", tmp_path / "目标 dir")
    found, extras = read_merged(tmp_path / "目标 dir")
    assert {n: (t.shape, t.data) for n, t in found.items()} == {n: (a.shape, a.tobytes()) for n, a in full.items()}
    assert extras["步数"].data == np.array([1, 2], np.int16).tobytes()
    load_distributed_checkpoint(
        None,
        None,
        strategy,
        format="safetensors",
        unified_safetensors_dir=tmp_path / "目标 dir",
        dst_safetensors_dir=tmp_path / "again",
    )
    for rank in range(2):
        written = read_file(tmp_path / f"again/rank_{rank}/net.safetensors")
        assert written == read_file(tmp_path / f"shards/rank_{rank}/net.safetensors")


def test_a_single_rank_without_a_strategy(tmp_path: Path) -> None:
    (tmp_path / "src" / "rank_0").mkdir(parents=True)
    save_file(arrays(3), tmp_path / "src" / "rank_0" / "net.safetensors")
    unified_safetensors(tmp_path / "src", None, tmp_path / "out")
    assert {n: t.data for n, t in read_merged(tmp_path / "out")[0].items()} == {
        n: a.tobytes() for n, a in arrays(3).items()
    }


def test_what_only_the_target_strategy_splits(tmp_path: Path) -> None:
    """A parameter outside the source strategy is whole there; the target strategy may cut it all the same."""
    strategy = strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt")
    extra = np.arange(32, dtype=np.float32).reshape(8, 4)
    cut(strategy, {"w": extra + 100}, tmp_path / "shards", {"head": extra})
    target = strategy_of({"w": Layout((2,), ((0,), ())), "head": Layout((2,), ((0,), ()))}, tmp_path / "t.ckpt")
    load_distributed_checkpoint(
        None, None, target, tmp_path / "s.ckpt", format="safetensors", unified_safetensors_dir=tmp_path / "shards",
        dst_safetensors_dir=tmp_path / "out",
    )  # fmt: skip
    assert read_file(tmp_path / "out/rank_1/net.safetensors")["head"].data == extra[4:].tobytes()


def test_symlinks_in_the_source(tmp_path: Path) -> None:
    root = source(tmp_path / "real")
    (tmp_path / "src").mkdir()
    for rank in range(4):
        (tmp_path / "src" / f"rank_{rank}").symlink_to(root / "shards" / f"rank_{rank}")
    (tmp_path / "link").symlink_to(tmp_path / "somewhere_else")
    (tmp_path / "somewhere_else").mkdir()
    unified_safetensors(tmp_path / "src", root / "strategy.ckpt", tmp_path / "link")
    assert_merged(tmp_path / "somewhere_else", 0)


def test_files_that_are_in_the_way_of_nobody(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    (root / "shards" / "rank_9_old").mkdir()
    (root / "shards" / "rank_x").mkdir()
    (root / "shards" / "rank_7").write_text("a file named like a rank folder")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    merge(root, tmp_path / "out")
    assert tree(tmp_path / "out")["README.md"] == b"mine"


@st.composite
def layouts(draw: st.DrawFn, matrix: tuple[int, ...], ndim: int) -> Layout:
    axes = draw(st.permutations(range(len(matrix))))
    groups: list[list[int]] = [[] for _ in range(ndim)]
    for axis in axes:
        where = draw(st.integers(-1, ndim - 1))
        # A strategy file cannot say that two device axes split the only axis of a tensor: one row is one axis each.
        if where >= 0 and not (ndim == 1 and groups[0]):
            groups[where].append(axis)
    tensor_map = tuple(map(tuple, groups))
    shard = draw(st.booleans())
    return Layout(matrix, tensor_map, int(shard), -1 if shard else 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), buffer=st.sampled_from([1 << 16, 64 << 20]), workers=st.sampled_from([1, 3]))
def test_cut_recut_merge_of_random_layouts(
    data: st.DataObject, buffer: int, workers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("random")
    matrices = [(2,), (2, 2), (3, 2), (2, 3, 2), (4, 2)]
    matrix_a, matrix_b = data.draw(st.sampled_from(matrices)), data.draw(st.sampled_from(matrices))
    rng = np.random.default_rng(0)
    full, cuts = {}, ({}, {})  # type: ignore[var-annotated]
    for number in range(data.draw(st.integers(1, 3))):
        ndim = data.draw(st.integers(1, 3))
        name, dtype = f"p{number}", data.draw(st.sampled_from(["f4", "f2", "i8", "u1"]))
        full[name] = rng.integers(0, 200, (24, 12, 12)[:ndim]).astype(dtype)
        for matrix, into in zip((matrix_a, matrix_b), cuts):
            into[name] = data.draw(layouts(matrix, ndim))
    a, b = strategy_of(cuts[0], root / "a.ckpt"), strategy_of(cuts[1], root / "b.ckpt")
    try:
        cut(a, full, root / "a", scalars(1)), cut(b, full, root / "b", scalars(1))
    except ValueError:
        return  # the optimizer shard does not divide the shape
    options = {"buffer_bytes": buffer, "max_process_num": workers}
    load_distributed_checkpoint(
        None, None, b, root / "a.ckpt", format="safetensors", unified_safetensors_dir=root / "a",
        dst_safetensors_dir=root / "out", **options,
    )  # fmt: skip
    assert_same_tensors(b, root / "b", root / "out")
    unified_safetensors(root / "a", root / "a.ckpt", root / "merged", part_bytes=1000, **options)
    assert {n: t.data for n, t in read_merged(root / "merged")[0].items()} == {n: x.tobytes() for n, x in full.items()}


def assert_same_tensors(strategy: Strategy, expected: Path, found: Path) -> None:
    for rank in range(strategy.world):
        file = Path(f"rank_{rank}") / "net.safetensors"
        assert read_file(found / file) == read_file(expected / file)


def test_report_is_true(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    report = merge(root, tmp_path / "out", part_bytes=9000)
    written = tree(tmp_path / "out")
    index = json.loads(written.pop("param_name_map.json"))
    assert set(report.files_written) == set(written) and report.files_kept == ()
    assert report.bytes_written == sum(map(len, written.values()))
    assert index["metadata"]["total_size"] == 4 * 64 * 32 * 4
