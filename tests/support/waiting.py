"""Waits of tests, which all have an end."""

from __future__ import annotations

import time
from typing import Callable

SOON = 10.0
"""Seconds that are enough on a busy machine."""


def comes(condition: Callable[[], bool]) -> bool:
    """Whether `condition` holds soon."""
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()
