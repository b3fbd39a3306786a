"""What the YAML entry says about loading."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional


class Options(NamedTuple):
    """How to load; see `engine.load.options.LoadOptions`. `workers` are reading threads of a rank."""

    mode: str = "auto"
    verify: str = "none"
    bucket_bytes: Optional[int] = None
    workers: int = 4
    hardware: str = ""

    @property
    def way(self) -> str:
        """The mode, or for "auto" what the environment variable MS_CKPT_EXT_MODE says."""
        return os.environ.get("MS_CKPT_EXT_MODE") or "auto" if self.mode == "auto" else self.mode
