"""Running `ms-ckpt`: in this process where only words and codes matter, else the installed script."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.cli.command import Command
from ms_ckpt_ext.cli.main import run_line

ROOT = Path(__file__).resolve().parent.parent.parent


class Ran(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str


def run(*argv: object, listed: Optional[Sequence[Command]] = None) -> Ran:
    """One command line, in this process; of these commands, by default of all."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_line([str(word) for word in argv], listed)
    return Ran(int(code), out.getvalue(), err.getvalue())


def fine(*argv: object, code: int = 0) -> str:
    """The output of a command line that ends with `code` and has nothing to complain of."""
    ran = run(*argv)
    assert (ran.code, ran.err) == (code, ""), ran
    return ran.out


def as_json(*argv: object, code: int = 0) -> Any:
    """The JSON document that a command line prints."""
    return json.loads(fine(*argv, "--json", code=code))


def script() -> list[str]:
    """The installed `ms-ckpt`, or the module where the environment has no script."""
    installed = Path(sys.executable).parent / "ms-ckpt"
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "ms_ckpt_ext"]


def environment(**changed: str) -> Mapping[str, str]:
    """The environment of a script that runs this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **changed}


def run_script(*argv: object, **changed: str) -> Ran:
    """One command line, by the installed script."""
    done = subprocess.run(
        [*script(), *map(str, argv)], capture_output=True, text=True, env=environment(**changed), check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)
