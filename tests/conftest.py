"""What every test may use. Helpers lie in `tests/support`, processes and devices in `tests/harness`."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.permissions import obey_modes
from tests.harness.stock_memory import let_stock_merge

if TYPE_CHECKING:
    from tests.support.machine import ReadMade

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden"

# Before the first import of mindspore, here and in every process that a test starts.
os.environ.setdefault("GLOG_v", "3")
let_stock_merge()
obey_modes()


def _free_memory() -> int:
    """Bytes that processes may still ask for: what others keep in /dev/shm is not among them."""
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0
    return int(told["MemAvailable"].split()[0]) << 10


# Jobs sync what they write, for which a disk takes far longer than for all else that tests do: where there is memory
# enough, for the files and for the processes that come beside them, temporary files lie there.
_MEMORY, _ROOM = "/dev/shm", 8 << 30
_THERE = os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free >= _ROOM
if _THERE and _free_memory() >= 2 * _ROOM:
    os.environ.setdefault("TMPDIR", _MEMORY)
    tempfile.tempdir = None  # it may have been asked for already

# What runs in the background of a shell ignores Ctrl-C, and so would the commands that tests send one to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_LONG = ("bridge/mindformers", "e2e", "docs", "live", "transport/test_job_transports", "scripts")
"""What takes longest for a file begins first, so that no worker is left alone with it in the end."""

# No deadlines: the machines that run this are shared, and a slow example is not a wrong one.
_COMMON = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", _COMMON, max_examples=50)
settings.register_profile("ci", _COMMON, max_examples=100, derandomize=True, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long before all others, in the order of `_LONG`; else the order stays."""
    places = tuple(f"tests/{name}" for name in _LONG)

    def turn(item: pytest.Item) -> int:
        return next((number for number, place in enumerate(places) if item.nodeid.startswith(place)), len(places))

    items.sort(key=turn)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files that MindSpore wrote; its README tells which is what. Read only."""
    return GOLDEN


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[ReadMade]:
    """A list that grows by every read of a file from now on."""
    from tests.support.machine import watch_reads

    return watch_reads(monkeypatch)


@pytest.fixture(scope="session", autouse=True)
def _leaves_no_trace() -> Iterator[None]:
    """Fails the session when a test leaves or changes files in the project. In CI only: elsewhere people edit it."""
    if not os.environ.get("CI"):
        yield
        return
    before = _tree()
    yield
    after = _tree()
    touched = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if touched:
        pytest.fail(f"the tests left or changed files in the project (use tmp_path): {touched[:20]}")


def _tree() -> dict[str, tuple[int, int]]:
    """Path -> (size, modification time) of every file, caches and hidden folders aside."""
    found = {}
    for folder, names, files in os.walk(ROOT):
        names[:] = [n for n in names if not n.startswith(".") and n != "__pycache__" and not n.endswith(".egg-info")]
        for name in files:
            path = os.path.join(folder, name)
            status = os.stat(path)
            found[os.path.relpath(path, ROOT)] = (status.st_size, status.st_mtime_ns)
    return found
