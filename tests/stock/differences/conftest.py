"""Every test of this folder calls MindSpore."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _called(ms: Any) -> None:
    """Set up for tests that do not name it."""
