"""Which file of which folder is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.errors import DiscoveryError
from ms_ckpt_ext.formats.discovery import rank_folders

NAMES = ["net_rank_0-3_1200", "net_rank_0-3_600", "net_rank_0-2_1800", "net_rank_0_1-3_1200", "other_77"]


def folder(root: Path, names: list[str], rank: int = 0) -> Path:
    (root / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / f"rank_{rank}" / f"{name}.safetensors").touch()
    return root


def pick(root: Path, suffix: str | None) -> str:
    return Path(rank_folders.rank_files(str(root), "safetensors", suffix)[0]).stem


@pytest.mark.parametrize(
    ("names", "suffix", "chosen"),
    [
        (["only"], None, "only"),
        (["a-1_10", "a-1_9", "a-2_1"], None, "a-2_1"),
        (["a_5", "a"], None, "a_5"),
        (NAMES, "_1-3_1200", "net_rank_0_1-3_1200"),
        (NAMES, "1-3_1200", "net_rank_0_1-3_1200"),
        (NAMES, "-2_1800", "net_rank_0-2_1800"),
        (NAMES, "2_1800", "net_rank_0-2_1800"),
        (NAMES, "3_1200", "net_rank_0-3_1200"),
        (NAMES, "_1200", "net_rank_0-3_1200"),
        (NAMES, "1800", "net_rank_0-2_1800"),
        (NAMES, "r_77", "other_77"),
        (["net-1_10", "net-1_12_breakpoint"], None, "net-1_12_breakpoint"),
        (["net-1_12", "net-1_12_breakpoint"], None, "net-1_12"),
        (["lora_rank_8-1_10", "lora_rank_8-1_20"], None, "lora_rank_8-1_20"),
        (["ema-1_10", "net-1_20"], None, "net-1_20"),
        (["net", "net_best"], "best", "net_best"),
    ],
)
def test_the_file_that_is_meant(names: list[str], suffix: str | None, chosen: str, tmp_path: Path) -> None:
    assert pick(folder(tmp_path, names), suffix) == chosen


@pytest.mark.parametrize(
    ("names", "suffix", "message"),
    [
        (["a-1_10", "b-1_10"], None, "are equally new"),
        (["a", "b"], None, "are equally new"),
        (["xa_best", "yb_best"], "best", "match file_suffix 'best' equally well"),
        (["a-3_5", "b-3_5"], "3_5", "match file_suffix '3_5' equally well"),
        (["a"], "zzz", "ends with 'zzz.safetensors'"),
        (["net_rank_0-1_5", "net_rank_0_1-1_5"], None, "are equally new"),
        (["net_rank_0-3_1200", "net_rank_0_1-1_50"], None, "is of a later run"),
        (["net-3_1200", "net_2-1_50"], None, "is of a later run"),
    ],
)
def test_no_guessing(names: list[str], suffix: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError) as caught:
        pick(folder(tmp_path, names), suffix)
    assert message in str(caught.value)
    assert all(f"{name}.safetensors" in str(caught.value) for name in names)


def test_files_of_one_step() -> None:
    rank_folders.check_one_step({0: "a/net_0-1_20.ckpt", 1: "b/net_1-1_20.ckpt", 2: "c/net.ckpt", 3: "c/net_4.ckpt"})
    rank_folders.check_one_step({0: "a/net-3_0.ckpt", 1: "a/net-3_1.ckpt"})  # a prefix and the rank
    rank_folders.check_one_step({0: "a/net-1_20.ckpt", 1: "a/net-01_20_breakpoint.ckpt"})
    with pytest.raises(DiscoveryError, match=r"1_15 \(rank 0: 'a/net-1_15_breakpoint.ckpt'\), 1_10 \(rank 1: "):
        rank_folders.check_one_step({0: "a/net-1_15_breakpoint.ckpt", 1: "a/net-1_10.ckpt"})
    with pytest.raises(DiscoveryError, match=r"0_4 \(rank 3: '[^']*'\) and 95 more; probably a save was cut short"):
        rank_folders.check_one_step({rank: f"net-0_{rank + 1}.ckpt" for rank in range(99)})
    with pytest.raises(
        DiscoveryError, match=r"of different prefixes: 'a/ema-1_20.ckpt' of rank 0, 'b/net-1_20.ckpt' of"
    ):
        rank_folders.check_one_step({0: "a/ema-1_20.ckpt", 1: "b/net-1_20.ckpt", 2: "c/net-1_20.ckpt"})
    rank_folders.check_one_step({rank: f"rank_{rank}/net_dev{rank}-1_20.ckpt" for rank in range(3)})
    mixed = {0: "a/net-1_20.safetensors", 1: "b/net-1_10.safetensors", 2: "c/net-1_20.safetensors"}
    with pytest.raises(DiscoveryError, match=r"1_20 \(ranks 0, 2: 'a/net-1_20.safetensors'\), 1_10 \(rank 1: 'b/net"):
        rank_folders.check_one_step(mixed)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="no such checkpoint directory"):
        rank_folders.rank_files(str(tmp_path / "absent"))
    with pytest.raises(DiscoveryError, match="holds no rank_0, rank_1"):
        rank_folders.rank_files(str(tmp_path))
    for rank in (10, 2, 0):
        folder(tmp_path, ["net"], rank)
    (tmp_path / "rank_x").mkdir()
    (tmp_path / "rank_3").touch()
    (tmp_path / "rank_7").mkdir()
    assert list(rank_folders.rank_files(str(tmp_path))) == [0, 2, 10]
    with pytest.raises(DiscoveryError, match=r"none of the 4 rank folders .* holds a \*\.ckpt file"):
        rank_folders.rank_files(str(tmp_path), "ckpt")


@pytest.mark.parametrize(("one", "other"), [("rank_2", "rank_02"), ("rank_0", "rank_00"), ("rank_02", "rank_002")])
def test_two_folders_of_one_rank(one: str, other: str, tmp_path: Path) -> None:
    for name in ("rank_1", one):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.safetensors").touch()
    assert len(rank_folders.rank_files(str(tmp_path))) == 2
    (tmp_path / other).touch()  # no folder
    assert len(rank_folders.rank_files(str(tmp_path))) == 2
    (tmp_path / other).unlink()
    (tmp_path / other).mkdir()
    for find in (rank_folders.rank_files, rank_folders.is_sharded, rank_folders.rank_folders):
        with pytest.raises(DiscoveryError, match=rf"two folders of rank \d, '({one}|{other})' and '({one}|{other})'"):
            find(str(tmp_path))


def test_strategies_and_archives_in_rank_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for rank in range(3):
        folder(tmp_path, ["net-1_10"], rank)
        (tmp_path / f"rank_{rank}" / "strategy.ckpt").write_bytes(bytes.fromhex("08021204"))
        (tmp_path / f"rank_{rank}" / "torch-9_99.ckpt").write_bytes(b"PK\x03\x04")
    assert {Path(path).name for path in rank_folders.rank_files(str(tmp_path), None).values()} == {
        "net-1_10.safetensors"
    }


def test_one_file_of_a_family_tells_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(8):
        (tmp_path / f"rank_{rank}").mkdir()
        for step in range(9):
            (tmp_path / f"rank_{rank}" / f"net_rank_{rank}-1_{step}.ckpt").write_bytes(bytes.fromhex("0a0a"))
    looked: list[Any] = []
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *mode: looked.append(path) or real(path, *mode))
    assert len(rank_folders.rank_files(str(tmp_path), None)) == 8
    assert len(looked) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            (["net-1_20", "init"], ["init"]),
            r"rank 1 has no file of the newest save: .*\['init.safe.*rank 0 has 'net-1_20",
        ),
        ((["step_400", "step_300"], ["step_300"]), "rank 1 has no file of the newest save"),
        ((["net-1_20", "ema-1_15"], ["ema-1_20", "ema-1_15"]), "'ema-1_20.*equally new|equally new.*'ema-1_20"),
        ((["a", "b"], ["b"]), "are equally new"),
        ((["step_300"], ["step_400"]), "rank 0 has no file of the newest save"),
        ((["net-1_9_breakpoint"], ["net-1_9", "net-1_9_breakpoint"]), "rank 0 has no file of the newest save"),
        ((["net_1-1_9", "net-1_9_breakpoint"], ["net-1_9_breakpoint"]), "rank 1 has no file of the newest save"),
    ],
)
def test_no_file_of_another_save_fills_a_gap(names: tuple[list[str], ...], message: str, tmp_path: Path) -> None:
    for rank, held in enumerate(names):
        folder(tmp_path, held, rank)
    with pytest.raises(DiscoveryError, match=message):
        rank_folders.rank_files(str(tmp_path))


def test_every_folder_s_only_file_may_be_meant(tmp_path: Path) -> None:
    for rank, name in enumerate(["net_20240101_120001", "net_20240101_120003"]):
        folder(tmp_path, [name], rank)
    with pytest.raises(DiscoveryError, match="if every folder's only file is meant, with file_suffix=''"):
        rank_folders.rank_files(str(tmp_path))
    assert len(rank_folders.rank_files(str(tmp_path), file_suffix="")) == 2


def test_what_lies_beyond_the_world_is_listed_as_it_is(tmp_path: Path) -> None:
    for rank in range(4):
        folder(tmp_path, ["step_400"] if rank < 2 else ["step_300"], rank)
        folder(tmp_path, ["init"], rank)
    with pytest.raises(DiscoveryError, match="rank 2 has no file"):
        rank_folders.rank_files(str(tmp_path))
    found = rank_folders.rank_files(str(tmp_path), world=2)
    assert [Path(path).stem for path in found.values()] == ["step_400", "step_400", "step_300", "step_300"]
