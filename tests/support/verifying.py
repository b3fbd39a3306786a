"""`verify`, when it is known what kind of answer it gives."""

from __future__ import annotations

from typing import Any

from ms_ckpt_ext import verify
from ms_ckpt_ext.engine.integrity.compare import Comparison
from ms_ckpt_ext.engine.integrity.soundness import Health


def compared(*paths: Any, **options: Any) -> Comparison:
    """Two checkpoints."""
    found = verify(*paths, **options)
    assert isinstance(found, Comparison)
    return found


def checked(path: Any, **options: Any) -> Health:
    """One by itself."""
    found = verify(path, **options)
    assert isinstance(found, Health)
    return found
