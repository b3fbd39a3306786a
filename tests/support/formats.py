"""The golden `formats_*` sets as sources, encrypted copies of them, and a `.ckpt` with all that is odd."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.formats import ckpt_writer
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import PLAIN, Access, open_reader, read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import Stored, read_file, shard
from tests.support.encrypted import in_blocks, in_chunks
from tests.support.memory import contents as bytes_of

CASE = "formats_dp2_tp4_zero"
KEY = b"0123456789ABCDEF"
"""The key of the golden files."""
WRONG = b"0123456789abcdef"
PLAIN_KINDS = ("ckpt", "ckpt_crc", "safetensors", "dedup")
MODES = {"ckpt_aes_gcm": "AES-GCM", "ckpt_aes_cbc": "AES-CBC", "ckpt_sm4_cbc": "SM4-CBC"}
SEALED_KINDS = (*MODES, "ckpt_chunked", "safetensors_chunked")
KINDS = (*PLAIN_KINDS, *SEALED_KINDS)


def make_source(golden: Path, case: str, kind: str, root: Path) -> Path:
    """A directory with all rank folders of a golden set; what exists encrypted for two ranks only, as MindSpore
    wrote it, is completed by our writers."""
    formats = golden / case
    if kind in PLAIN_KINDS:
        return formats / kind
    plain = formats / ("safetensors" if kind.startswith("safetensors") else "ckpt")
    for folder in sorted(plain.iterdir()):
        (file,) = folder.iterdir()
        target = root / folder.name / file.name
        target.parent.mkdir(parents=True)
        stock = formats / kind / folder.name / file.name
        if stock.exists():
            shutil.copy(stock, target)
        else:
            encrypt(file, target, MODES.get(kind))
    return root


def encrypt(
    source: Path, target: Path, mode: Optional[str], key: bytes = KEY, chunk: int = 1024, unit: int = 0
) -> None:
    """One file, in MindSpore's blocks of a `mode`, or in the chunked container; in units of so many bytes."""
    plain = source.read_bytes()
    if mode is None:
        target.write_bytes(in_chunks(plain, key, chunk=unit or chunk))
    else:
        target.write_bytes(in_blocks(plain, key, mode, block=unit or 16 * chunk))


def key_of(kind: str) -> dict[str, object]:
    """The arguments that open a source of this kind."""
    return {"dec_key": KEY, "dec_mode": MODES.get(kind, "AES-GCM")} if kind in SEALED_KINDS else {}


def format_of(kind: str) -> str:
    """`format=` of a source of this kind."""
    return "ckpt" if kind.startswith("ckpt") else "safetensors"


def scalars_of(golden: Path, case: str, kind: str = "safetensors") -> dict[str, Stored]:
    """What lies outside the strategy in rank 0's file."""
    known = load_strategy(golden / case / "strategy.ckpt").layouts
    twin = "dedup" if kind == "dedup" else "safetensors"
    return {n: t for n, t in read_file(shard(golden / case / twin / "rank_0")).items() if n not in known}


def contents(path: Path, access: Access = PLAIN) -> dict[str, Stored]:
    """Every tensor of a file, by the package's own readers."""
    index = read_index(str(path), access)
    with open_reader(str(path), access) as reader:
        return {name: Stored(e.dtype.name, e.shape, bytes_of(reader, e)) for name, e in index.tensors.items()}


def contents_and_notes(path: Path, access: Access = PLAIN) -> dict[str, tuple[Any, ...]]:
    """Every tensor of a file as `contents` gives it, and what is noted of it."""
    notes = read_index(str(path), access).metadata
    return {name: (*stored, notes.get(name)) for name, stored in contents(path, access).items()}


def write_ckpt(path: Path, crc: bool = False, piece: int = 64, more: Sequence[TensorSpec] = ()) -> Path:
    """A `.ckpt` with all that is odd: text, scalars, no elements, packed int4, several values of one tensor."""
    specs = [
        TensorSpec("z.weight", DTYPES["F32"], (7, 9)),
        TensorSpec("a.bias", DTYPES["BF16"], (5,)),
        TensorSpec("global_step", DTYPES["I32"], (1,)),
        TensorSpec("learning_rate", DTYPES["F32"], ()),
        TensorSpec("none", DTYPES["F32"], (0, 3)),
        TensorSpec("note", DTYPES["STR"], (4,)),
        TensorSpec("packed", DTYPES["I8"], (6,)),
        *more,
    ]
    laid = ckpt_writer.layout(specs, crc=crc, metadata={"packed": "Int4"}, piece=piece)
    raw = bytearray(np.random.default_rng(1).bytes(laid.size))
    for offset, literal in laid.literals:
        raw[offset : offset + len(literal)] = literal
    ((offset, length),) = laid.tensors["note"].extents
    raw[offset : offset + length] = "nöte".encode("utf-32-le")
    path.parent.mkdir(parents=True, exist_ok=True)
    if crc:
        raw[-17:] = ckpt_writer.crc_tail(zlib.crc32(raw[:-17]))
    path.write_bytes(raw)
    return path
