"""What the machine is made out to be, at the doors of the operating system."""

from __future__ import annotations

import builtins
import io
from typing import Any

import pytest

BOOT_FILE = "/proc/sys/kernel/random/boot_id"


def booted(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    """The machine was started anew: its boot is called so."""
    real = builtins.open

    def opened(path: Any, *args: Any, **more: Any) -> Any:
        return io.BytesIO(name) if path == BOOT_FILE else real(path, *args, **more)

    monkeypatch.setattr(builtins, "open", opened)
