"""The harness tells a rank that MindSpore crashed at its very end from one that failed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.harness.msrun import run_msrun

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
AT_EXIT = f"import atexit; atexit.register(lambda: exec({CRASH!r}))"
ABORT_AT_EXIT = f"import atexit; atexit.register(lambda: exec({CRASH.replace('SEGV', 'ABRT')!r}))"
IN_A_THREAD = f"import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), exec({CRASH!r}))).start()"


def run(tmp_path: Path, code: str, ranks: int = 1) -> str:
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nprint('came with', *sys.argv[1:])\n{code}\n")
    return run_msrun(script, "this", ranks=ranks, tmp_path=tmp_path).worker(0)


def test_a_crash_after_the_end_is_a_warning_that_shows_where_it_was(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="SIGSEGV after its script had ended\nFatal Python error: Segmentation fault"):
        assert "came with this" in run(tmp_path, AT_EXIT)


@pytest.mark.parametrize(
    ("code", "ranks"),
    [(CRASH, 1), ("raise SystemExit(3)", 1), ("1 / 0", 1), (AT_EXIT, 2), (ABORT_AT_EXIT, 1), (IN_A_THREAD, 1)],
    ids=["before the end", "exit code", "exception", "two ranks", "another signal", "in a thread"],
)
def test_any_other_end_is_a_failure(tmp_path: Path, code: str, ranks: int) -> None:
    with warnings.catch_warnings(), pytest.raises(AssertionError, match=f"on {ranks} ranks"):
        warnings.simplefilter("error")
        run(tmp_path, code, ranks)
