"""Weight rules for `rules=`: parameters made from a checkpoint's tensors by renaming, joining, stacking, transposing.

Some compute: `Dequantize`, `Scale`, `AddProduct`, and `Pad`, whose inverse is `Crop`.

`invert` reverses rules: from a network's parameters back to the tensors that made them.

>>> from ms_ckpt_ext.rules import Interleave, QKV, Rename
>>> layer = "model.layers.{layer}."
>>> rules = [
...     Rename("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
...     QKV([f"{layer}self_attn.{p}_proj.weight" for p in "qkv"], "decoder.layers.{layer}.qkv.weight", groups=8),
...     Interleave([f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up")], "decoder.layers.{layer}.fc1.weight"),
... ]
"""

from __future__ import annotations

from ms_ckpt_ext.core.computing.padding import Crop, Pad
from ms_ckpt_ext.core.computing.rules import AddProduct, Dequantize, Scale
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.core.planning.rule_inverses import invert
from ms_ckpt_ext.core.planning.weight_rules import (
    QKV,
    Concat,
    Duplicate,
    Experts,
    Interleave,
    Part,
    Rename,
    Stack,
    Transpose,
)

__all__ = [
    # moved
    "QKV",
    "Concat",
    "Duplicate",
    "Experts",
    "Interleave",
    "Part",
    "Rename",
    "Stack",
    "Transpose",
    # computed
    "AddProduct",
    "Crop",
    "Dequantize",
    "Pad",
    "Scale",
    # all of them
    "Rule",
    "invert",
]
