"""Damaged files on disk, through `load` as users call it: the right data or one of our errors, no hang, little memory.

`damage.survives` guards. Where a file carries a checksum, or its container authenticates, what is accepted is true.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
from hypothesis import given, settings

from ms_ckpt_ext import convert, encrypt, load
from ms_ckpt_ext.errors import CheckpointError
from tests.support.damage import edits, mutate, survives
from tests.support.formats import KEY, write_ckpt

AUTHENTICATED = ("AES-GCM", "chunked", "sealed safetensors")


class Told(NamedTuple):
    """What a file says: name -> dtype, shape and bytes; and whether a checksum was verified."""

    tensors: dict[str, tuple[Any, ...]]
    checked: bool


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes, Told]]:
    """Kind -> where to put it, its bytes, and the truth."""
    root = tmp_path_factory.mktemp("fuzz")
    source = write_ckpt(root / "net.ckpt", crc=True)
    convert(source, root / "net.safetensors", crc=True)
    found = {"ckpt": source, "safetensors": root / "net.safetensors"}
    for mode in ("AES-GCM", "AES-CBC", "SM4-CBC", "chunked"):
        encrypt(source, root / mode / "net.ckpt", enc_key=KEY, enc_mode=mode)
        found[mode] = root / mode / "net.ckpt"
    encrypt(root / "net.safetensors", root / "st" / "net.safetensors", enc_key=KEY)
    found["sealed safetensors"] = root / "st" / "net.safetensors"
    return {kind: (path, path.read_bytes(), read(path, kind)) for kind, path in found.items()}


def read(path: Path, kind: str) -> Told:
    key: Optional[bytes] = None if kind in ("ckpt", "safetensors") else KEY
    with load(path, dec_key=key, crc_check=True) as held:
        lazy = {name: held[name] for name in held}
        arrays = held.arrays()
        described: dict[str, tuple[Any, ...]] = {}
        for name, value in lazy.items():
            told = ("text", value) if isinstance(value, str) else (value.dtype, value.shape, arrays[name].tobytes())
            described[name] = told
        return Told(described, "crc_num" in held.catalog.files[0].metadata)


KINDS = ["ckpt", "safetensors", "AES-GCM", "AES-CBC", "SM4-CBC", "chunked", "sealed safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(changes=edits)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files(kind: str, changes: list[Any], seeds: dict[str, tuple[Path, bytes, Told]]) -> None:
    path, data, truth = seeds[kind]
    assert truth.checked

    def look(raw: bytes) -> Told:
        path.write_bytes(raw)
        return read(path, kind)

    found = survives(look, mutate(data, changes), CheckpointError)
    if found is None:
        return
    if kind in AUTHENTICATED:
        assert all(truth.tensors.get(name) == value for name, value in found.tensors.items())
    elif found.checked and kind == "safetensors":  # MindSpore's checksum there is over names and contents only
        arrays = [name for name, value in truth.tensors.items() if value[0] != "text"]
        assert [found.tensors[name][-1] for name in arrays] == [truth.tensors[name][-1] for name in arrays]
    elif found.checked:
        assert found.tensors == truth.tensors
