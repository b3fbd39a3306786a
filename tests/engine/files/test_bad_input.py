"""Bad input fails with a message that says what to do, and leaves nothing that looks complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext import (
    CheckpointError,
    errors,
    load_distributed_checkpoint,
    training_scalars,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.support.checkpoints import (
    FULL,
    Case,
    assert_nothing_complete,
    merge,
    read_file,
    read_merged,
    source,
    strategy_of,
    tree,
)


def no_directory(case: Case) -> None:
    shutil.rmtree(case.shards)


def no_rank_folders(case: Case) -> None:
    shutil.rmtree(case.shards)
    case.shards.mkdir()


def a_rank_is_missing(case: Case) -> None:
    shutil.rmtree(case.shards / "rank_3")


def a_rank_folder_is_empty(case: Case) -> None:
    case.file(3).unlink()


def two_equally_good_files(case: Case) -> None:
    for name in ("a-1_2", "b-1_2"):
        shutil.copy(case.file(2), case.shards / "rank_3" / f"{name}.safetensors")


def strategy_is_empty(case: Case) -> None:
    case.strategy.write_bytes(b"")


def strategy_is_missing(case: Case) -> None:
    case.strategy.unlink()


def strategy_is_not_protobuf(case: Case) -> None:
    case.strategy.write_bytes(b"\xff\xfe this is no strategy file at all")


def strategy_is_a_checkpoint(case: Case) -> None:
    shutil.copy(case.file(0), case.strategy)


def strategy_of_another_model(case: Case) -> None:
    strategy_of({"other.weight": Layout((8,), ((0,), ()))}, case.strategy)


def strategy_of_fewer_ranks(case: Case) -> None:
    strategy_of({"emb.weight": Layout((4,), ((0,), ()))}, case.strategy)


def slices_have_another_rank(case: Case) -> None:
    name = next(iter(read_file(case.file(0))))
    strategy_of({name: Layout((8,), ((0,), (), (), ()))}, case.strategy)


def one_slice_has_another_shape(case: Case) -> None:
    rewrite(case.file(5), lambda name, tensor: tensor[:1] if tensor.ndim == 2 else tensor)


def one_slice_has_another_dtype(case: Case) -> None:
    rewrite(case.file(5), lambda name, tensor: tensor.astype(np.float64) if tensor.dtype == np.float32 else tensor)


def rewrite(file: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """The file anew, without what numpy cannot hold."""
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        kept = {}
        for name in opened.keys():  # noqa: SIM118 - not a dict
            try:
                kept[name] = opened.get_tensor(name)
            except (TypeError, AttributeError):
                continue  # BF16
    save_file({n: np.ascontiguousarray(change(n, t)) for n, t in kept.items()}, file)


def truncated(case: Case) -> None:
    data = case.file(6).read_bytes()
    case.file(6).write_bytes(data[:-100])


def truncated_in_the_header(case: Case) -> None:
    case.file(6).write_bytes(case.file(6).read_bytes()[:40])


def empty_file(case: Case) -> None:
    case.file(6).write_bytes(b"")


def not_safetensors(case: Case) -> None:
    case.file(6).write_bytes(b"PK\x03\x04 some archive, not a checkpoint" * 10)


def target_below_a_file(case: Case) -> None:
    (case.target.parent / "file").write_text("in the way")
    case.target = case.target.parent / "file" / "out"


def target_is_a_file(case: Case) -> None:
    case.target.write_text("in the way")


BOTH: list[tuple[Callable[[Case], None], type[CheckpointError], str]] = [
    (no_directory, errors.DiscoveryError, "no such checkpoint directory.*shards.*check the path"),
    (a_rank_is_missing, errors.CoverageError, r"parameter '.*no file holds region \[.*in the file of rank 3"),
    (a_rank_folder_is_empty, errors.CoverageError, "in the file of rank 3: check that every rank's file is there"),
    (
        two_equally_good_files,
        errors.DiscoveryError,
        r"2 files in .*rank_3' are equally new.*'a-1_2.safetensors', 'b-1_2",
    ),
    (strategy_is_empty, errors.StrategyError, "strategy file .*strategy.ckpt' is empty"),
    (strategy_is_missing, errors.StrategyError, "strategy.ckpt': No such file or directory; check the path"),
    (strategy_is_not_protobuf, errors.StrategyError, "is not a strategy file: .* bytes starting with"),
    (
        strategy_is_a_checkpoint,
        errors.StrategyError,
        "strategy.ckpt' (is not a strategy file|holds no parameter layouts)",
    ),
    (strategy_of_another_model, errors.StrategyError, "have no parameter in common: the strategy lists 'other.weight'"),
    (strategy_of_fewer_ranks, errors.StrategyError, "is for 4 ranks, but the checkpoint has .*rank_4"),
    (slices_have_another_rank, errors.LayoutMismatchError, "has .* ax.*the layout has 4; check that strategy file"),
    (one_slice_has_another_shape, errors.LayoutMismatchError, r"parameter '.* is .*\[.* but .*\[1, .*rank_5"),
    (one_slice_has_another_dtype, errors.LayoutMismatchError, "parameter '.* is F32.* but F64.*rank_5.*from one save"),
    (truncated, errors.TruncatedFileError, "rank_6.*the tensors end at byte .*, the file has"),
    (truncated_in_the_header, errors.TruncatedFileError, "rank_6.*the header needs .* bytes, the file has 40"),
    (empty_file, errors.TruncatedFileError, "rank_6.*holds 0 bytes"),
    (not_safetensors, errors.FormatError, "rank_6.*is not a safetensors file"),
    (target_below_a_file, errors.StorageError, "cannot write into .*file/out': Not a directory"),
    (target_is_a_file, errors.StorageError, "cannot write into .*out': File exists"),
]


@pytest.mark.parametrize("job", ["merge", "recut"])
@pytest.mark.parametrize("spoil, error, message", BOTH, ids=lambda v: getattr(v, "__name__", ""))
def test_bad_input(
    spoil: Callable[[Case], None], error: type[CheckpointError], message: str, job: str, golden: Path, tmp_path: Path
) -> None:
    case = Case(golden, "dp2_tp4_zero", tmp_path)
    spoil(case)
    before = tree(tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        getattr(case, job)()
    assert_nothing_complete(case.target)
    assert tree(tmp_path) == before
    assert not list(tmp_path.rglob(".ms_ckpt_ext*")), "nothing at all where nothing was there"


def test_no_rank_folders(golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4_zero", tmp_path)
    no_rank_folders(case)
    with pytest.raises(errors.DiscoveryError, match="holds no rank_0, rank_1, … folders"):
        case.merge()
    with pytest.raises(errors.DiscoveryError, match="holds no .safetensors file"):
        case.recut()
    assert not case.target.exists()


def test_a_replica_stands_in_for_a_missing_rank(golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4", tmp_path)
    a_rank_is_missing(case)
    case.merge()
    assert read_merged(case.target)[0] == read_file(golden / FULL["dp2_tp4"] / "model.safetensors")


@pytest.mark.parametrize(
    "returned, error, message",
    [
        (1, errors.ArgumentTypeError, "must return a bool .* or a str .* but returned int for parameter"),
        (np.int64(1), errors.ArgumentTypeError, "returned int64"),
        (None, errors.UsageError, "dropped every parameter"),
        (np.False_, errors.UsageError, "dropped every parameter"),
        ("same", errors.UsageError, "the name 'same'; names must stay unique"),
        (False, errors.UsageError, "dropped every parameter"),
        ("__metadata__", errors.UsageError, "__metadata__"),
    ],
)
def test_choice_func(returned: Any, error: type[Exception], message: str, golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4", tmp_path)
    with pytest.raises(error, match=message):
        case.merge(choice_func=lambda name: returned if returned != "__metadata__" or "emb" in name else False)
    assert not case.target.exists()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (lambda name: name.startswith(123), "choice_func fails at '.*': TypeError: startswith first arg must be str"),
        (lambda name: {}[name], "choice_func fails at '.*': KeyError"),
        (lambda: True, "choice_func fails at '.*': TypeError: .*takes 0 positional arguments"),
    ],
)
def test_a_choice_func_that_fails(choice: Any, message: str, golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4", tmp_path)
    for call in (lambda: case.merge(choice_func=choice), lambda: ms_ckpt_ext.load(case.file(0), choice_func=choice)):
        with pytest.raises(ValueError, match=message):
            call()
    assert not case.target.exists()


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_name_that_is_not_unicode(form: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    with pytest.raises(errors.UsageError, match=r"tensor named 'a\\ud800' into 'part0.* UTF-8"):
        merge(root, tmp_path / "out", choice_func=lambda name: name.replace(".w", "\ud800"), output_format=form)
    assert not (tmp_path / "out").exists()


def test_a_source_file_whose_name_is_not_unicode(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    folder = root / "shards" / "rank_2"
    merge(root, tmp_path / "expected")
    (folder / "net.safetensors").rename(folder / os.fsdecode(b"net\xff.safetensors"))
    merge(root, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    prefix = os.fsdecode(b"net\xff_")
    strategy = root / "strategy.ckpt"
    transform_checkpoints(root / "shards", tmp_path / "cut", prefix, strategy, strategy, 1, "safetensors")
    names = sorted(tree(tmp_path / "cut"))
    assert names == [f"rank_{rank}/{prefix}{rank}.safetensors" for rank in range(4)]
    assert ms_ckpt_ext.verify(tmp_path / "cut", manifest=True).ok


@pytest.mark.parametrize("wrong", ["a\0b", "a\ud800"])
def test_what_no_file_can_be_called(wrong: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    shards, strategy, target = root / "shards", root / "strategy.ckpt", tmp_path / "out"
    for argument, call in {
        "src_dir": lambda: unified_safetensors(f"{shards}{wrong}", strategy, target),
        "dst_dir": lambda: unified_safetensors(shards, strategy, f"{target}{wrong}"),
        "src_strategy_file": lambda: unified_safetensors(shards, f"{strategy}{wrong}", target),
        "ckpt_prefix": lambda: transform_checkpoints(shards, target, wrong, strategy, strategy),
        "to_strategy": lambda: ms_ckpt_ext.reshard(shards, target, strategy=strategy, to_strategy=wrong),
        "checkpoint_filenames": lambda: load_distributed_checkpoint(
            None, wrong, None, strategy, format="ckpt", dst_safetensors_dir=target
        ),
    }.items():
        with pytest.raises(errors.UsageError, match=f"{argument} holds a character that no path can have"):
            call()
    assert not target.exists()


def test_a_new_name_that_is_taken(golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4", tmp_path)
    names = list(read_file(golden / "full" / "model.safetensors"))
    with pytest.raises(errors.UsageError, match=f"gives both .* the name '{names[1]}'"):
        case.merge(choice_func=lambda name: names[1] if name == names[0] else True)


def test_both_kinds_of_files(golden: Path, tmp_path: Path) -> None:
    case = Case(golden, "dp2_tp4", tmp_path)
    (case.shards / "rank_2" / "net.ckpt").write_bytes(b"")
    with pytest.raises(errors.DiscoveryError, match="hold both .safetensors and .ckpt files; .* move one kind away"):
        case.merge()
    assert not case.target.exists()


def test_the_target_strategy_does_not_divide(tmp_path: Path) -> None:
    root = source(tmp_path / "src", names=("w",))
    target = strategy_of({"w": Layout((7,), ((0,), ()))}, tmp_path / "t.ckpt")
    with pytest.raises(
        errors.LayoutMismatchError, match=r"parameter 'w' under .*axis 0 of shape \[64, 32\].*7 equal parts"
    ):
        load_distributed_checkpoint(
            None, None, target, root / "strategy.ckpt", format="safetensors", unified_safetensors_dir=root / "shards",
            dst_safetensors_dir=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    before = tree(root)
    with pytest.raises(errors.UsageError, match="is a rank folder of the source, .*choose another target"):
        load_distributed_checkpoint(
            None, None, root / "strategy.ckpt", root / "strategy.ckpt", format="safetensors",
            unified_safetensors_dir=root / "shards", dst_safetensors_dir=root / "shards",
        )  # fmt: skip
    assert tree(root) == before


@pytest.mark.parametrize("lost", ["part0.safetensors", "part1.safetensors"])
def test_a_merge_that_lost_parts_does_not_load(lost: str, tmp_path: Path) -> None:
    """Even when a single file is left, which without a map would count as everything."""
    root = source(tmp_path / "src")
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "m", part_bytes=20_000)
    (tmp_path / "m" / "hyper_param.safetensors").unlink()
    assert len(list((tmp_path / "m").glob("*.safetensors"))) == 2
    (tmp_path / "m" / lost).unlink()
    with pytest.raises(errors.DiscoveryError, match=f"param_name_map.json' names .*{lost}.*restore"):
        training_scalars(tmp_path / "m")
