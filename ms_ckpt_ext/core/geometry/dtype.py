"""Element types: one table for every name a checkpoint may use.

Bytes are moved, not values, so a dtype here is a name and a width. Order in the table is the order of the
safetensors library's own enumeration, which decides where a tensor lies in a file it writes.
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: the safetensors name, unique ("F32").
        bits: width of one element in bits; below 8 for packed types.
        mindspore: MindSpore's name in `.ckpt` files and messages ("Float32"); "" where MindSpore has none.
        family: "float", "int", "uint", "bool", "complex" or "packed"; casts stay inside a family.
    """

    name: str
    bits: int
    mindspore: str
    family: str

    def nbytes(self, elements: int) -> int:
        """Bytes that `elements` elements occupy (rounded up for packed types)."""
        return (elements * self.bits + 7) // 8


_TABLE = (
    DType("BOOL", 8, "Bool", "bool"),
    DType("F4", 4, "", "packed"),
    DType("F6_E2M3", 6, "", "packed"),
    DType("F6_E3M2", 6, "", "packed"),
    DType("U8", 8, "UInt8", "uint"),
    DType("I8", 8, "Int8", "int"),
    DType("F8_E5M2", 8, "Float8E5M2", "float"),
    DType("F8_E4M3", 8, "Float8E4M3FN", "float"),
    DType("F8_E8M0", 8, "", "float"),
    DType("F8_E4M3FNUZ", 8, "", "float"),
    DType("F8_E5M2FNUZ", 8, "", "float"),
    DType("I16", 16, "Int16", "int"),
    DType("U16", 16, "UInt16", "uint"),
    DType("F16", 16, "Float16", "float"),
    DType("BF16", 16, "BFloat16", "float"),
    DType("I32", 32, "Int32", "int"),
    DType("U32", 32, "UInt32", "uint"),
    DType("F32", 32, "Float32", "float"),
    DType("C64", 64, "Complex64", "complex"),
    DType("F64", 64, "Float64", "float"),
    DType("I64", 64, "Int64", "int"),
    DType("U64", 64, "UInt64", "uint"),
    # Not in safetensors: exist in `.ckpt` files only, so their place in the order is free.
    DType("C128", 128, "Complex128", "complex"),
    DType("STR", 32, "str", "str"),  # UTF-32 text, one code point an element
)

DTYPES: dict[str, DType] = {d.name: d for d in _TABLE}
BY_MINDSPORE: dict[str, DType] = {d.mindspore: d for d in _TABLE if d.mindspore}
INT4 = "Int4"
"""MindSpore's packed type: two 4-bit numbers a byte, kept as an int8 tensor with this word in the file's metadata."""
FILE_ORDER: dict[str, int] = {d.name: i for i, d in enumerate(_TABLE)}
"""Position of a dtype in the safetensors library's enumeration: larger comes first in a file."""
