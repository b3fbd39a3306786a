"""Which file of which folder is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from ms_ckpt_ext.errors import DiscoveryError, FormatError
from ms_ckpt_ext.formats import discovery

NAMES = ["net_rank_0-3_1200", "net_rank_0-3_600", "net_rank_0-2_1800", "net_rank_0_1-3_1200", "other_77"]


def folder(root: Path, names: list[str], rank: int = 0) -> Path:
    (root / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / f"rank_{rank}" / f"{name}.safetensors").touch()
    return root


def pick(root: Path, suffix: str | None) -> str:
    return Path(discovery.rank_files(str(root), "safetensors", suffix)[0]).stem


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
    ],
)
def test_no_guessing(names: list[str], suffix: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError) as caught:
        pick(folder(tmp_path, names), suffix)
    assert message in str(caught.value)
    assert all(f"{name}.safetensors" in str(caught.value) for name in names)


def test_files_of_one_step() -> None:
    discovery.check_one_step({0: "a/net_0-1_20.ckpt", 1: "b/net_1-1_20.ckpt", 2: "c/net.ckpt", 3: "c/net_4.ckpt"})
    discovery.check_one_step({0: "a/net-3_0.ckpt", 1: "a/net-3_1.ckpt"})  # a prefix and the rank
    discovery.check_one_step({0: "a/net-1_20.ckpt", 1: "a/net-01_20_breakpoint.ckpt"})
    with pytest.raises(DiscoveryError, match=r"1_15 \(rank 0: 'a/net-1_15_breakpoint.ckpt'\), 1_10 \(rank 1: "):
        discovery.check_one_step({0: "a/net-1_15_breakpoint.ckpt", 1: "a/net-1_10.ckpt"})
    with pytest.raises(DiscoveryError, match=r"0_4 \(rank 3: '[^']*'\) and 95 more; probably a save was cut short"):
        discovery.check_one_step({rank: f"net-0_{rank + 1}.ckpt" for rank in range(99)})
    mixed = {0: "a/net-1_20.safetensors", 1: "b/net-1_10.safetensors", 2: "c/net-1_20.safetensors"}
    with pytest.raises(DiscoveryError, match=r"1_20 \(ranks 0, 2: 'a/net-1_20.safetensors'\), 1_10 \(rank 1: 'b/net"):
        discovery.check_one_step(mixed)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="no such checkpoint directory"):
        discovery.rank_files(str(tmp_path / "absent"))
    with pytest.raises(DiscoveryError, match="holds no rank_0, rank_1"):
        discovery.rank_files(str(tmp_path))
    for rank in (10, 2, 0):
        folder(tmp_path, ["net"], rank)
    (tmp_path / "rank_x").mkdir()
    (tmp_path / "rank_3").touch()
    (tmp_path / "rank_7").mkdir()
    assert list(discovery.rank_files(str(tmp_path))) == [0, 2, 10]
    with pytest.raises(DiscoveryError, match=r"none of the 4 rank folders .* holds a \*\.ckpt file"):
        discovery.rank_files(str(tmp_path), "ckpt")


@pytest.mark.parametrize(("one", "other"), [("rank_2", "rank_02"), ("rank_0", "rank_00"), ("rank_02", "rank_002")])
def test_two_folders_of_one_rank(one: str, other: str, tmp_path: Path) -> None:
    for name in ("rank_1", one):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.safetensors").touch()
    assert len(discovery.rank_files(str(tmp_path))) == 2
    (tmp_path / other).touch()  # no folder
    assert len(discovery.rank_files(str(tmp_path))) == 2
    (tmp_path / other).unlink()
    (tmp_path / other).mkdir()
    for find in (discovery.rank_files, discovery.is_sharded, discovery.kinds):
        with pytest.raises(DiscoveryError, match=rf"two folders of rank \d, '({one}|{other})' and '({one}|{other})'"):
            find(str(tmp_path))


def test_merged(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"holds no \.safetensors or \.ckpt file"):
        discovery.unified_files(str(tmp_path))
    (tmp_path / "part0.safetensors").touch()
    assert discovery.unified_files(str(tmp_path)).names is None
    (tmp_path / "hyper_param.safetensors").touch()
    with pytest.raises(DiscoveryError, match="neither param_name_map.json nor"):
        discovery.unified_files(str(tmp_path))
    for content, kind, message in (
        ('{"weight_map": {"a": "part9.safetensors"}}', DiscoveryError, "names .'part9.safetensors'."),
        ('{"weight_map": {"a": "../x"}}', FormatError, "must map parameter names to file names"),
        ("[]", FormatError, "is not a parameter map"),
        ("{", FormatError, "is not a parameter map"),
    ):
        (tmp_path / "param_name_map.json").write_text(content)
        with pytest.raises(kind, match=message):
            discovery.unified_files(str(tmp_path))
    (tmp_path / "param_name_map.json").write_text('{"a": "part0.safetensors"}')
    found = discovery.unified_files(str(tmp_path))
    assert found.names == {"a": "part0.safetensors"}
    assert found.hyper == str(tmp_path / "hyper_param.safetensors")
