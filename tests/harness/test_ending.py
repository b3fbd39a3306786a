"""Scripts that are told to end leave neither processes nor files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import pytest

from tests.harness.ending import descendants, running
from tests.hostile.seeds import SCRATCH

ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = """
import subprocess, sys, tempfile
from tests.harness.ending import taking_all_along

with taking_all_along(grace=0.2), tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
    many = "(sleep 600 & setsid sleep 600 & echo started; exec sleep 600)"
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('started', flush=True); time.sleep(600)"
    started = [
        subprocess.Popen(["sh", "-c", f"({many} &)"], stdout=subprocess.PIPE),
        subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, start_new_session=True),
    ]
    for each in started:
        each.stdout.readline()
    open(f"{folder}/ready", "w").close()
    started[1].wait()
"""


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def told_to_end(command: list[str], folder: Path, sign: str, number: int, **more: str) -> tuple[int, list[int]]:
    """Run a command, send it a signal when a path below `folder` that fits `sign` is there; how it ended, and which of
    its descendants still run."""
    log = folder.parent / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **more}
        )
    try:
        wait_until(lambda: any(folder.glob(sign)) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        family = descendants(process.pid)
        process.send_signal(number)
        code = process.wait(60)
    finally:
        process.kill()
    return code, running(family)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)],
    ids=lambda value: str(value),
)
def test_descendants_end_and_the_folder_is_removed(number: int, code: int, tmp_path: Path) -> None:
    """Also orphans, those with a session of their own, and one that takes no notice of SIGTERM."""
    work = tmp_path / "work"
    work.mkdir()
    got, left = told_to_end([sys.executable, "-c", _SCRIPT, str(work)], work, "*/ready", number)
    assert (got, left, [*work.iterdir()]) == (code, [], [])


def test_shell_scripts(tmp_path: Path) -> None:
    """`make_scratch` of _venv.sh removes the folder that they share."""
    work = tmp_path / "work"
    work.mkdir()
    script = f"set -euo pipefail\nsource {ROOT}/scripts/_venv.sh\nTMPDIR={work} make_scratch\n"
    script += '(setsid sleep 600) &\nsleep 0.1\ntouch "$scratch/ready"\nsleep 600\n'
    code, left = told_to_end(["bash", "-c", script], work, "*/ready", signal.SIGTERM)
    assert (code, left, [*work.iterdir()]) == (-signal.SIGTERM, [], [])


@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (["bench", "offline", "--size", "0.001", "--rounds", "1000"], "*/*"),
        (["bench", "dryrun", "--ranks", "64", "--layers", "1", "--rounds", "1000"], "*/plan.json"),
        (["bench", "all", "--only", "dryrun"], "*/*/shapes.json"),
        (["chaos", "--runs", "1000", "--job", "merge"], "chaos-*/run-*/*"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_scripts(words: list[str], sign: str, tmp_path: Path) -> None:
    if words[0] == "chaos" and shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("scripts/chaos needs a C compiler")
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:], "--dir", str(work)]
    code, left = told_to_end(command, work, sign, signal.SIGTERM)
    assert (code, left, [*work.iterdir()]) == (143, [], [])


def test_a_search_of_hostile_input(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "tests.hostile", "--only", "ini", "--blind", "--keep", str(tmp_path / "found")]
    code, left = told_to_end(command, work, "*/*/job.ini", signal.SIGTERM, **{SCRATCH: str(work)})
    assert (code, left, [*work.iterdir()]) == (143, [], [])
