"""Writing `.ckpt`: literal bytes, and what is written is read back."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.errors import FormatError, UsageError
from ms_ckpt_ext.formats import ckpt
from ms_ckpt_ext.formats.checksum import verify_stored
from ms_ckpt_ext.formats.ckpt_writer import SLICE_BYTES, crc_tail, layout
from ms_ckpt_ext.formats.index import FileLayout, TensorSpec
from ms_ckpt_ext.storage.reader import PlainReader
from tests.support.memory import MemoryReader

NAMED = [dtype for dtype in DTYPES.values() if dtype.mindspore]


def filled(plan: FileLayout, data: dict[str, bytes]) -> bytes:
    """The file of a layout, checking that every byte of it is written exactly once."""
    out, seen = bytearray(plan.size), bytearray(plan.size)
    writes = list(plan.literals)
    for name, entry in plan.tensors.items():
        done = 0
        for offset, length in entry.extents:
            writes.append((offset, data[name][done : done + length]))
            done += length
        assert done == len(data[name])
    for offset, part in writes:
        out[offset : offset + len(part)] = part
        for at in range(offset, offset + len(part)):
            seen[at] += 1
    assert set(seen) <= {1}
    return bytes(out)


def test_literal_bytes_of_mindspore() -> None:
    specs = [
        TensorSpec("s", DTYPES["F32"], ()),
        TensorSpec("v", DTYPES["I32"], (3,)),
        TensorSpec("t", DTYPES["STR"], (2,)),
    ]
    text = "né".encode("utf-32-le")
    found = filled(layout(specs), {"s": b"\x00\x00`@", "v": bytes(12), "t": text})
    assert found == (
        b"\n\x14\n\x01s\x12\x0f\x12\x07Float32\x1a\x04\x00\x00`@"
        b"\n\x1c\n\x01v\x12\x17\x08\x03\x12\x05Int32\x1a\x0c"
        + bytes(12)
        + b"\n\x16\n\x01t\x12\x11\x08\x00\x12\x03str\x1a\x08"
        + text
    )


def test_large_tensors_are_cut_at_512_mib() -> None:
    plan = layout(
        [TensorSpec("w", DTYPES["F32"], (SLICE_BYTES // 4 * 2 + 1,)), TensorSpec("e", DTYPES["U8"], (SLICE_BYTES,))]
    )
    assert [extent.length for extent in plan.tensors["w"].extents] == [SLICE_BYTES, SLICE_BYTES, 4]
    assert len(plan.tensors["e"].extents) == 1
    assert len(plan.literals) == 4 and plan.size == 3 * SLICE_BYTES + 4 + sum(len(part) for _, part in plan.literals)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="'w' is to be written twice"):
        layout([TensorSpec("w", DTYPES["F32"], ())] * 2)
    with pytest.raises(UsageError, match="'w' has dtype F4.*safetensors"):
        layout([TensorSpec("w", DTYPES["F4"], (2,))])


@pytest.mark.parametrize("name", ["n" * (ckpt.MAX_TEXT + 1), "\u4e2d" * (ckpt.MAX_TEXT // 3 + 1)])
def test_a_name_is_no_longer_than_it_can_be_read(name: str) -> None:
    for held, length in ((name[:-1], None), (name, len(name.encode()))):
        specs = [TensorSpec(held, DTYPES["I8"], ())]
        if length is None:
            raw = layout(specs).literals[0][1] + b"x"
            assert list(ckpt.read_index(MemoryReader(raw)).tensors) == [held]
        else:
            with pytest.raises(UsageError, match=f"has {length} bytes, and readers of .ckpt take {ckpt.MAX_TEXT}"):
                layout(specs)


def test_a_table_is_no_larger_than_it_can_be_read() -> None:
    """Reader and writer count alike, so one more tensor is refused by both."""
    many = [TensorSpec(f"w{n:06d}", DTYPES["I8"], (1,)) for n in range(101)]
    framed = {count: b"".join(each + b"x" for _, each in layout(many[:count]).literals) for count in (100, 101)}
    budget = 100 * ckpt.value_bytes("w000000", 1, "Int8") - len(framed[100])
    assert layout(many[:100], budget=budget).size == len(framed[100])
    assert len(ckpt.read_index(MemoryReader(framed[100]), budget=budget).tensors) == 100
    with pytest.raises(UsageError, match="101 tensors in one .ckpt are more than its reader takes"):
        layout(many, budget=budget)
    with pytest.raises(FormatError, match="save it in several files"):
        ckpt.read_index(MemoryReader(framed[101]), budget=budget)


def test_checksum(tmp_path: Path) -> None:
    plan = layout([TensorSpec("w", DTYPES["I8"], (3,))], crc=True)
    data = filled(plan, {"w": b"abc"})
    assert plan.checksum is not None and plan.checksum.offset == len(data) - 17
    path = tmp_path / "a.ckpt"
    path.write_bytes(data[:-17] + plan.checksum.render(zlib.crc32(data[:-17])))
    with PlainReader(str(path)) as reader:
        assert verify_stored(reader, ckpt.stored_checksum(ckpt.read_index(reader)))


tensors = st.dictionaries(
    st.text(min_size=1, max_size=12),
    st.tuples(st.sampled_from(NAMED), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(tensors, st.booleans(), st.sampled_from([16, 48, SLICE_BYTES]), st.randoms(use_true_random=False))
def test_what_is_written_is_read_back(items: dict, crc: bool, piece: int, random) -> None:  # type: ignore[no-untyped-def, type-arg]
    """Any names, dtypes and shapes, in one piece or several; Int4 notes survive."""
    specs, notes, data = [], {}, {}
    for name, (dtype, dims, int4) in items.items():
        shape = (len(name),) if dtype.name == "STR" else tuple(dims)
        specs.append(TensorSpec(name, dtype, shape))
        if int4 and dtype.name == "I8":
            notes[name] = "Int4"
        count = 1
        for extent in shape:
            count *= extent
        data[name] = random.randbytes(dtype.nbytes(count))
    plan = layout(specs, crc=crc, metadata=notes, piece=piece)
    raw = filled(plan, data)
    if not raw:
        return
    if crc:
        raw = raw[:-17] + crc_tail(zlib.crc32(raw[:-17]))
    reader = MemoryReader(raw)
    index = ckpt.read_index(reader)
    assert index.tensors == plan.tensors
    assert list(index.tensors) == list(items)
    assert {k: v for k, v in index.metadata.items() if k in items and v == "Int4"} == notes
    assert verify_stored(reader, ckpt.stored_checksum(index)) is crc
