"""`verify`, which must give the kind of answer that is expected."""

from __future__ import annotations

from typing import Any

from ms_ckpt_ext import verify
from ms_ckpt_ext.engine.integrity.compare import Comparison
from ms_ckpt_ext.engine.integrity.soundness import Health


def compared(*paths: Any, **options: Any) -> Comparison:
    """Compare two checkpoints."""
    found = verify(*paths, **options)
    assert isinstance(found, Comparison)
    return found


def checked(path: Any, **options: Any) -> Health:
    """Verify one checkpoint by itself."""
    found = verify(path, **options)
    assert isinstance(found, Health)
    return found
