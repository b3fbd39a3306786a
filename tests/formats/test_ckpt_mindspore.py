"""Stock MindSpore as the oracle: its files are ours byte for byte, and each reads what the other wrote."""

from __future__ import annotations

import threading
import warnings
import zlib
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DTYPES
from ms_ckpt_ext.formats import ckpt
from ms_ckpt_ext.formats.checksum import verify_stored
from ms_ckpt_ext.formats.ckpt_writer import crc_tail, layout
from ms_ckpt_ext.formats.crypto import DecryptingReader
from ms_ckpt_ext.formats.index import FileIndex, FileLayout, TensorSpec
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader
from tests.support.encrypted import in_blocks
from tests.support.memory import contents

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ms = pytest.importorskip("mindspore")
    from mindspore import _c_expression as native
    from mindspore.train import serialization

MODES = ["AES-GCM", "AES-CBC", "SM4-CBC"]
KEYS = [(mode, b"0123456789ABCDEF0123456789ABCDEF"[:n]) for mode in MODES[:2] for n in (16, 24, 32)] + [
    ("SM4-CBC", b"k" * 16)
]
SAVED_DTYPES = [
    "Float32",
    "Float64",
    "Float16",
    "BFloat16",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "UInt8",
    "UInt16",
    "UInt32",
]
SAVED_DTYPES += ["UInt64", "Bool"]
"""What stock MindSpore can load again."""


def tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """A MindSpore tensor with arbitrary, finite contents."""
    values = np.random.default_rng(seed).integers(0, 100, shape)
    if dtype in ("BFloat16", "Float8E4M3FN", "Float8E5M2"):
        name = {"BFloat16": "bfloat16", "Float8E4M3FN": "float8_e4m3fn", "Float8E5M2": "float8_e5m2"}[dtype]
        return ms.Tensor(values.astype(np.float32), dtype=getattr(ms, name))
    return ms.Tensor(values.astype(dtype.lower() if dtype != "Bool" else np.bool_))


def save(path: Path, params: list[dict[str, Any]], **options: Any) -> bytes:
    """What `mindspore.save_checkpoint` writes."""
    ms.save_checkpoint(params, str(path), **options)
    return path.read_bytes()


def write(params: list[dict[str, Any]], *, crc: bool = False, piece: Optional[int] = None) -> tuple[FileLayout, bytes]:
    """The same parameters by our writer."""
    specs, data = [], {}
    for item in params:
        specs.append(TensorSpec(item["name"], BY_MINDSPORE[str(item["data"].dtype)], tuple(item["data"].shape)))
        data[item["name"]] = bytes(item["data"].get_bytes())
    plan = layout(specs, crc=crc) if piece is None else layout(specs, crc=crc, piece=piece)
    out = bytearray(plan.size)
    for offset, part in plan.literals:
        out[offset : offset + len(part)] = part
    for name, entry in plan.tensors.items():
        done = 0
        for offset, length in entry.extents:
            out[offset : offset + length] = data[name][done : done + length]
            done += length
    return plan, bytes(out)


def everything() -> list[dict[str, Any]]:
    """Every dtype as scalar, vector and matrix."""
    return [
        {"name": f"net.{dtype}.{len(shape)}", "data": tensor(dtype, shape, len(shape))}
        for dtype in [*SAVED_DTYPES, "Complex64", "Complex128", "Float8E4M3FN", "Float8E5M2"]
        for shape in ((), (3,), (4, 150))
    ]


def with_crc(raw: bytes) -> bytes:
    """A file laid out with `crc=True`, its checksum filled in."""
    return raw[:-17] + crc_tail(zlib.crc32(raw[:-17]))


@pytest.mark.parametrize("crc", [False, True])
def test_files_are_identical(tmp_path: Path, crc: bool) -> None:
    theirs = save(tmp_path / "stock.ckpt", everything(), crc_check=crc)
    _, ours = write(everything(), crc=crc)
    path = tmp_path / "ours.ckpt"
    path.write_bytes(with_crc(ours) if crc else ours)
    assert path.read_bytes() == theirs


def test_large_tensors_are_cut_at_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore's limit of 512 MiB, lowered to 1 KiB in both writers."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    params = [{"name": f"w{n}", "data": tensor("Float16", (n, 7), n)} for n in (1, 73, 74, 146, 147, 300)]
    params += [{"name": "exact", "data": tensor("UInt8", (2048,))}]
    plan, ours = write(params, piece=1024)
    assert save(tmp_path / "stock.ckpt", params) == ours
    with PlainReader(str(tmp_path / "stock.ckpt")) as reader:
        assert ckpt.read_index(reader).tensors == plan.tensors
    assert len(plan.tensors["w300"].extents) == 5


@pytest.mark.filterwarnings("ignore:getName:DeprecationWarning")
def test_pieces_cut_by_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An asynchronous save cuts along the first axis instead (numpy.array_split)."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    data = tensor("Int16", (5, 700))
    path = tmp_path / "async.ckpt"
    ms.save_checkpoint([{"name": "w", "data": data}], str(path), async_save="thread")
    for thread in threading.enumerate():
        if thread.name == "asyn_save_ckpt":
            thread.join()
    with PlainReader(str(path)) as reader:
        entry = ckpt.read_index(reader).tensors["w"]
        assert len(entry.extents) > 1 and entry.shape == (5, 700)
        assert contents(reader, entry) == bytes(data.get_bytes())


def as_stock(reader: ByteReader, index: FileIndex) -> dict[str, Any]:
    """What an index and its bytes hold, in the terms of `load_checkpoint`."""
    found: dict[str, Any] = {}
    for name, entry in index.tensors.items():
        raw = contents(reader, entry)
        if entry.dtype is DTYPES["STR"]:
            found[name] = raw.decode("utf-32-le").rstrip("\0")
        else:
            found[name] = (entry.dtype.mindspore, entry.shape, raw)
    return found


def loaded(path: Path, **options: Any) -> dict[str, Any]:
    """What `mindspore.load_checkpoint` says."""
    return {
        name: data if isinstance(data, str) else (str(data.dtype), tuple(data.shape), bytes(data.data.get_bytes()))
        for name, data in ms.load_checkpoint(str(path), **options).items()
    }


def test_scalars_and_text_survive(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    extra = {"epoch_num": 3, "lr": 0.1, "flag": True, "note": "héllo", "none": ""}
    save(path, [{"name": "w", "data": tensor("Float32", (2, 2))}], append_dict=extra)
    with PlainReader(str(path)) as reader:
        index = ckpt.read_index(reader)
        assert as_stock(reader, index) == loaded(path)
        plan = layout([TensorSpec(n, e.dtype, e.shape) for n, e in index.tensors.items()])
        assert plan.tensors == index.tensors


@settings(deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20),
        st.tuples(st.sampled_from(SAVED_DTYPES), st.lists(st.integers(1, 6), max_size=3)),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.sampled_from([24, 1 << 20]),
)
def test_mindspore_loads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, items: dict[str, tuple[str, list[int]]], crc: bool, piece: int
) -> None:
    params = [{"name": n, "data": tensor(d, tuple(s), k)} for k, (n, (d, s)) in enumerate(items.items())]
    plan, raw = write(params, crc=crc, piece=piece)
    path = tmp_path_factory.mktemp("ours") / "ours.ckpt"
    path.write_bytes(with_crc(raw) if crc else raw)
    with PlainReader(str(path)) as reader:
        index = ckpt.read_index(reader)
        assert index.tensors == plan.tensors
        assert as_stock(reader, index) == loaded(path, crc_check=crc)


@pytest.mark.parametrize(("mode", "key"), KEYS)
def test_we_decrypt_what_mindspore_encrypts(tmp_path: Path, mode: str, key: bytes) -> None:
    params = [{"name": "w", "data": tensor("Float32", (30, 11))}, {"name": "s", "data": tensor("BFloat16", ())}]
    plain = save(tmp_path / "plain.ckpt", params)
    save(tmp_path / "sealed.ckpt", params, enc_key=key, enc_mode=mode)
    with DecryptingReader(PlainReader(str(tmp_path / "sealed.ckpt")), key, mode) as reader:
        whole = bytearray(reader.size)
        reader.read_into(0, memoryview(whole))
        assert bytes(whole) == plain
        assert as_stock(reader, ckpt.read_index(reader)) == loaded(tmp_path / "sealed.ckpt", dec_key=key, dec_mode=mode)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 1000, 4096, 5000])
@pytest.mark.parametrize(("mode", "key"), KEYS)
def test_mindspore_decrypts_what_we_encrypt(tmp_path: Path, mode: str, key: bytes, length: int) -> None:
    """Several blocks (of 4 KiB here), through MindSpore's own native decryption."""
    plain = np.random.default_rng(length).bytes(length)
    path = tmp_path / "ours.ckpt"
    path.write_bytes(in_blocks(plain, key, mode, block=4096))
    assert native._decrypt(str(path), key, len(key), mode) == plain


def test_blocks_are_cut_at_64_mib(tmp_path: Path) -> None:
    """The true block size, both ways, with a plaintext that ends just behind a boundary."""
    key, length = b"k" * 32, (64 << 20) + 5
    plain = b"\n" + np.random.default_rng(0).bytes(length - 1)
    ours, theirs = tmp_path / "ours.ckpt", tmp_path / "theirs.ckpt"
    ours.write_bytes(in_blocks(plain, key))
    assert native._decrypt(str(ours), key, len(key), "AES-GCM") == plain
    cuts = (plain[: 64 << 20], plain[64 << 20 :])
    theirs.write_bytes(b"".join(native._encrypt(cut, len(cut), key, len(key), "AES-GCM") for cut in cuts))
    assert theirs.stat().st_size == ours.stat().st_size
    with DecryptingReader(PlainReader(str(theirs)), key) as reader:
        for offset, count in ((0, 100), ((64 << 20) - 50, 55), (12345, 50 << 20), (0, length)):
            out = bytearray(count)
            reader.read_into(offset, memoryview(out))
            assert out == plain[offset : offset + count]


@pytest.mark.parametrize("mode", MODES)
def test_a_checksum_inside_the_encryption_is_verified_by_both(tmp_path: Path, mode: str) -> None:
    """MindSpore writes its tail outside the encryption, where its own reader fails; inside, it is read and checked."""
    key = b"k" * 16
    params = [{"name": "w", "data": tensor("Float32", (3, 5))}]
    theirs = save(tmp_path / "stock.ckpt", params, crc_check=True)
    for name, plain in (("good", theirs), ("bad", theirs[:-17] + crc_tail(1))):
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(in_blocks(plain, key, mode))
    assert "w" in ms.load_checkpoint(str(tmp_path / "good.ckpt"), dec_key=key, dec_mode=mode, crc_check=True)
    with pytest.raises(ValueError, match="[Cc]rc|encrypted|permission"):
        ms.load_checkpoint(str(tmp_path / "bad.ckpt"), dec_key=key, dec_mode=mode, crc_check=True)
    with DecryptingReader(PlainReader(str(tmp_path / "good.ckpt")), key, mode) as reader:
        assert verify_stored(reader, ckpt.stored_checksum(ckpt.read_index(reader)))


@pytest.mark.parametrize("mode", MODES)
def test_mindspores_unreadable_checksum_tail_is_skipped(tmp_path: Path, mode: str) -> None:
    key, path = b"k" * 16, tmp_path / "stock.ckpt"
    params = [{"name": "w", "data": tensor("Float32", (3, 5))}]
    assert save(path, params, enc_key=key, enc_mode=mode, crc_check=True)[-17:] == crc_tail(0)
    with pytest.raises(ValueError):
        ms.load_checkpoint(str(path), dec_key=key, dec_mode=mode)
    with DecryptingReader(PlainReader(str(path)), key, mode) as reader:
        index = ckpt.read_index(reader)
        assert list(index.tensors) == ["w"] and index.metadata == {}


@pytest.mark.parametrize(("dims", "length"), [([0], 4), ([], 4), ([1], 4), ([0, 3], 0), ([2], 8)])
def test_shapes_are_those_of_load_checkpoint(tmp_path: Path, dims: list[int], length: int) -> None:
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    item = message.value.add()
    item.tag, item.tensor.tensor_type, item.tensor.tensor_content = (
        "w",
        "Float32",
        b"\x00\x00\x80\x3f\x00\x00\x00\x40"[:length],
    )
    item.tensor.dims.extend(dims)
    path = tmp_path / "a.ckpt"
    path.write_bytes(message.SerializeToString())
    with PlainReader(str(path)) as reader:
        assert as_stock(reader, ckpt.read_index(reader)) == loaded(path)
