"""The harness tells a rank that MindSpore crashed at its very end from one that failed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.harness.msrun import run_msrun

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def run(tmp_path: Path, code: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nprint('came with', *sys.argv[1:])\n{code}\n")
    return run_msrun(script, "this", ranks=1, tmp_path=tmp_path).worker(0)


def test_a_crash_after_the_end_is_a_warning_that_shows_where_it_was(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="signal 11 after the script had ended\n(?s:.*)Segmentation fault"):
        assert "came with this" in run(tmp_path, f"import atexit; atexit.register(lambda: exec({CRASH!r}))")


@pytest.mark.parametrize("code", [CRASH, "raise SystemExit(3)", "1 / 0"])
def test_any_other_end_is_a_failure(tmp_path: Path, code: str) -> None:
    with warnings.catch_warnings(), pytest.raises(AssertionError, match="on 1 ranks"):
        warnings.simplefilter("error")
        run(tmp_path, code)
