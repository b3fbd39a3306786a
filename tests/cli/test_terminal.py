"""On a terminal: colours unless NO_COLOR says no, tables that fit, progress with rate and time left."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from pathlib import Path

from ms_ckpt_ext.cli import words
from tests.support.command_line import environment, script


def on_terminal(*argv: object, columns: int = 100, **changed: str) -> str:
    """What a command line writes to a terminal of so many columns, both outputs together."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**environment(TERM="xterm", **changed)}
    del env["COLUMNS"]
    running = subprocess.Popen([*script(), *map(str, argv)], stdout=secondary, stderr=secondary, env=env)
    os.close(secondary)
    told = b""
    while True:
        try:
            part = os.read(primary, 1 << 16)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        told += part
    os.close(primary)
    assert running.wait() == 0, told
    return told.decode().replace("\r\n", "\n")


def test_a_wide_terminal(golden: Path) -> None:
    out = on_terminal("inspect", golden / "full", "--match", "head.*")
    assert "\033[1mparameter    dtype  shape        size\033[0m\nhead.weight  F32    [96, 24]  9.0 KiB\n" in out


def test_a_narrow_terminal_without_colours(golden: Path) -> None:
    out = on_terminal("inspect", golden / "full", "--match", "adam_m.head.*", columns=40, NO_COLOR="1")
    assert "\033" not in out
    assert "parameter\n    dtype  shape        size\nadam_m.head.weight\n    F32    [96, 24]  9.0 KiB\n" in out


def test_progress_has_a_rate_and_the_time_left(golden: Path) -> None:
    case = golden / "dp2_tp4"
    out = on_terminal("verify", case / "shards", golden / "full", "--strategy", case / "strategy.ckpt")
    first, last = out.split("\r")[1], out.split("\r")[-1]
    assert first.startswith("verify:   0%|")
    assert "/186k [00:00<?, ?B/s]" in first
    assert "\033[32mSame\033[0m: 42 parameters" in last
    silent = on_terminal("verify", golden / "full", golden / "full", TQDM_DISABLE="1")
    assert silent.startswith("\033[32mSame")


def test_text_and_numbers() -> None:
    assert [words.size(n) for n in (0, 1023, 1024, 1 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.0 MiB",
        "5.0 TiB",
    ]
    assert words.ranges([]) == ""
    assert words.ranges([0, 1, 3, 4, 5, 9]) == "0, 1, 3-5, 9"
    names = {"a.0.w": "x", "a.1.w": "x", "a.2.w": "y", "a.4.w": "x", "b": "x"}
    assert words.folded(names) == [("a.[0-1,4].w", "x"), ("a.2.w", "y"), ("b", "x")]
