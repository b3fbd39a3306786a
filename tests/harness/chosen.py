"""Which tests run: by default few of the long ones, in `scripts/e2e.sh` (MS_CKPT_EXT_E2E=all) all of them."""

from __future__ import annotations

import os

import pytest

ALL = os.environ.get("MS_CKPT_EXT_E2E") == "all"


def long_one(reason: str = "one of the long ones") -> None:
    """Skip the calling test in a default run."""
    if not ALL:
        pytest.skip(f"{reason}: scripts/e2e.sh runs it")
