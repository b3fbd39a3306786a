"""Loads what rules make into Parameters of this rank: rules_worker.py ROOT; prints "MODE CAST is right"."""

from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.mint import distributed
from safetensors.numpy import load_file

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.rules import QKV, Dequantize, Experts, Interleave, Pad, Rename, Scale, Stack, Transpose

root = Path(sys.argv[1])
RULES = [
    Dequantize(["{*}.weight", "{*}.weight_scale_inv"], "{*}.weight", block=(3, 4), dtype="F32"),
    Scale("h.0.q.weight", "h.0.q.weight", 0.5),
    QKV(["h.0.q.weight", "h.0.k.weight"], "floats", groups=2),
    Pad("h.0.e.0.down", "padded", 14, value=2.5),
    QKV(["h.0.q", "h.0.k", "h.0.v"], "qkv", groups=4),
    QKV(["h.0.q", "h.0.k", "h.0.v"], "odd_qkv", groups=2),
    Interleave(["h.0.gate", "h.0.up"], "fc1"),
    Transpose("h.0.out", "out"),
    Stack("h.0.e.{n}.down", "stacked"),
    Experts(["h.0.e.{n}.gate", "h.0.e.{n}.up"], "experts"),
    Interleave(["h.0.small", "h.0.narrow"], "bytes"),
    Rename("h.0.lora.weight", "adapted"),
]


def main() -> None:
    ms.set_device("Ascend")
    distributed.init_process_group()
    rank = distributed.get_rank()
    truth = load_file(root / f"expected/rank_{rank}/net.safetensors")
    for mode in ("cooperative", "direct"):
        for cast in (False, True):
            cell = nn.Cell()
            for number, (name, array) in enumerate(truth.items()):
                dtype = ms.float64 if cast and array.dtype == np.float32 else None
                poison = ms.Tensor(np.full(array.shape, 77, array.dtype), dtype)
                cell.insert_param_to_cell(f"p{number}", ms.Parameter(poison, name=name), check_name_contain_dot=False)
            missing, _ = load_distributed_checkpoint(
                cell,
                None,
                root / "predicted.ckpt",
                format="safetensors",
                unified_safetensors_dir=root / "hf",
                mode=mode,
                bucket_bytes=1 << 16,
                rules=RULES,
                adapter=root / "lora",
            )
            assert missing == [], missing
            for parameter in cell.get_parameters():
                got = parameter.asnumpy().astype(truth[parameter.name].dtype)
                assert np.array_equal(got, truth[parameter.name]), (mode, cast, parameter.name)
            print(f"{mode} {cast} is right", flush=True)


main()
