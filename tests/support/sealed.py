"""Files encrypted as users do it, in units of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms_ckpt_ext import encrypt
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.formats.index import TensorSpec
from tests.support.formats import KEY
from tests.support.formats import encrypt as encrypt_file

MODES = ["AES-GCM", "AES-CBC", "SM4-CBC", "chunked"]
LARGE = tuple(TensorSpec(f"large.{n}", DTYPES["U8"], (1_300_003 + n,)) for n in range(7))
"""More than is kept of an encrypted file, and more than is copied at once."""
MORE: dict[str, Any] = {"more": LARGE, "piece": 1 << 20}


def sealed(source: Path, target: Path, mode: str, large: bool) -> None:
    """Encrypt a file: in one unit larger than what is kept of a file, as MindSpore's are, or in this package's."""
    if large:
        encrypt_file(source, target, None if mode == "chunked" else mode, unit=16 << 20)
    else:
        encrypt(source, target, enc_key=KEY, enc_mode=mode)
