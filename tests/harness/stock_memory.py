"""Keeps stock MindSpore's merges from waiting for memory.

After every file that it writes, stock `unified_safetensors` sleeps, a second at a time, silently and without end,
while more than half of the machine's memory is in use (2.10.0). Where much lies in /dev/shm, or other jobs run, that is
always so.
"""

from __future__ import annotations

from typing import Any


def let_stock_merge() -> None:
    """From here on, and in what this process forks, psutil says that no memory is in use."""
    try:
        import psutil
    except ImportError:  # then there is no MindSpore either
        return
    asked = psutil.virtual_memory

    def unused() -> Any:
        return asked()._replace(percent=0.0)

    psutil.virtual_memory = unused
