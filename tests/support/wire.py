"""Tensors of a `.ckpt` as protobuf writes them."""

from __future__ import annotations

from collections.abc import Iterable

from ms_ckpt_ext.formats.wire import encode_bytes, encode_number


def value(tag: bytes, dims: Iterable[int], kind: bytes, contents: bytes) -> bytes:
    """One tensor: its name, its extents, MindSpore's name of its dtype, and its bytes."""
    inner = b"".join(encode_number(1, dim) for dim in dims) + encode_bytes(2, kind) + encode_bytes(3, contents)
    return encode_bytes(1, encode_bytes(1, tag) + encode_bytes(2, inner))
