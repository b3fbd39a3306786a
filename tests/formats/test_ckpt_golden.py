"""Golden `.ckpt` files, plain, with checksums and encrypted, hold what their safetensors twins hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ms_ckpt_ext.formats import ckpt
from ms_ckpt_ext.formats.checksum import verify_stored
from ms_ckpt_ext.formats.crypto import DecryptingReader
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader
from tests.support.formats import KEY, MODES
from tests.support.memory import contents

GOLDEN = Path(os.environ.get("MS_CKPT_EXT_GOLDEN", Path(__file__).parents[1] / "data" / "golden"))


def golden(pattern: str) -> list[Path]:
    return sorted(GOLDEN.glob(pattern))


def test_the_golden_corpus_is_there() -> None:
    assert len(golden("formats_*/ckpt*/rank_*/*.ckpt")) == 44
    assert len(golden("trained_*/step*/rank_*/*.ckpt")) == 8


def truth(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor of a safetensors file, by its own header and nothing of this package."""
    import json

    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            item["dtype"],
            tuple(item["shape"]),
            raw[start + item["data_offsets"][0] : start + item["data_offsets"][1]],
        )
        for name, item in header.items()
    }


def opened(path: Path) -> ByteReader:
    """The plaintext of a golden file."""
    reader = PlainReader(str(path))
    mode = MODES.get(path.parts[-3])
    return reader if mode is None else DecryptingReader(reader, KEY, mode)


@pytest.mark.parametrize("path", golden("formats_*/ckpt*/rank_*/*.ckpt"), ids=lambda p: "/".join(p.parts[-4:-1]))
def test_golden_files_equal_their_safetensors(path: Path) -> None:
    twin = path.parents[2] / "safetensors" / path.parts[-2] / path.with_suffix(".safetensors").name
    reader = opened(path)
    index = ckpt.read_index(reader, mtime_ns=0)
    found = {name: (e.dtype.name, e.shape, contents(reader, e)) for name, e in index.tensors.items()}
    assert found == truth(twin)
    assert verify_stored(reader, ckpt.stored_checksum(index)) is ("crc" in path.parts[-3])
    assert (index.size, index.reader) == (
        path.stat().st_size,
        MODES.get(path.parts[-3], "plain"),
    )
    reader.close()


@pytest.mark.parametrize("path", golden("trained_*/step*/rank_*/*.ckpt"), ids=lambda p: "/".join(p.parts[-3:-1]))
def test_trained_files_equal_their_safetensors(path: Path) -> None:
    with PlainReader(str(path)) as reader:
        index = ckpt.read_index(reader, mtime_ns=0)
        found = {name: (e.dtype.name, e.shape, contents(reader, e)) for name, e in index.tensors.items()}
    assert found == truth(path.with_suffix(".safetensors"))


def test_the_truth_is_what_the_library_reads() -> None:
    """The hand-written safetensors reader above agrees with the library where numpy has the dtype."""
    path = golden("formats_dp2_tp4/safetensors/rank_0/*.safetensors")[0]
    with safe_open(str(path), "numpy") as file:
        for name, (dtype, _, raw) in truth(path).items():
            if dtype != "BF16":
                assert np.ascontiguousarray(file.get_tensor(name)).tobytes() == raw
