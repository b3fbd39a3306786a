"""One rank of `scripts/bench transfer`, started by msrun: transfer_rank.py WAY CASE FOLDER."""

from __future__ import annotations

import json
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
from live_common import above_start, barrier
from mindspore.communication import get_group_size, get_rank, init

from ms_ckpt_ext import load_distributed_checkpoint, plan_transfer, transfer
from ms_ckpt_ext.formats.strategies.file import load_strategy

_DTYPES = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}
_NOISE = np.random.default_rng(0).integers(0, 1 << 16, 4 << 20, np.uint16)


def network(case: dict[str, Any], strategy: Any, rank: int) -> tuple[ms.nn.Cell, dict[str, Any]]:
    """A Cell with this rank's slices of all parameters, and the boxes that they are."""
    cell, boxes = ms.nn.Cell(), {}
    for number, (name, (dtype, shape)) in enumerate(case["tensors"].items()):
        boxes[name] = strategy.layout(name, rank).over(len(shape)).region(rank, tuple(shape))
        data = ms.Tensor(np.zeros(boxes[name].shape), _DTYPES[dtype])
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(data, name=name), check_name_contain_dot=False)
    return cell, boxes


def truth(name: str, shape: list[int], width: int, box: Any, number: int) -> np.ndarray:
    """The bytes of a box of a parameter in a step: rows of noise that depend on where they are."""
    start = zlib.crc32(f"{name} {number}".encode())
    rows = np.arange(box.start[0], box.stop[0])[:, None] if box.start else np.zeros((1, 1), int)
    columns = int(np.prod(shape[1:], dtype=int)) * width // 2
    found = _NOISE[(start + rows * 7919 + np.arange(columns)[None]) % len(_NOISE)]
    inside = found.reshape(len(rows), *shape[1:], width // 2)
    return np.ascontiguousarray(inside[(slice(None), *box.slices[1:])])


def memory(parameter: Any) -> np.ndarray:
    return parameter.asnumpy().reshape(-1).view(np.uint16)


def main() -> None:
    way, case, folder = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    ms.set_device("CPU")
    init()
    rank = get_rank()
    (source, give), (target, take) = (
        network(case, load_strategy(case[side]), rank) for side in ("trained", "predicted")
    )
    how = {"source_strategy": case["trained"], "target_strategy": case["predicted"]}
    saved = Path(case["saved"])

    def through_storage() -> None:
        (saved / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
        ms.save_checkpoint(source, str(saved / f"rank_{rank}" / "net"), format="safetensors")
        barrier(folder, f"saved{number}", rank, get_group_size())
        load_distributed_checkpoint(
            target, None, case["predicted"], case["trained"], format="safetensors",
            unified_safetensors_dir=case["saved"],
        )  # fmt: skip

    plan = plan_transfer(source, target, **how) if way == "run" else None
    ways: dict[str, Callable[[], Any]] = {
        "run": lambda: plan and plan.run(),
        "anew": lambda: transfer(source, target, **how),
        "storage": through_storage,
    }
    for number in range(case["times"]):
        checked = number in (0, case["times"] - 1)
        if checked:
            for parameter in source.get_parameters():
                shape = case["tensors"][parameter.name][1]
                found = truth(parameter.name, shape, parameter.itemsize, give[parameter.name], number)
                memory(parameter)[:] = found.reshape(-1)
        if checked or way == "storage":
            barrier(folder, f"go{number}", rank, get_group_size())  # else ranks wait for each other in the call
        with above_start() as held:
            begin = time.perf_counter()
            ways[way]()
            seconds = time.perf_counter() - begin
        for parameter in target.get_parameters() if checked else ():
            shape = case["tensors"][parameter.name][1]
            found = truth(parameter.name, shape, parameter.itemsize, take[parameter.name], number)
            assert np.array_equal(memory(parameter), found.reshape(-1)), f"rank {rank}: {parameter.name} is wrong"
        print("LOAD", rank, number, seconds, held.peak, flush=True)
        if way == "storage":
            barrier(folder, f"loaded{number}", rank, get_group_size())
            shutil.rmtree(saved / f"rank_{rank}")
    if plan is not None:
        plan.close()


if __name__ == "__main__":
    main()
