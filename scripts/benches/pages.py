"""Measures for the pages: runs benchmarks, and writes their tables where the pages have places for them.

A place is what stands between `<!-- bench NAME -->` and `<!-- end -->`, in whatever page of docs/, in every language:
the command, the table, and when and where it was measured. Parts are processes of their own, so one that fails leaves
its table as it is, and the others are measured all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
Row = Mapping[str, Any]


class Part(NamedTuple):
    """A benchmark of the pages: its arguments, and the columns of its table."""

    arguments: str
    columns: str


FILE_JOBS = (
    "job | s | x cp and sync | peak MiB | read / output | s, sync=False | x cp | least x cp | most x cp | "
    "stock s | stock MiB"
)
PARTS = {
    "offline": Part("--size 1.5 --rounds 5 --stock", FILE_JOBS),
    "live": Part(
        "--size 1.5 --rounds 3 --stock",
        "command | merge s | load s | least | most | warm s | x stock | x PyTorch | peak MiB",
    ),
    "convert": Part("--size 1.5 --rounds 3 --stock", FILE_JOBS),
    "export": Part("--size 3 --rounds 3", FILE_JOBS),
    "verify": Part("--size 1.5 --rounds 3", "command | seconds | GiB/s | slowest GiB/s | peak MiB"),
    "plan": Part(
        "--rounds 1",
        "ranks | distinct slices | strategy and headers s | planning s | µs per slice | whole merge s | peak MiB",
    ),
    "tensors": Part("--rounds 3", "job | user s | system s | peak MiB"),
    "transfer": Part("--rounds 1", "command | times | first s | later s | least | most | peak MiB"),
    "control": Part(
        "--rounds 5 --ranks 64 1024 8192",
        "ranks | what | wall ms | hub's CPU ms | hub's kB | over the backend, MB a process",
    ),
    "dryrun": Part(
        "--rounds 1 --ranks 1024 8192",
        "ranks | job | seconds | processor s | peak MiB | read calls | rounds | messages | page kB",
    ),
    "crypto": Part("--size 0.25 --rounds 4", "container | cipher | encrypt 1 | encrypt 2 | decrypt 1 | decrypt 2"),
}
"""Name -> how it is run for the pages, in their order."""


def measure_for_pages(arguments: argparse.Namespace, root: Path = ROOT) -> list[dict[str, Any]]:
    """Measure what the pages show, and write it into them."""
    told = []
    for name in arguments.only or PARTS:
        began = time.monotonic()
        done = _measured(name, arguments, root)
        took = f"{time.monotonic() - began:.0f} s"
        told.append({"part": name, "pages": ", ".join(done) or "FAILED: left as they are", "took": took})
        print(f"{name}: {told[-1]['pages']} ({took})", flush=True)
    return told


def _measured(name: str, arguments: argparse.Namespace, root: Path) -> list[str]:
    """Run one; the pages that were written, none if it failed."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(root / "scripts" / "bench"), name, *PARTS[name].arguments.split()]
        command += ["--dir", folder, "--json", str(figures)]
        if name == "live" and arguments.torch_python:
            command += ["--torch-python", arguments.torch_python]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if ran.returncode:
            print(ran.stdout[-2000:], file=sys.stderr)
            return []
        return write_into(root / "docs", name, json.loads(figures.read_text()))


def write_into(docs: Path, name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Put a table into every page that has a place for it; names of the pages.

    Raises:
        SystemExit: no page has.
    """
    place = re.compile(rf"(<!-- bench {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = section(name, rows)
    written = []
    for page in sorted(docs.rglob("*.md")):
        held = page.read_text(encoding="utf-8")
        if place.search(held):
            page.write_text(place.sub(lambda found: found[1] + text + found[2], held), encoding="utf-8")
            written.append(page.relative_to(docs).as_posix())
    if not written:
        raise SystemExit(f"no page of {docs} has a place <!-- bench {name} --> … <!-- end -->")
    return written


def section(name: str, rows: list[dict[str, Any]]) -> str:
    """What a page has of a part."""
    part = PARTS[name]
    if part.columns == FILE_JOBS:
        rows = by_job(rows)
    elif name == "crypto":
        rows = by_cipher(rows)
    table = _markdown(rows, part.columns.split(" | "))
    return f"    scripts/bench {name} {part.arguments}    # {_where()}\n\n{table}\n"


def _markdown(rows: Iterable[Row], columns: list[str]) -> str:
    """A table; columns that no row has are left out."""
    rows = list(rows)
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [shown, ["---" if any(isinstance(row.get(name), str) for row in rows) else "---:" for name in shown]]
    lines += [[_figure(row.get(name)) for name in shown] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and abs(value) >= 100:
        value = round(value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def by_job(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each job: with sync, without, and stock MindSpore's side by side; `cp` is in the ratios."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        job, command = row["job"], row["command"]
        if command in ("cp", "cp and sync"):
            continue
        named = command.startswith(("ms_ckpt_ext", "stock"))
        line = found.setdefault(job if named else f"{job}, {command}", {"job": job if named else f"{job}, {command}"})
        if command.startswith("stock"):
            line.update({"stock s": row["seconds"], "stock MiB": row["peak MiB"]})
        elif command == "ms_ckpt_ext, sync=False":
            line.update(
                {"s, sync=False": row["seconds"]} | {key: row[key] for key in ("x cp", "least x cp", "most x cp")}
            )
        else:
            line.update(
                {"s": row["seconds"]} | {key: row[key] for key in ("x cp and sync", "peak MiB", "read / output")}
            )
    return list(found.values())


def by_cipher(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cipher: GB/s, and in brackets the multiple of OpenSSL's own."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        container, cipher = row["container"], row["cipher"]
        line = found.setdefault((container, cipher), {"container": container, "cipher": cipher})
        line[f"{row['direction']} {row['threads']}"] = f"{row['GB/s']} ({row['of openssl']})"
    return list(found.values())


def _where() -> str:
    """When and on what."""
    cores = len(os.sched_getaffinity(0))
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{time.strftime('%Y-%m-%d')}; {cores} cores, {_processor()}; Python {python}, MindSpore {_mindspore()}"


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    found = re.search(r"^model name\s*: (.*)$", told, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _mindspore() -> str:
    try:
        return version("mindspore")
    except PackageNotFoundError:
        return "not installed"
