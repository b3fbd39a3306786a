"""The benchmark runs and tells what it should; how fast is not a test's business."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.chosen import long_one

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"


def test_offline(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "offline", "--size", "0.0005", "--rounds", "1", "--dir", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {row["command"] for row in rows} == {"ms_ckpt_ext", "ms_ckpt_ext, sync=False", "cp", "cp and sync"}
    assert len({row["job"] for row in rows}) == 3
    assert all(
        row["seconds"] > 0 and row["x cp"] > 0 and row["x cp and sync"] > 0 and row["peak MiB"] >= 0 for row in rows
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_export(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "export", "--size", "0.001", "--rounds", "1", "--dir", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {row["job"] for row in rows} == {"export of qwen3", "export of qwen3-moe"}
    assert all(row["seconds"] > 0 and row["x cp"] > 0 and row["output bytes"] > 1 << 18 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.msrun
def test_live(tmp_path: Path) -> None:
    """One start of 4 ranks; they compare every byte themselves. The peer that cannot be had is left out, and told."""
    command = [sys.executable, str(BENCH), "live", "--size", "0.001", "--rounds", "1", "--dir", str(tmp_path)]
    command += ["--torch-python", "no-such-python", "--json", str(tmp_path / "x.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "PyTorch is left out" in run.stdout
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["command"] == "ms_ckpt_ext"
    assert row["load s"] > 0
    assert row["peak MiB"] < 64
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.msrun
def test_transfer(tmp_path: Path) -> None:
    """One start of 4 ranks for each way; they compare every byte themselves."""
    long_one("three starts of a job")
    command = [sys.executable, str(BENCH), "transfer", "--size", "0.001", "--rounds", "1", "--dir", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr + run.stdout
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["command"] for row in rows] == ["run() of a plan", "transfer, planned anew", "saved and loaded"]
    assert all(row["first s"] > 0 and row["later s"] > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("layers", [8, 5, 1])
def test_dryrun(layers: int, tmp_path: Path) -> None:
    """Also of fewer layers than stages."""
    command = [sys.executable, str(BENCH), "dryrun", "--ranks", "128", "--layers", str(layers), "--rounds", "1"]
    command += ["--dir", str(tmp_path), "--json", str(tmp_path / "x.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [(row["ranks"], row["job"]) for row in rows] == [
        (128, "resume with tp4"),
        (128, "without optimizer sharding"),
    ]
    assert all(row["rounds"] >= 1 and row["peak MiB"] > 0 and row["page kB"] < 300 for row in rows)
    assert layers < 8 or all(row["rounds"] > 1 for row in rows)


def test_a_command_that_fails_is_told(benches: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """A dry run without its shapes: the command's own words, and nothing about figures that it did not write."""
    dryrun = benches("dryrun")
    source = dryrun._strategy(dryrun._parameters(1, 1), tmp_path / "a.ckpt", 1, 8, sharded=True)
    with pytest.raises(SystemExit, match="shapes.json"):
        dryrun._row(tmp_path, 8, "a job", source, source)


def test_control(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "control", "--ranks", "8", "300", "--rounds", "1"]
    command += ["--json", str(tmp_path / "x.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {(row["ranks"], row["what"]): row for row in json.loads((tmp_path / "x.json").read_text())}
    assert [*rows] == [(n, what) for n in (8, 300) for what in ("status", "agree", "share", "survey")]
    for ranks in (8, 300):
        assert rows[ranks, "status"]["hub's kB"] == ranks * 32 / 1000, "16 bytes each way, whatever the number of ranks"
        assert rows[ranks, "agree"]["hub's kB"] == ranks * 64 / 1000
    assert (
        rows[8, "survey"]["over the backend, MB a process"] == 0 < rows[300, "survey"]["over the backend, MB a process"]
    )
    assert rows[300, "survey"]["hub's kB"] < 16_000


def test_verify(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "verify", "--size", "0.0005", "--rounds", "1", "--dir", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["command"] for row in rows][-1] == "cat both"
    assert all(row["GiB/s"] >= 0 and row["peak MiB"] < 200 for row in rows)


def test_convert(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "convert", "--size", "0.001", "--rounds", "1", "--dir", str(tmp_path)]
    run = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    assert [
        (row["job"], row["command"]) for row in rows if row["command"] in ("ms_ckpt_ext", "encrypt", "decrypt")
    ] == [
        ("ckpt_to_safetensors", "ms_ckpt_ext"),
        ("safetensors_to_ckpt", "ms_ckpt_ext"),
        ("AES-256-GCM", "encrypt"),
        ("AES-256-GCM", "decrypt"),
        ("one of eight ranks' slices", "ms_ckpt_ext"),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="compares with the command `openssl speed`")
def test_crypto(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "crypto", "--size", "0.001", "--rounds", "1", "--only", "sm4-cbc"]
    command += ["--dir", str(tmp_path), "--json", str(tmp_path / "x.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "x.json").read_text())
    cores = len(os.sched_getaffinity(0))
    threads = sorted({1, cores})
    assert [(row["direction"], row["threads"]) for row in rows] == [
        (d, n) for d in ("encrypt", "decrypt") for n in threads
    ]
    assert all(row["GB/s"] > 0 and row["of openssl"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "required"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["offline", "--rounds", "no"], "expected a whole number from 1 up, got 'no'"),
        (["offline", "--rounds", "0"], "expected a whole number from 1 up, got '0'"),
        (["offline", "--size", "-1"], "expected a number of GiB above 0 and up to 1024, got '-1'"),
        (["verify", "--size", "nan"], "expected a number of GiB above 0 and up to 1024, got 'nan'"),
        (["crypto", "--size", "inf"], "expected a number of GiB above 0 and up to 1024, got 'inf'"),
        (["crypto", "--only", "rot13"], "invalid choice: 'rot13'"),
        (["dryrun", "--ranks", "100"], "expected a multiple of 64, got '100'"),
        (["control", "--ranks", "-8"], "expected a whole number from 1 up, got '-8'"),
        (["mindformers", "--scale", "-3"], "expected a whole number from 1 up, got '-3'"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], told: str) -> None:
    run = subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "usage:" in run.stderr
    assert told in run.stderr


def test_a_python_without_the_dependencies_is_told() -> None:
    """Isolated and without its site-packages, as a system's Python is."""
    run = subprocess.run([sys.executable, "-IS", str(BENCH), "plan"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "lacks numpy, safetensors, " in run.stderr
    assert "scripts/test.sh" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return lambda name: importlib.import_module(f"benches.{name}")


@pytest.fixture
def pages(benches: Callable[[str], ModuleType]) -> ModuleType:
    return benches("pages")


def test_a_table_is_written_where_pages_have_a_place_for_it(pages: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "zh-CN").mkdir()
    before, after = (
        "# Title\n\n<!-- bench verify -->\n",
        "<!-- end -->\n\nText | with \\1\n<!-- bench plan -->\nold\n<!-- end -->\n",
    )
    for name in ("one.md", "zh-CN/one.md"):
        (tmp_path / name).write_text(f"{before}the old table\n{after}")
    (tmp_path / "other.md").write_text("<!-- bench plan -->\n<!-- end -->\n\n<!-- bench verify2 -->\n<!-- end -->\n")
    rows = [
        {"command": "a|b", "seconds": 0.5, "GiB/s": None, "peak MiB": 1234, "more": 1},
        {"command": "cat", "seconds": 1170.546, "GiB/s": None, "peak MiB": 2},
    ]
    assert pages.write_into(tmp_path, "verify", rows) == ["one.md", "zh-CN/one.md"]
    held = (tmp_path / "one.md").read_text()
    assert held == (tmp_path / "zh-CN" / "one.md").read_text()
    assert held.startswith(before) and held.endswith(after) and "the old table" not in held
    table = "| command | seconds | peak MiB |\n| --- | ---: | ---: |\n| a/b | 0.5 | 1,234 |\n| cat | 1,171 | 2 |\n"
    command = f"    scripts/bench verify {pages.PARTS['verify'].arguments}"
    assert re.search(rf"^{re.escape(command)}    # \d{{4}}-.*\n\n{re.escape(table)}<!-- end -->", held, re.MULTILINE)
    assert pages.write_into(tmp_path, "verify", rows) and (tmp_path / "one.md").read_text() == held
    assert pages.write_into(tmp_path, "plan", rows) == ["one.md", "other.md", "zh-CN/one.md"]
    held = (tmp_path / "other.md").read_text()
    assert held.count("scripts/bench plan") == 1 and held.endswith("-->\n\n<!-- bench verify2 -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="no page"):
        pages.write_into(tmp_path, "dryrun", rows)


def test_jobs_about_files_have_a_row_each(pages: ModuleType) -> None:
    """With sync, without, and stock stand side by side; what copies took is in the ratios."""
    told = {"job": "merge", "x cp": 2.0, "least x cp": 1.0, "most x cp": 3.0, "x cp and sync": 0.5, "peak MiB": 9}
    told["read / output"] = 1.5
    seconds = {"ms_ckpt_ext, sync=False": 1, "cp": 2, "ms_ckpt_ext": 3, "cp and sync": 4, "stock MindSpore": 5}
    rows = [{**told, "command": command, "seconds": n} for command, n in seconds.items()]
    rows += [{**told, "job": "AES", "command": command, "seconds": 6} for command in ("encrypt", "decrypt", "cp")]
    merge, encrypt, decrypt = pages.by_job(rows)
    columns = pages.FILE_JOBS.split(" | ")
    assert [merge[name] for name in columns] == ["merge", 3, 0.5, 9, 1.5, 1, 2.0, 1.0, 3.0, 5, 9]
    assert (encrypt["job"], decrypt["job"], encrypt["s"]) == ("AES, encrypt", "AES, decrypt", 6)
    assert "| 3 | 0.5 | 9 |" in pages.section("offline", rows)


def test_ciphers_have_a_row_each(pages: ModuleType) -> None:
    told = {"container": "chunked", "cipher": "AES", "GB/s": 2.5, "of openssl": 0.75}
    rows = [{**told, "direction": way, "threads": n} for way in ("encrypt", "decrypt") for n in (1, 2)]
    (row,) = pages.by_cipher(rows)
    assert [row[name] for name in pages.PARTS["crypto"].columns.split(" | ")] == ["chunked", "AES", *4 * ["2.5 (0.75)"]]


def test_every_part_of_the_pages_can_be_run_and_has_its_places(pages: ModuleType) -> None:
    """A page in each language; what `all` runs is what the command line takes."""
    told = {page: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))}
    for name, part in pages.PARTS.items():
        places = [page for page, text in told.items() if f"<!-- bench {name} -->\n" in text]
        assert len(places) == 2 and len({page.name for page in places}) == 1, name
        command = [sys.executable, str(BENCH), name, *part.arguments.split(), "--help"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    marked = {name for text in told.values() for name in re.findall(r"<!-- bench (\w+) -->", text)}
    assert marked == set(pages.PARTS)


def test_all_goes_on_after_a_part_that_fails(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scripts").mkdir()
    script = "import sys, json\nif sys.argv[1] == 'plan': sys.exit('no')\n"
    script += "json.dump([{'command': 'x', 'seconds': 1}], open(sys.argv[sys.argv.index('--json') + 1], 'w'))\n"
    (tmp_path / "scripts" / "bench").write_text(script)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("<!-- bench plan -->\nold\n<!-- end -->\n<!-- bench verify -->\nold\n<!-- end -->\n")
    arguments = argparse.Namespace(only=["plan", "verify"], dir=None, torch_python=None)
    told = pages.measure_for_pages(arguments, tmp_path)
    assert [row["pages"] for row in told] == ["FAILED: left as they are", "page.md"]
    assert "<!-- bench plan -->\nold\n" in page.read_text() and "| x | 1 |" in page.read_text()
