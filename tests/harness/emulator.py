"""Builds `tests/cann_emulator` once, outside the source tree, and gives the environment that points MindSpore at it.

The build lies in `${XDG_CACHE_HOME:-~/.cache}/ms_ckpt_ext/cann_emulator/<key>`; the key is a digest of the emulator's
sources, of the MindSpore version and of the machine, so a change of any of them builds anew. A build is made in a
temporary directory next to it and renamed, so parallel test runs never see half of one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import pytest

SOURCES = Path(__file__).resolve().parent.parent / "cann_emulator"
_TOOLS = ("bash", "g++", "nm", "strings")


def emulator_or_skip(old: bool = False) -> Path:
    """Directory of a ready build (it holds `cann/`); skips the calling test where one cannot be made.

    `old`: a MindSpore that is too old to load into an NPU's memory will do.
    """
    reason = why_not() or (None if old else too_old())
    if reason:
        pytest.skip(f"no emulated Ascend: {reason}")
    return build()


def why_not() -> Optional[str]:
    """Why the emulator cannot be built here, or None."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return f"the emulator is written for Linux on x86_64, this is {sys.platform} on {platform.machine()}"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    wheel = importlib.util.find_spec("mindspore")
    if wheel is None or not wheel.submodule_search_locations:
        return "mindspore is not installed"
    plugin = Path(wheel.submodule_search_locations[0]) / "lib/plugin/libmindspore_ascend.so.2"
    return None if plugin.exists() else "this mindspore wheel has no Ascend plugin"


def too_old() -> Optional[str]:
    """Why the MindSpore here, if there is one, cannot load into an NPU's memory; else None."""
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not version.startswith("2.7."):
        return None
    return f"MindSpore {version} cannot view tensors there as bytes: tests/live/test_old_mindspore.py"


def build() -> Path:
    """Build the emulator unless the cache holds it; returns the directory that holds `cann/`."""
    target = _cache() / _key()
    if (target / "cann/lib64/libascendcl.so").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        fresh = Path(scratch) / "new"
        run = subprocess.run(
            ["bash", str(SOURCES / "build.sh"), str(fresh)],
            env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode:
            raise AssertionError(f"building the CANN emulator failed ({run.returncode}):\n{run.stdout[-4000:]}")
        try:
            fresh.rename(target)
        except OSError:  # another run was faster
            if not (target / "cann/lib64/libascendcl.so").exists():
                raise
    return target


def environment(prefix: Path, base: Mapping[str, str], messages: Path) -> dict[str, str]:
    """`base` with the changes that `cann_emulator/env.sh` makes, for the build in `prefix`.

    Args:
        messages: the folder for what is under way between ranks, unless `base` names one. Whoever starts the ranks
            removes it: of a rank that dies, messages remain.
    """
    cann = prefix / "cann"
    env = {key: value for key, value in base.items() if key not in ("MS_SIMULATION_LEVEL", "RANK_TABLE_FILE")}
    # The second entry of PYTHONPATH does not exist; MindSpore only looks for its name.
    _prepend(env, "PYTHONPATH", SOURCES / "python", cann / "opp/built-in/op_impl/ai_core/tbe")
    _prepend(env, "LD_LIBRARY_PATH", cann / "lib64", cann / "lib64/driver")
    env["ASCEND_OPP_PATH"] = str(cann / "opp")
    env.setdefault("CANNEMU_DIR", str(messages))
    return env


def _prepend(env: dict[str, str], name: str, *paths: Path) -> None:
    env[name] = os.pathsep.join([*map(str, paths), *filter(None, [env.get(name)])])


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "ms_ckpt_ext" / "cann_emulator"


def _key() -> str:
    digest = hashlib.sha256(f"{importlib.metadata.version('mindspore')} {platform.machine()}".encode())
    for path in sorted([*SOURCES.glob("src/*"), *SOURCES.glob("*.sh")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
