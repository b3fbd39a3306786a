"""Run some code in a process of its own and learn by how many bytes its memory grew beyond the imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(imports: str, code: str, *arguments: Any) -> int:
    """Bytes of memory that only the process has (no libraries, no page cache), at most, above what imports took.

    Skips the test under an emulator, whose own memory, such as translated code, grows as well.
    """
    if os.environ.get("MS_CKPT_EXT_EMULATED"):
        import pytest  # not in the process that is measured

        pytest.skip("memory of an emulated process is the emulator's, too")
    command = [sys.executable, "-m", "tests.support.peak", imports, code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["grown"])


def anonymous() -> int:
    """Bytes of memory that only this process has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def main() -> None:
    imports, code, *arguments = sys.argv[1:]
    names: dict[str, Any] = {"arguments": arguments}
    exec(imports, names)
    before = anonymous()
    peak = [before]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    exec(code, names)
    print(json.dumps({"grown": max(peak[0], anonymous()) - before}))


if __name__ == "__main__":
    main()
