"""The order of checkpoints by names, runs, records and times; ties, and what is reported of those passed over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import pytest

from ms_ckpt_ext.engine.resume.candidates import Candidate, candidates
from ms_ckpt_ext.engine.resume.records import Record, home_name
from ms_ckpt_ext.engine.resume.sightings import CheckpointFolder, Noted, Sight, folder_from_json, folder_to_json
from ms_ckpt_ext.engine.resume.trial_order import Order, prefix_of

Notes = Mapping[str, tuple[float, Optional[int]]]


def seen(
    files: Sequence[str], notes: Optional[Notes] = None, sizes: Optional[Mapping[str, int]] = None
) -> list[CheckpointFolder]:
    """Files (`FOLDER//FILE`, or just FILE) in the order in which they were modified; notes: file -> (saved, step)."""
    places: dict[str, tuple[list[Sight], dict[str, Noted]]] = {}
    for time, path in enumerate(files):
        folder, file = path.split("//") if "//" in path else ("", path)
        sights, noted = places.setdefault(folder, ([], {}))
        sights.append(Sight(file, (sizes or {}).get(path, 100), float(time)))
        if path in (notes or {}):
            rank = int(file[len("rank_") : file.index("/")]) if "/" in file else 0
            world = len({f for f in files if f.split("/")[-1] == file.split("/")[-1]})
            saved, step = (notes or {})[path]
            home = home_name(file, rank)
            record = Record(rank, world, file, 100, saved, world > 1, 1, step)
            noted[home] = Noted((*noted.get(home, Noted((), "")).records, record), "")
    return [CheckpointFolder(folder, tuple(sights), "", 0.0, noted, "") for folder, (sights, noted) in places.items()]


def order(files: Sequence[str], notes: Optional[Notes] = None, **more: Any) -> Order:
    return Order(candidates([seen(files, notes, **more)]))


def titles(found: Any) -> list[str]:
    return [candidate.title.replace(".ckpt", "") for candidate in found]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(["net-1_9", "net-1_10", "net-2_1"], "net-2_1 net-1_10 net-1_9", id="numbers"),
        pytest.param(["net-1_10", "net-1_9"], "net-1_10 net-1_9", id="numbers before time"),
        pytest.param(["net-1_900", "net_1-1_50"], "net_1-1_50 net-1_900", id="a later run"),
        pytest.param(["net_1-1_50", "net-1_900"], "net_1-1_50 net-1_900", id="a later run, copied first"),
        pytest.param(["q_rank_0-3_9", "q_rank_0_1-1_5"], "q_rank__1-1_5 q_rank_-3_9", id="a later run of MindFormers"),
        pytest.param(["net-1_10", "net-1_12_breakpoint"], "net-1_12_breakpoint net-1_10", id="a breakpoint"),
        pytest.param(["net-1_12", "net-1_12_breakpoint"], "net-1_12 net-1_12_breakpoint", id="one of the same step"),
        pytest.param(
            ["net-1_90", "net_1-1_50", "net-1_52_breakpoint"],
            "net-1_52_breakpoint net_1-1_50 net-1_90",
            id="a breakpoint of the later run",
        ),
        pytest.param(
            ["net-1_90", "net-1_92_breakpoint", "net_1-1_50"],
            "net_1-1_50 net-1_92_breakpoint net-1_90",
            id="a breakpoint before the later run",
        ),
        pytest.param(
            ["net-1_5", "ema-1_5", "net-1_15", "ema-1_10"],
            "net-1_15 net-1_5 ema-1_10 ema-1_5",
            id="the next of the same saver comes next",
        ),
        pytest.param(["step_9//net", "step_10//net"], "step_10/net step_9/net", id="folders"),
        pytest.param(["run_2//net-1_5", "run_1//net-1_90"], "run_2/net-1_5 run_1/net-1_90", id="folders come first"),
        pytest.param(["net-1_5", "last"], "net-1_5 last", id="those without numbers come last"),
        pytest.param(["net-1_5", "llama_7b"], "net-1_5 llama_7b", id="other numbers are no epoch and step"),
        pytest.param(["net-1_5", "qwen2//net"], "net-1_5 qwen2/net", id="nor are those of folders"),
        pytest.param(
            ["step_300", "step_400", "last"], "step_400 step_300 last", id="they will do where there are no others"
        ),
        pytest.param(["net-1_5", "old//net-1_5"], "net-1_5 old/net-1_5", id="the directory itself before a folder"),
    ],
)
def test_the_order_of_names(files: list[str], expected: str) -> None:
    found = order([f"{file}.ckpt" for file in files])
    assert titles(found) == expected.split()


@pytest.mark.parametrize(
    ("files", "notes", "expected"),
    [
        pytest.param(
            ["net-1_10", "more-1_5"], {"net-1_10": (1.0, 10)}, "more-1_5 net-1_10", id="a later run without a recorder"
        ),
        pytest.param(
            ["net-1_900", "fresh-1_50"],
            {"net-1_900": (1.0, 900), "fresh-1_50": (2.0, 50)},
            "fresh-1_50 net-1_900",
            id="another prefix, by the time of the save",
        ),
        pytest.param(
            ["net-1_100", "net-1_200"],
            {"net-1_100": (9.0, 100), "net-1_200": (5.0, 200)},
            "net-1_200 net-1_100",
            id="a clock that was ahead",
        ),
        pytest.param(
            ["net-1_200", "net_1-1_50"],
            {"net-1_200": (9.0, 200), "net_1-1_50": (5.0, 250)},
            "net_1-1_50 net-1_200",
            id="a clock that was ahead, of another run",
        ),
        pytest.param(["last", "best"], {"last": (9.0, 300), "best": (5.0, 100)}, "last best", id="without numbers"),
        pytest.param(["net-1_5", "last"], {"last": (9.0, 300)}, "last net-1_5", id="recorded without numbers"),
        pytest.param(["copy//net-1_5", "net//net-1_5"], {"net//net-1_5": (0.0, 5)}, "net/net-1_5 copy/net-1_5",
                     id="of equals the recorded one"),
        pytest.param(["net//net-1_5", "copy//net-1_5"], {"net//net-1_5": (0.0, 5)}, "net/net-1_5 copy/net-1_5",
                     id="of equals the recorded one, copied later"),
    ],
)  # fmt: skip
def test_the_order_of_records(files: list[str], notes: Notes, expected: str) -> None:
    found = order([f"{file}.ckpt" for file in files], {f"{file}.ckpt": told for file, told in notes.items()})
    assert titles(found) == expected.split()


@pytest.mark.parametrize(
    ("files", "notes", "equal"),
    [
        (["ema-1_5.ckpt", "net-1_5.ckpt"], {}, True),
        (["net-1_5.ckpt", "net-1_5.safetensors"], {}, True),
        (["a//net-1_5.ckpt", "b//net-1_5.ckpt"], {}, True),
        (["best.ckpt", "last.ckpt"], {}, True),
        (["net-1_5.ckpt", "net-01_05.ckpt"], {}, True),
        (["net-1_5.ckpt", "net-1_5 (copy).ckpt"], {}, True),
        (["lora_rank_8-1_5.ckpt", "lora_rank_16-1_5.ckpt"], {}, True),
        (["rank_0/net-1_5.ckpt", "rank_0/ema-1_5.ckpt"], {}, True),
        (["ema-1_5.ckpt", "net-1_5.ckpt"], {"ema-1_5.ckpt": (1.0, 5), "net-1_5.ckpt": (2.0, 5)}, True),
        (["best.ckpt", "last.ckpt"], {"best.ckpt": (1.0, 5), "last.ckpt": (2.0, 9)}, False),
        (["ema-1_5.ckpt", "net-1_5.ckpt"], {"net-1_5.ckpt": (2.0, 5)}, False),
        (["net-1_5.ckpt", "old//net-1_5.ckpt"], {}, False),
        (["net-1_5.ckpt", "net_1-1_5.ckpt"], {}, False),
        (["net-1_5.ckpt", "net-1_5_breakpoint.ckpt"], {}, False),
        (["ema-1_5.ckpt", "net-1_6.ckpt"], {}, False),
    ],
    ids=str,
)
def test_what_is_as_new(files: list[str], notes: Notes, equal: bool) -> None:
    for found in (order(files, notes), order(files[::-1], notes)):
        first, second = found
        assert found.equals(first) == ([second] if equal else [])


@pytest.mark.parametrize(
    ("files", "notes", "expected"),
    [
        (["net-1_100", "net-1_200"], {"net-1_100": (9.0, 100), "net-1_200": (5.0, 200)},
         {"net-1_100": "recorded after .* clock"}),
        (["net-1_100", "net-1_200"], {"net-1_100": (4.0, 100), "net-1_200": (5.0, 200)}, {}),
        (["net-1_900", "net-1_800", "net_1-1_50"], {}, {"net-1_900": "is of a later run"}),
        (["net-1_10", "net_1-1_50"], {}, {}),
        (["ema-1_10", "net-1_15"], {}, {"ema-1_10": "'net-1_15.ckpt' is taken for newer; if this one"}),
        (["more-1_5", "net-1_10"], {"more-1_5": (9.0, 5)}, {"more-1_5": "is taken for newer"}),
        (["old//net-1_5", "net-1_15"], {}, {}),
        (["net-1_15", "new//net-1_5"], {}, {"new/net-1_5": "is taken for newer"}),
        (["net-1_15", "llama_7b"], {}, {"llama_7b": "is taken for newer"}),
        (["net-1_5", "copy//net-1_5"], {"net-1_5": (0.0, 5)}, {"copy/net-1_5": "as new by its name .* recorded"}),
        (["net-1_5", "copy//net-1_5"], {}, {"copy/net-1_5": "as new by its name .* directory itself"}),
    ],
)  # fmt: skip
def test_what_is_said_of_others(files: list[str], notes: Notes, expected: dict[str, str]) -> None:
    found = order([f"{file}.ckpt" for file in files], {f"{file}.ckpt": told for file, told in notes.items()})
    remarks = {remark.title.replace(".ckpt", ""): remark.reason for remark in found.remarks(next(iter(found)))}
    assert remarks.keys() == expected.keys()
    for title, reason in expected.items():
        assert re.search(reason, remarks[title])


def ranks(name: str, count: int = 3) -> list[str]:
    return [f"rank_{rank}/{name.format(rank)}" for rank in range(count)]


def test_a_prefix_with_a_rank_in_it_splits_and_moves_nothing() -> None:
    files = [file for step in (5, 10) for file in ranks(f"lora_rank_8-1_{step}.ckpt", 10)]
    found = list(order(files, dict.fromkeys(files, (1.0, 5))))
    assert [candidate.title for candidate in found] == ["lora_rank_8-1_10.ckpt", "lora_rank_8-1_5.ckpt"]
    assert all(sorted(candidate.files) == list(range(10)) for candidate in found)
    assert all([record.rank for record in candidate.records] == list(range(10)) for candidate in found)
    both = order([*ranks("lora_rank_8-1_5.ckpt", 10), *ranks("lora_rank_4-1_5.ckpt", 10)])
    assert [len(candidate.files) for candidate in both] == [10, 10]


def test_records_of_a_save_that_differs_in_such_a_number_are_not_taken() -> None:
    eight, four = ranks("lora_rank_8-1_5.ckpt"), ranks("lora_rank_4-1_5.ckpt")
    found = {c.title: c for c in order([*eight, *four], dict.fromkeys(eight, (1.0, 5)))}
    assert len(found["lora_rank_8-1_5.ckpt"].records) == 3
    assert found["lora_rank_4-1_5.ckpt"].records == ()


def test_what_transform_writes_is_one_checkpoint() -> None:
    (found,) = order(ranks("net{}.ckpt"))
    assert found.title == "net.ckpt" and sorted(found.files) == [0, 1, 2]


def test_files_beside_rank_folders_are_seen() -> None:
    """A single device goes on in the directory of a job of three."""
    found = order([*ranks("net-1_5.ckpt"), "net-1_9.ckpt", "net-1_5.ckpt"])
    assert [candidate.title for candidate in found] == ["./net-1_9.ckpt", "./net-1_5.ckpt", "net-1_5.ckpt"]
    assert [len(candidate.files) for candidate in found] == [1, 1, 3]
    assert prefix_of("./net-1_9.ckpt") == "net"


def test_ranks_in_one_folder_on_two_hosts() -> None:
    """Each host sees its own files; what a number in a name means is known only from both together."""
    places = [seen([f"net_rank_{rank}-1_5.ckpt" for rank in half]) for half in ((0, 1), (2, 3))]
    sent = [[folder_from_json(folder_to_json(place)) for place in host] for host in places]
    assert sent == places
    (found,) = candidates(sent)
    assert sorted(found.files) == [0, 1, 2, 3] and found.title == "net_rank_-1_5.ckpt"


UNRECORDED = [*ranks("net-1_10.ckpt"), *ranks("net-1_12_breakpoint.ckpt")]
RECORDED: Notes = dict.fromkeys(ranks("net-1_10.ckpt"), (1.0, 10))


def unrecorded(files: list[str], sizes: Optional[Mapping[str, int]] = None) -> Candidate:
    return next(candidate for candidate in order(files, RECORDED, sizes=sizes) if not candidate.records)


def test_a_save_without_records_is_of_the_job_whose_files_are_alike() -> None:
    found = unrecorded(UNRECORDED)
    assert found.title == "net-1_12_breakpoint.ckpt"
    assert found.alike is not None and found.alike.title == "net-1_10.ckpt"
    assert found.homes() == ["net-1_10.ckpt"] and not found.whole


@pytest.mark.parametrize(
    ("files", "sizes", "reason"),
    [
        (UNRECORDED, {"rank_1/net-1_12_breakpoint.ckpt": 99}, "its files differ in size from those of 'net-1_10.ckpt'"),
        (UNRECORDED[:-1], {}, "the files of rank 2 are missing, which 'net-1_10.ckpt' has"),
        ([*UNRECORDED[:3], *ranks("net_1-1_5.ckpt")], {}, "it is of another run than that of 'net-1_10.ckpt'"),
        ([*ranks("net-1_20.ckpt", 1), *ranks("net-1_10.ckpt")], {}, "the files of ranks 1, 2 are missing"),
    ],
)
def test_a_save_that_is_not_alike(files: list[str], sizes: dict[str, int], reason: str) -> None:
    found = unrecorded(files, sizes)
    assert found.alike is None and reason in found.unlike


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("net_1-1_50.ckpt", "net"),
        ("qwen_rank_-1_5.ckpt", "qwen"),
        ("qwen_rank__2-1_5.ckpt", "qwen"),
        ("best.ckpt", "best"),
    ],
)
def test_prefixes(name: str, prefix: str) -> None:
    assert prefix_of(name) == prefix
