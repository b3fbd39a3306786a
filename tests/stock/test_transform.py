"""transform_checkpoints and its companions, side by side with stock MindSpore and against the golden shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import rank_list_for_transform, transform_checkpoint_by_rank, transform_checkpoints
from ms_ckpt_ext.errors import ArgumentTypeError, CoverageError, DiscoveryError, UsageError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access, read_index
from tests.support.checkpoints import FULL, PAIRS, read_file, shard, tree
from tests.support.formats import KEY, contents, scalars_of

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SOURCE = "formats_dp2_tp4"
TARGETS = ["tp4", "dp2_tp2", "dp3_tp8", "dp4_tp2_zero2", "tp4_pp2"]


def strategy(golden: Path, case: str) -> str:
    return str(golden / case / "strategy.ckpt")


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors", "dedup"])
@pytest.mark.parametrize("target", TARGETS)
def test_files(target: str, kind: str, form: str, golden: Path, tmp_path: Path) -> None:
    """MindSpore's names; the golden slices, and the training scalars on every rank."""
    arguments = (golden / SOURCE / kind, tmp_path, "net_", strategy(golden, SOURCE), strategy(golden, target))
    transform_checkpoints(*arguments, output_format=form)
    folders = sorted((golden / target / "shards").iterdir())
    assert sorted(tree(tmp_path)) == sorted(f"{f.name}/net_{f.name[5:]}.{form}" for f in folders)
    for folder in folders:
        found = contents(tmp_path / folder.name / f"net_{folder.name[5:]}.{form}")
        assert found == {**read_file(shard(folder)), **scalars_of(golden, SOURCE, kind)}


@pytest.mark.parametrize("target", [*TARGETS[:-1], None])
def test_beside_stock(target: Any, ms: Any, golden: Path, tmp_path: Path) -> None:
    """The same files, byte for byte, but for BFloat16, which stock takes through Float32 and Float16's rounding of
    NaN payloads; tensors of every other dtype, names and their order are compared."""
    source, known = str(golden / SOURCE / "ckpt"), strategy(golden, SOURCE)
    wanted = None if target is None else strategy(golden, target)
    for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
        package.transform_checkpoints(source, str(tmp_path / who), "net", known, wanted)
    names = sorted(tree(tmp_path / "stock"))
    assert sorted(tree(tmp_path / "ours")) == names
    for name in names:
        theirs, ours = (contents(tmp_path / who / name) for who in ("stock", "ours"))
        assert list(theirs) == list(ours)
        assert {n: t[:2] for n, t in theirs.items()} == {n: t[:2] for n, t in ours.items()}
        same = [n for n, t in theirs.items() if t.dtype != "BF16"]
        assert {n: theirs[n] for n in same} == {n: ours[n] for n in same}
        if list(theirs) == same or theirs == ours:
            assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_from_one_device(ms: Any, golden: Path, tmp_path: Path) -> None:
    """No source strategy: rank 0 holds all."""
    (tmp_path / "src/rank_0").mkdir(parents=True)
    shutil.copy(golden / "full/model.safetensors", tmp_path / "src/rank_0/net.safetensors")
    transform_checkpoints(tmp_path / "src", tmp_path / "out", "x", None, strategy(golden, "tp4"))
    for rank in range(4):
        assert contents(tmp_path / f"out/rank_{rank}/x{rank}.ckpt") == read_file(
            shard(golden / "tp4/shards" / f"rank_{rank}")
        )
        assert ms.load_checkpoint(str(tmp_path / f"out/rank_{rank}/x{rank}.ckpt"))
    assert rank_list_for_transform(3, None, strategy(golden, "tp4")) == [0]


def test_one_stage_of_a_pipeline(golden: Path, tmp_path: Path) -> None:
    """The strategy of one stage alone: that stage's part of every target file, under MindSpore's name for it."""
    case = golden / "tp4_pp2"
    source = tmp_path / "src"
    transform_checkpoints(case / "shards", source, "net", strategy(golden, "tp4_pp2"), strategy(golden, "tp4_pp2"))
    found: dict[int, dict[str, Any]] = {rank: {} for rank in range(4)}
    for stage in (0, 1):
        (file,) = (p for p in (case / "strategy_stages").iterdir() if p.name.endswith(f"_{4 * stage}.ckpt"))
        out = tmp_path / f"out_{stage}"
        transform_checkpoints(source, out, "net", file, strategy(golden, "tp4"))
        assert sorted(tree(out)) == [f"rank_{rank}/net{rank}_part{stage}.ckpt" for rank in range(4)]
        for rank in range(4):
            found[rank].update(contents(out / f"rank_{rank}/net{rank}_part{stage}.ckpt"))
    for rank in range(4):
        assert found[rank] == read_file(shard(golden / "tp4/shards" / f"rank_{rank}"))


@pytest.mark.parametrize(("a", "b"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_rank_lists(a: str, b: str, ms: Any, golden: Path) -> None:
    """What is listed suffices, and MindSpore lists no less."""
    target = strategy(golden, b)
    _, world = sorted_world(golden, b)
    for rank in range(0, world, 3):
        ours = rank_list_for_transform(rank, strategy(golden, a), target)
        theirs = ms.rank_list_for_transform(rank, strategy(golden, a), target)
        assert ours == sorted(set(ours), reverse=True) and set(ours) <= set(theirs)


def sorted_world(golden: Path, case: str) -> tuple[list[Path], int]:
    folders = sorted((golden / case / "shards").iterdir())
    return folders, len(folders)


@pytest.mark.parametrize(
    ("a", "b"),
    [("dp2_tp4", "tp4"), ("dp2_tp2_pp2_zero", "dp3_tp8"), ("dp8_zero", "tp4_pp2"), ("tp4_pp2", "dp2_tp2_pp2_zero")],
)
def test_by_rank_with_just_the_listed_files(a: str, b: str, golden: Path, tmp_path: Path) -> None:
    assert FULL[a] == FULL[b]
    for rank in (0, 3):
        listed = rank_list_for_transform(rank, strategy(golden, a), strategy(golden, b))
        files = {each: str(shard(golden / a / "shards" / f"rank_{each}")) for each in listed}
        arguments = (strategy(golden, a), strategy(golden, b))
        for form in ("ckpt", "safetensors"):
            path = tmp_path / f"{form}_{rank}" / f"net.{form}"
            transform_checkpoint_by_rank(rank, files, path, *arguments)
            assert contents(path) == read_file(shard(golden / b / "shards" / f"rank_{rank}"))
    dropped = dict(list(files.items())[1:])
    with pytest.raises(CoverageError if dropped else DiscoveryError, match=f"rank {listed[0]}|0 checkpoint files"):
        transform_checkpoint_by_rank(3, dropped, tmp_path / "net.ckpt", *arguments)


def test_by_rank_without_a_stage(golden: Path, tmp_path: Path) -> None:
    files = {rank: shard(golden / "tp4_pp2" / "shards" / f"rank_{rank}") for rank in range(4)}
    with pytest.raises(CoverageError, match="should be in the files of ranks 4, 5, 6, 7"):
        arguments = (strategy(golden, "tp4_pp2"), strategy(golden, "tp4"))
        transform_checkpoint_by_rank(0, files, tmp_path / "net.safetensors", *arguments)


def test_by_rank_beside_stock(ms: Any, golden: Path, tmp_path: Path) -> None:
    arguments = (strategy(golden, SOURCE), strategy(golden, "tp4"))
    files = {rank: str(next((golden / SOURCE / "ckpt" / f"rank_{rank}").iterdir())) for rank in range(4)}
    for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
        (tmp_path / who).mkdir()
        package.transform_checkpoint_by_rank(2, files, str(tmp_path / who / "net.ckpt"), *arguments)
    theirs, ours = (contents(tmp_path / who / "net.ckpt") for who in ("stock", "ours"))
    assert list(theirs) == list(ours)
    same = [name for name, tensor in theirs.items() if tensor.dtype != "BF16"]
    assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}


def test_encrypted_with_checksums(ms: Any, golden: Path, tmp_path: Path) -> None:
    known = strategy(golden, SOURCE)
    transform_checkpoints(
        golden / SOURCE / "ckpt_crc", tmp_path / "a", "n", known, known, 2, crc_check=True, crc=True, enc_key=KEY
    )
    told = {"dec_key": KEY, "crc_check": True}
    transform_checkpoints(tmp_path / "a", tmp_path / "b", "n", known, strategy(golden, "tp4"), **told)
    for rank in range(4):
        expected = read_file(shard(golden / "tp4/shards" / f"rank_{rank}")) | scalars_of(golden, SOURCE)
        assert contents(tmp_path / f"b/rank_{rank}/n{rank}.ckpt") == expected
    assert read_index(str(tmp_path / "a/rank_0/n0.ckpt"), Access(Key(KEY))).reader == "AES-GCM"
    assert ms.load_checkpoint(str(tmp_path / "a/rank_0/n0.ckpt"), **told)


def test_wrong_arguments(golden: Path, tmp_path: Path) -> None:
    source, known = golden / SOURCE / "ckpt", strategy(golden, SOURCE)
    for call, kind, said in (
        (lambda: transform_checkpoints(source, tmp_path / "o", 7, known, known), ArgumentTypeError, "ckpt_prefix"),
        (lambda: transform_checkpoints(source, tmp_path / "o", "a/b", known, known), UsageError, "holds no path"),
        (lambda: transform_checkpoints(source, tmp_path / "o", "a", known, known, -1), UsageError, "process_num"),
        (lambda: transform_checkpoints(source, tmp_path / "o", "a", known, known, 1, "npz"), UsageError, "'npz'"),
        (lambda: transform_checkpoints(tmp_path, tmp_path / "o", "a", known, known), DiscoveryError, "rank_0"),
        (lambda: rank_list_for_transform("0", known), ArgumentTypeError, "rank_id must be an int"),
        (lambda: rank_list_for_transform(8, known, known), UsageError, "between 0 and 7"),
        (lambda: transform_checkpoint_by_rank(0, [], "a.ckpt"), ArgumentTypeError, "must map ranks"),
        (lambda: transform_checkpoint_by_rank(0, {0: "x.ckpt"}, "a.bin"), UsageError, "must end with .ckpt"),
        (lambda: transform_checkpoint_by_rank(1, {0: "x.ckpt"}, "a.ckpt"), UsageError, "between 0 and 0"),
    ):
        with pytest.raises(kind, match=said):
            call()
    assert not (tmp_path / "o").exists()


def test_two_files_of_which_stock_takes_the_older(golden: Path, tmp_path: Path) -> None:
    known = strategy(golden, SOURCE)
    for rank in range(8):
        folder = tmp_path / "src" / f"rank_{rank}"
        folder.mkdir(parents=True)
        for name in ("net-9_1.ckpt", "net-10_1.ckpt"):
            shutil.copy(next((golden / SOURCE / "ckpt" / f"rank_{rank}").iterdir()), folder / name)
    with pytest.raises(DiscoveryError, match=r"'net-10_1.ckpt' is the newest .* 'net-9_1.ckpt'.*file_suffix"):
        transform_checkpoints(tmp_path / "src", tmp_path / "out", "n", known, known)
    transform_checkpoints(tmp_path / "src", tmp_path / "out", "n", known, known, file_suffix="10_1")


def test_both_formats_at_once(golden: Path, tmp_path: Path) -> None:
    known = strategy(golden, SOURCE)
    shutil.copytree(golden / SOURCE / "ckpt", tmp_path / "src")
    shutil.copy(next((golden / SOURCE / "safetensors/rank_0").iterdir()), tmp_path / "src/rank_0")
    with pytest.raises(DiscoveryError, match="hold both .safetensors and .ckpt files"):
        transform_checkpoints(tmp_path / "src", tmp_path / "out", "n", known, known)
