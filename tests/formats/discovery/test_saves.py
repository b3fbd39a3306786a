"""What names say: saves, runs, ranks, and which is the newest."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.formats.discovery.saves import Newest, grouped, grouped_flat, newest, save_of, step_of, unlike

LORA = {rank: ["lora_rank_8-1_10.ckpt", "lora_rank_8-1_20.ckpt"] for rank in range(10)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net-3_1200.ckpt", ("net", 0, (3, 1200), True)),
        ("net_2-3_1200.safetensors", ("net", 2, (3, 1200), True)),
        ("net-1_12_breakpoint.ckpt", ("net", 0, (1, 12), False)),
        ("qwen_rank__1-1_5.ckpt", ("qwen_rank_", 1, (1, 5), True)),
        ("qwen_rank_0_1-1_5.ckpt", ("qwen_rank_0", 1, (1, 5), True)),
        ("lora_rank_8-1_5.ckpt", ("lora_rank_8", 0, (1, 5), True)),
        ("lora_rank_8_3-1_5.ckpt", ("lora_rank_8", 3, (1, 5), True)),
        ("step_400.ckpt", ("step_", 0, (400,), True)),
        ("net.ckpt", ("net", 0, (), True)),
        ("v2.1-net_final.ckpt", ("v#-net_final", 0, (2, 1), True)),
    ],
)
def test_what_a_name_says(name: str, expected: tuple[object, ...]) -> None:
    assert save_of(name) == expected
    assert step_of(name) == (expected[2] if "-" in name and "v2" not in name else None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {rank: [f"qwen_rank_{rank}-1_{step}.ckpt" for step in (5, 10)] for rank in range(3)},
            ["qwen_rank_-1_10.ckpt", "qwen_rank_-1_5.ckpt"],
            id="MindFormers",
        ),
        pytest.param(
            {rank: [f"qwen_rank_{rank}{run}-1_5.ckpt" for run in ("", "_1")] for rank in range(3)},
            ["qwen_rank_-1_5.ckpt", "qwen_rank__1-1_5.ckpt"],
            id="a later run",
        ),
        pytest.param(LORA, ["lora_rank_8-1_10.ckpt", "lora_rank_8-1_20.ckpt"], id="a prefix with a rank"),
        pytest.param(
            {rank: [f"lora_rank_8_rank_{rank}-1_{step}.ckpt" for step in (5, 10)] for rank in range(10)},
            ["lora_rank_8_rank_-1_10.ckpt", "lora_rank_8_rank_-1_5.ckpt"],
            id="both",
        ),
        pytest.param(
            {rank: ["lora_rank_8-1_5.ckpt", "lora_rank_4-1_5.ckpt"] for rank in range(10)},
            ["lora_rank_4-1_5.ckpt", "lora_rank_8-1_5.ckpt"],
            id="two such prefixes",
        ),
        pytest.param(
            {rank: [f"net{rank}.ckpt", f"other{rank}.ckpt"] for rank in range(3)},
            ["net.ckpt", "other.ckpt"],
            id="transform_checkpoints",
        ),
        pytest.param(
            {rank: ["net-0_5.ckpt", "net-1_5.ckpt"] for rank in range(2)},
            ["net-0_5.ckpt", "net-1_5.ckpt"],
            id="epochs like ranks",
        ),
        pytest.param(
            {rank: [f"net{rank}.ckpt", "net.ckpt"] for rank in range(3)},
            ["net*.ckpt", "net.ckpt"],
            id="one name for two",
        ),
        pytest.param(
            {rank: [f"net_stage{rank // 2}-1_{step}.ckpt" for step in (5, 10)] for rank in range(4)},
            ["net_stage0-1_10.ckpt", "net_stage0-1_5.ckpt"],
            id="pipeline stages",
        ),
        pytest.param({0: ["qwen_rank_0-1_5.ckpt"]}, ["qwen_rank_0-1_5.ckpt"], id="one rank"),
    ],
)
def test_files_of_one_save(files: dict[int, list[str]], expected: list[str]) -> None:
    groups = grouped(files)
    assert sorted(groups) == expected
    assert all(sorted(group) == sorted(files) for group in groups.values())
    assert sum(map(len, groups.values())) == sum(map(len, files.values()))


@pytest.mark.parametrize(
    "names",
    [("a.ckpt", "net-1_5.ckpt"), ("step_300.ckpt", "step_400.ckpt"), ("net-1_10.ckpt", "net-1_10_breakpoint.ckpt"),
     ("ema-1_5.ckpt", "net-1_5.ckpt"), ("net-1_5.ckpt", "net_1-1_5.ckpt"), ("net-1_5.ckpt", "net-1_9.ckpt")],
)  # fmt: skip
def test_files_of_several_saves(names: tuple[str, str]) -> None:
    """Also where every rank has only one: a save was cut short, or the names have an unknown meaning."""
    assert len(grouped({0: [names[0]], 1: [names[1]], 2: [names[1]]})) == 2


def test_only_files_without_numbers_are_one_save_whatever_their_names() -> None:
    files = {0: "net.ckpt", 1: "net.ckpt", 2: "net\udcff.ckpt"}
    assert list(grouped({rank: [name] for rank, name in files.items()}).values()) == [files]
    assert unlike(files) == ("net.ckpt", "net\udcff.ckpt")
    assert unlike({rank: f"net{rank}.ckpt" for rank in range(3)}) is None
    assert len(grouped({0: ["a.ckpt", "b.ckpt"], 1: ["a.ckpt"]})) == 2


def test_a_stray_copy_of_another_rank_joins_no_save() -> None:
    files = {rank: [f"qwen_rank_{rank}-1_5.ckpt", f"qwen_rank_{rank}-1_9.ckpt"] for rank in range(3)}
    files[2].append("qwen_rank_0-1_5.ckpt")
    groups = grouped(files)
    assert groups["qwen_rank_-1_5.ckpt"] == {rank: f"qwen_rank_{rank}-1_5.ckpt" for rank in range(3)}
    assert groups["qwen_rank_0-1_5.ckpt"] == {2: "qwen_rank_0-1_5.ckpt"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["net-1_5.ckpt", "net-1_9.ckpt"], {"net-1_5.ckpt": [0], "net-1_9.ckpt": [0]}),
        (["net_rank_0-1_5.ckpt", "net_rank_1-1_5.ckpt"], {"net_rank_-1_5.ckpt": [0, 1]}),
        (["net_rank_2-1_5.ckpt", "net_rank_3-1_5.ckpt"], {"net_rank_-1_5.ckpt": [2, 3]}),  # of another host
        (["lora_rank_8-1_5.ckpt"], {"lora_rank_8-1_5.ckpt": [0]}),
        (
            ["lora_rank_8-1_5.ckpt", "lora_rank_16-1_5.ckpt"],
            {"lora_rank_8-1_5.ckpt": [0], "lora_rank_16-1_5.ckpt": [0]},
        ),
        ([f"lora_rank_8_rank_{r}-1_5.ckpt" for r in range(2)], {"lora_rank_8_rank_-1_5.ckpt": [0, 1]}),
    ],
    ids=str,
)
def test_ranks_in_one_folder(names: list[str], expected: dict[str, list[int]]) -> None:
    assert {name: sorted(files) for name, files in grouped_flat(names).items()} == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a-1_9", "a-1_10", "a-2_1"], (("a-2_1",), None, ())),
        (["a-1_5", "b-1_5"], (("a-1_5", "b-1_5"), None, ("b-1_5",))),
        (["ema-1_10", "net-1_10", "net-1_15"], (("net-1_15",), None, ("ema-1_10",))),
        (["net-1_12", "net-1_12_breakpoint"], (("net-1_12",), None, ())),
        (["ema-1_12", "net-1_12_breakpoint"], (("ema-1_12", "net-1_12_breakpoint"), None, ("net-1_12_breakpoint",))),
        (["net-1_10", "net-1_12_breakpoint"], (("net-1_12_breakpoint",), None, ())),
        (["net-1_900", "net_1-1_50", "net_1-1_40"], (("net-1_900",), "net_1-1_50", ())),
        (["net-1_900", "net_1-1_50_breakpoint"], (("net-1_900",), None, ())),
        (["net-1_50_breakpoint", "net_1-1_40"], (("net-1_50_breakpoint",), "net_1-1_40", ())),
        (["net-1_900", "llama_7b"], (("net-1_900", "llama_7b"), None, ("llama_7b",))),
        (["step_300", "step_400"], (("step_400",), None, ())),
        (["last", "best"], (("last", "best"), None, ("best",))),
    ],
    ids=str,
)
def test_the_newest(names: list[str], expected: tuple[object, ...]) -> None:
    assert newest(names) == Newest(*expected)  # type: ignore[arg-type]
