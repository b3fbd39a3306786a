"""The harness tells a rank that MindSpore crashed at its very end from one that failed, and removes what both left."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path

import pytest

from tests.harness.hccl_worker import COUNT
from tests.harness.msrun import run_msrun

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
AT_EXIT = f"import atexit; atexit.register(lambda: exec({CRASH!r}))"
ABORT_AT_EXIT = f"import atexit; atexit.register(lambda: exec({CRASH.replace('SEGV', 'ABRT')!r}))"
_DIES = """
import ctypes, json, os, signal, sys, tempfile, time
from pathlib import Path
from tests.harness.hccl_worker import COUNT, INT8, U64, root_info

if os.environ["MS_ROLE"] == "MS_SCHED":
    raise SystemExit
rank, folder = int(os.environ["RANK_ID"]), Path(sys.argv[1])
hccl, comm = ctypes.CDLL("libhccl.so"), ctypes.c_void_p()
assert hccl.HcclCommInitRootInfo(2, root_info(hccl, folder, rank), rank, ctypes.byref(comm)) == 0
if rank == 1:
    (folder / "met").touch()
    while not (folder / "sent").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
while not (folder / "met").exists():
    time.sleep(0.01)
os.environ["CANNEMU_TIMEOUT"] = "0"  # nothing will come
assert hccl.HcclAllGather(bytes(COUNT), ctypes.create_string_buffer(2 * COUNT), U64(COUNT), INT8, comm, None) != 0
tempfile.mkstemp(prefix="left-")
print(json.dumps([[str(path), path.stat().st_size] for path in Path(tempfile.gettempdir()).rglob("*")]))
(folder / "sent").touch()
"""
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


@pytest.mark.ascend
def test_files_of_a_killed_rank_are_removed(tmp_path: Path) -> None:
    """The message that it did not fetch, and a temporary file."""
    script = tmp_path / "script.py"
    script.write_text(_DIES)
    result = run_msrun(script, tmp_path, ranks=2, tmp_path=tmp_path, device="ascend", expect_failure=True)
    assert result.returncodes == (0, -signal.SIGKILL)
    seen = {Path(path): size for path, size in json.loads(result.worker(0).splitlines()[0])}
    (message,) = (path for path, size in seen.items() if path.parent.name.startswith("cannemu-") and size > COUNT)
    scratch = message.parent.parent
    assert [path for path in seen if path.parent == scratch and path.name.startswith("left-")]
    assert not scratch.exists()
