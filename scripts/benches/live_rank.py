"""One rank of `scripts/bench live`, started by msrun: live_rank.py ours|stock CASE FOLDER."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import xxhash
from live_common import above_start, barrier
from mindspore.communication import get_group_size, get_rank, init

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.formats.registry import read_index

WARM = 2
_DTYPES = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}


def network(tensors: dict[str, list[Any]]) -> ms.nn.Cell:
    """A Cell whose Parameters have this rank's shapes and hold poison."""
    cell = ms.nn.Cell()
    for number, (name, (dtype, shape, parts)) in enumerate(tensors.items()):
        cut = tuple(extent // part for extent, part in zip(shape, parts))
        parameter = ms.Parameter(ms.Tensor(np.full(cut, 7), _DTYPES[dtype]), name=name)
        cell.insert_param_to_cell(f"p{number}", parameter, check_name_contain_dot=False)
    return cell


def digests(cell: ms.nn.Cell) -> dict[str, str]:
    return {p.name: xxhash.xxh3_128_hexdigest(p.asnumpy().reshape(-1).view(np.uint8)) for p in cell.get_parameters()}


def truth(case: dict[str, Any], rank: int) -> dict[str, str]:
    """Under equal tensor parallelism a target slice is the source slice of the same number."""
    index = read_index(f"{case['source']}/rank_{rank}/net.safetensors")
    data = np.memmap(index.path, np.uint8, "r")
    extents = {name: entry.extents[0] for name, entry in index.tensors.items()}
    return {name: xxhash.xxh3_128_hexdigest(data[e.offset : e.offset + e.length]) for name, e in extents.items()}


def main() -> None:
    peer, case = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    ms.set_device("CPU")
    init()
    rank = get_rank()
    expected = truth(case, rank)
    cell = network(case["tensors"])
    assert sum(math.prod(p.shape) for p in cell.get_parameters())
    load: Callable[[], Any]
    if peer == "ours":

        def load() -> Any:
            return load_distributed_checkpoint(
                cell, None, case["predicted"], case["trained"], format="safetensors",
                unified_safetensors_dir=case["source"], mode="direct",
            )  # fmt: skip
    else:

        def load() -> Any:
            return ms.load_distributed_checkpoint(
                cell, None, case["predicted"], format="safetensors", unified_safetensors_dir=case["merged"]
            )

    for number in range(1 + WARM):
        for parameter in cell.get_parameters():
            parameter.asnumpy().reshape(-1).view(np.uint8)[:] = 0x77
        barrier(sys.argv[3], f"load{number}", rank, get_group_size())
        with above_start() as memory:
            begin = time.perf_counter()
            load()
            seconds = time.perf_counter() - begin
        assert digests(cell) == expected, f"rank {rank}: wrong bytes"
        print("LOAD", rank, number, seconds, memory.peak, flush=True)


if __name__ == "__main__":
    main()
