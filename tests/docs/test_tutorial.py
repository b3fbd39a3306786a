"""docs/tutorial.md is followed to the letter: its files are saved, its commands run, and print what the page says.

Times and rates, and the port where ranks meet, may differ. Both languages have the same blocks
(see test_pages.py), so one is enough.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.msrun import free_port

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
PORT = "--master_port=8118"
TIMES = re.compile(r"\d+\.\d s \([\d.]+ \w+/s\)")
SECONDS = 150


@pytest.mark.msrun
@pytest.mark.slow
def test_the_tutorial_works_as_written(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_"))}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    commands = 0
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        if language == "python":
            name, code = re.fullmatch(r"# (\w+\.py)\n(.*)", block, re.DOTALL).groups()  # type: ignore[union-attr]
            (tmp_path / name).write_text(code)
            continue
        assert language == "console"
        for command, _, output in (part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]):
            if command.startswith("export "):
                environment.update([command[len("export ") :].split("=")])
            else:
                assert TIMES.sub("T", done(command, tmp_path, environment)) == TIMES.sub("T", output), command
            commands += 1
    assert commands == TEXT.count("\n$ ") >= 12


def done(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a command prints; when it fails, the logs of its ranks are in the message."""
    ran = subprocess.run(
        ["bash", "-c", command.replace(PORT, f"--master_port={free_port()}")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    logs = "".join(f"---- {log.name}\n{log.read_text(errors='replace')[-3000:]}\n" for log in folder.rglob("*.log"))
    assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}\n{logs}"
    return ran.stdout


def test_ranks_meet_where_the_test_can_move_them() -> None:
    assert TEXT.count("msrun --") == TEXT.count(PORT) == 2
