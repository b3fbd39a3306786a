"""One rank of PyTorch doing the same job: live_torch.py save|load CASE CHECKPOINT FOLDER.

`save`: 8 ranks, tensors sharded 4 ways and replicated twice; `load`: 4 ranks, sharded 4 ways, in place.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from live_common import above_start, barrier
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

WARM = 2
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensors(case: dict[str, Any], mesh: DeviceMesh, tp_rank: int, fill: bool) -> dict[str, DTensor]:
    """The same parameters as DTensors, with this rank's contents or with poison."""
    state = {}
    for seed, (name, (dtype, shape, parts)) in enumerate(case["tensors"].items()):
        axes = [axis for axis, count in enumerate(parts) if count > 1]
        local = torch.empty([extent // part for extent, part in zip(shape, parts)], dtype=_DTYPES[dtype])
        generator = torch.Generator().manual_seed(seed * 8 + (tp_rank if axes else 0))
        data = local.view(torch.uint8)
        data.random_(0, 120, generator=generator) if fill else data.fill_(0x77)
        where = [*([Replicate()] * (mesh.ndim - 1)), Shard(axes[0]) if axes else Replicate()]
        state[name] = DTensor.from_local(local, mesh, where, run_check=False)
    return state


def main() -> None:
    action, case, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if action == "save":
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
        dcp.save(tensors(case, mesh, rank % 4, fill=True), checkpoint_id=folder)
    else:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        state, expected = tensors(case, mesh, rank, fill=False), tensors(case, mesh, rank, fill=True)
        for number in range(1 + WARM):
            for tensor in state.values():
                tensor.to_local().view(torch.uint8).fill_(0x77)
            barrier(sys.argv[4], f"load{number}", rank, dist.get_world_size())
            with above_start() as memory:
                begin = time.perf_counter()
                dcp.load(state, checkpoint_id=folder)
                seconds = time.perf_counter() - begin
            for name, tensor in state.items():
                mine, truth = (t.to_local().view(torch.uint8) for t in (tensor, expected[name]))
                assert torch.equal(mine, truth), f"rank {rank}: wrong bytes in {name}"
            print("LOAD", rank, number, seconds, memory.peak, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
