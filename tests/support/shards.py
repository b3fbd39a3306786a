"""Shards of any dtype, BF16 included, written from arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import TensorSpec

Full = dict[str, tuple[str, np.ndarray]]
"""Name -> dtype of the file, and the array (raw uint16 for BF16)."""


def write(strategy: Strategy, full: Full, root: Path) -> None:
    """`rank_N/net.safetensors`; what the strategy does not list lies whole on every rank."""
    for rank in range(strategy.world):
        held = {}
        for name, (dtype, array) in full.items():
            layout = strategy.layout(name, rank)
            part = array if layout is None else array[layout.region(rank, array.shape).slices]
            held[name] = TensorSpec(name, DTYPES[dtype], part.shape), np.ascontiguousarray(part).tobytes()
        laid = safetensors.layout([spec for spec, _ in held.values()], {"format": "ms"})
        data = b"".join(held[name][1] for name in laid.tensors)
        (root / f"rank_{rank}").mkdir(parents=True)
        (root / f"rank_{rank}/net.safetensors").write_bytes(laid.literals[0][1] + data)
