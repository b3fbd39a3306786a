"""One rank of a job on several servers of the emulated Ascend: tier_worker.py CASE_DIR BUCKET RANKS_A_SERVER.

Ranks of even and of odd number have a group each, as data parallelism would make. Prints what a load moved, in total
and between servers, by the device's own count, less what ranks need to meet; what it took of the device for
communicators; and what its report says.
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
from tests.support.reports import REPORTS, keep_reports


def moved() -> tuple[int, int, int]:
    ms.runtime.synchronize()
    hccl, acl = ctypes.CDLL("libhccl.so"), ctypes.CDLL("libascendcl.so")
    counters = hccl.cannemu_link_bytes, hccl.cannemu_between_bytes, acl.cannemu_hbm_used
    for call in counters:
        call.restype = ctypes.c_size_t
    link, between, used = (call() for call in counters)
    return link, between, used - ms.runtime.memory_reserved()


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
    keep_reports()
    distributed.new_group(list(range(rank % 2, distributed.get_world_size(), 2)))
    took = {}
    for mode in ("cooperative", "direct", "cooperative"):
        before = moved()
        REPORTS.clear()
        load_distributed_checkpoint(
            cell, None, root / "predicted.ckpt", root / "trained.ckpt", format="safetensors", mode=mode,
            verify="replicas" if mode == "direct" else "none",  # so that ranks meet
            unified_safetensors_dir=root / "source", bucket_bytes=bucket, hardware=str(root / "slow.json"),
        )  # fmt: skip
        took[mode] = [after - before for after, before in zip(moved(), before)]
    link, between, communicators = (load - meeting for load, meeting in zip(took["cooperative"], took["direct"]))
    (report,) = REPORTS
    for parameter in cell.get_parameters():
        assert np.ascontiguousarray(parameter.asnumpy()).tobytes() == truth[parameter.name].data, parameter.name
    told = {"link": link, "between": between, "communicators": communicators, "rounds": report.rounds}
    told |= {"read": report.reads.nbytes, "received": report.bytes_received}
    print("MOVED", json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
