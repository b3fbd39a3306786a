"""`rank.py MARK SCRIPT ARGS…`: run a worker script, and leave the file MARK when it has come to its end.

So a process that MindSpore crashes while it takes itself down, after all was done, is told from one that failed.
"""

from __future__ import annotations

import runpy
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    mark, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    Path(mark).touch()
