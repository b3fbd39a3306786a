"""Runs that have begun to write, and go on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ms_ckpt_ext.engine.integrity import manifest
from ms_ckpt_ext.storage.staging import ONE_TASK, Staging


def staged(target: Path, names: Collection[str], job: str = "1234", task: str = ONE_TASK) -> Staging:
    """A run that writes these files, and goes on until it is closed."""
    staging = Staging(str(target), job, manifest, task)
    staging.open(names)
    return staging
