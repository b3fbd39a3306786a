"""One rank of a job on several servers of the emulated Ascend: tier_worker.py CASE_DIR BUCKET RANKS_A_SERVER.

Prints what a load moved, in all and between servers, by the device's own count: less what ranks need to meet.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint
from tests.support.checkpoints import read_file


def moved() -> tuple[int, int]:
    ms.runtime.synchronize()
    hccl = ctypes.CDLL("libhccl.so")
    for call in (hccl.cannemu_link_bytes, hccl.cannemu_between_bytes):
        call.restype = ctypes.c_size_t
    return hccl.cannemu_link_bytes(), hccl.cannemu_between_bytes()


def main(root: Path, bucket: int, size: int) -> None:
    ms.set_device("Ascend")
    distributed.init_process_group()
    rank = distributed.get_rank()
    os.environ["MS_CKPT_EXT_HOST"] = f"server {rank // size}"
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    cell = nn.Cell()
    for number, (name, held) in enumerate(truth.items()):
        parameter = ms.Parameter(ms.Tensor(np.full(held.shape, 77), ms.float32), name=name)
        cell.insert_param_to_cell(f"p{number}", parameter, check_name_contain_dot=False)
    took = {}
    for mode in ("cooperative", "direct", "cooperative"):
        before = moved()
        load_distributed_checkpoint(
            cell, None, root / "predicted.ckpt", root / "trained.ckpt", format="safetensors", mode=mode,
            verify="replicas" if mode == "direct" else "none",  # so that ranks meet
            unified_safetensors_dir=root / "source", bucket_bytes=bucket, hardware=str(root / "slow.json"),
        )  # fmt: skip
        took[mode] = [after - before for after, before in zip(moved(), before)]
    for parameter in cell.get_parameters():
        assert np.ascontiguousarray(parameter.asnumpy()).tobytes() == truth[parameter.name].data, parameter.name
    print(
        "MOVED", json.dumps([load - meeting for load, meeting in zip(took["cooperative"], took["direct"])]), flush=True
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
