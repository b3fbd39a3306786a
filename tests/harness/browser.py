"""Opens a page in headless Chromium, without network, and hands back what came of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--window-size=1180,2950",
]


class Opened(NamedTuple):
    """The document after its scripts ran, and what it said on the console."""

    dom: str
    console: list[str]


def chromium() -> Optional[str]:
    """The browser, where there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def open_page(page: Path, *flags: str) -> Opened:
    """Open a file. Raises AssertionError when the browser itself fails."""
    browser = chromium()
    assert browser is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Opened(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
