"""MindSpore for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def ms() -> Iterator[Any]:
    """MindSpore on the CPU. This process keeps the cores that it may use, which stock's merge changes."""
    import mindspore

    mindspore.set_device("CPU")
    allowed = os.sched_getaffinity(0)
    yield mindspore
    os.sched_setaffinity(0, allowed)
