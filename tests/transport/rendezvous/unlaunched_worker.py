"""One rank of a job that msrun did not start, on the emulated Ascend: it loads, cooperatively.

unlaunched_worker.py GOLDEN url|store RANK SIZE HOST PORT
unlaunched_worker.py GOLDEN mpirun
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mindspore
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.transport.hccl import Hccl
from ms_ckpt_ext.transport.select import select_transport
from tests.live.load_worker import bytes_of, poisoned
from tests.support.checkpoints import read_file


def join(way: str, arguments: list[str]) -> int:
    """Become a rank of the job; which."""
    assert "MS_SCHED_HOST" not in os.environ
    if way == "mpirun":
        mindspore.set_device("Ascend", int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]))
        distributed.init_process_group()
        return int(distributed.get_rank())
    rank, size, host, port = int(arguments[0]), int(arguments[1]), arguments[2], int(arguments[3])
    mindspore.set_device("Ascend", rank)
    by: dict[str, Any] = {"init_method": f"tcp://{host}:{port}"}
    if way == "store":
        by = {"store": distributed.TCPStore(host, port, world_size=size, is_master=rank == 0)}
    distributed.init_process_group(world_size=size, rank=rank, **by)
    return rank


def main(golden: Path, way: str, arguments: list[str]) -> None:
    """Join, load into every rank whole what eight have saved in slices, and compare."""
    rank = join(way, arguments)
    transport = select_transport(timeout=60)
    assert isinstance(transport, Hccl) and transport.share(b"%d" % rank) == [b"0", b"1"]
    transport.close()
    expected = read_file(next((golden / "full").glob("*.safetensors")))
    cell = poisoned(expected)
    missing, unused = load_distributed_checkpoint(
        cell,
        None,
        None,
        str(golden / "dp2_tp4/strategy.ckpt"),
        format="safetensors",
        unified_safetensors_dir=str(golden / "dp2_tp4/shards"),
        mode="cooperative",
    )
    assert (missing, unused) == ([], []), (missing, unused)
    found = bytes_of(cell)
    wrong = [name for name, tensor in expected.items() if found[name] != tensor.data]
    assert not wrong, wrong
    print(f"rank {rank} is right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
