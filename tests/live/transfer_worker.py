"""One rank of transfers between networks: transfer_worker.py CASES DEVICE. Sources hold shards, targets poison."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple, Optional

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.common import np_dtype

from ms_ckpt_ext import plan_transfer, rules
from ms_ckpt_ext.errors import CheckpointError
from tests.harness.start import join_ranks
from tests.support.checkpoints import Stored, read_file

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np_dtype.bfloat16, "I32": np.int32, "I64": np.int64}
RULES = {
    "": (),
    "fused": (
        rules.Scale("layers.{i}.q", "layers.{i}.q", 0.5),
        rules.QKV(["layers.{i}.q", "layers.{i}.k", "layers.{i}.v"], "layers.{i}.qkv", groups=6),
        rules.Interleave(["layers.{i}.gate", "layers.{i}.up"], "layers.{i}.gate_up"),
    ),
}


class Meter(NamedTuple):
    """What the emulated device counted: bytes up, down and over the links, device memory of the pool at its peak."""

    up: int
    down: int
    link: int
    held: int

    @staticmethod
    def read() -> Meter:
        ms.runtime.synchronize()
        acl, hccl = ctypes.CDLL("libascendcl.so"), ctypes.CDLL("libhccl.so")
        acl.cannemu_copied.restype = hccl.cannemu_link_bytes.restype = ctypes.c_size_t
        held = ms.runtime.max_memory_allocated()
        return Meter(acl.cannemu_copied(1), acl.cannemu_copied(2), hccl.cannemu_link_bytes(), held)


def network(tensors: dict[str, Stored], poison: bool, cast: str = "") -> nn.Cell:
    """A Cell that holds some tensors; with poison other values, and float32 as `cast` says."""
    cell = nn.Cell()
    for number, (name, tensor) in enumerate(tensors.items()):
        array = np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape)
        array = np.full_like(array, 77) if poison else np.array(array)
        dtype = cast if poison and cast and tensor.dtype == "F32" else ""
        data = ms.Tensor.from_numpy(array.astype(NUMPY[dtype]) if dtype else array)
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(data, name=name), check_name_contain_dot=False)
    return cell


def shards(folder: str, place: int) -> dict[str, Stored]:
    return read_file(next(Path(folder).glob(f"rank_{place}/*.safetensors")))


def wanted(tensor: Stored, cast: str) -> bytes:
    if not cast or tensor.dtype != "F32":
        return tensor.data
    return np.frombuffer(tensor.data, np.float32).astype(NUMPY[cast]).tobytes()


def wrong(cell: nn.Cell, truth: dict[str, Stored], cast: str) -> list[str]:
    held = {p.name: np.ascontiguousarray(p.asnumpy()).tobytes() for p in cell.get_parameters()}
    return [name for name, tensor in truth.items() if held[name] != wanted(tensor, cast)]


def check(rank: int, case: dict[str, Any], device: str) -> None:
    """One transfer; everything that is wrong raises."""
    give, take, cast = case["give"], case["take"], case.get("cast", "")
    mine = shards(case["source"], give.index(rank)) if rank in give else None
    truth = shards(case["expected"], take.index(rank)) if rank in take else None
    source = network(mine, poison=False) if mine is not None else None
    target = network(truth, poison=True, cast=cast) if truth is not None else None
    how = {"source_strategy": case["trained"], "target_strategy": case["predicted"]}
    how["rules"] = RULES[case.get("rules", "")]
    for side, ranks in (("source", give), ("target", take)):
        if ranks != sorted(ranks):
            how[f"{side}_ranks"] = ranks
    if "error" in case:
        try:
            plan_transfer(source, target, **how)
        except CheckpointError as error:
            assert type(error).__name__ in (case["error"], "PeerError"), error
            assert case["says"] in str(error), error
            return
        raise AssertionError("no error")
    with plan_transfer(
        source, target, bucket_bytes=case.get("bucket", 1 << 20), **case.get("options", {}), **how
    ) as plan:
        plan.run()
        assert target is None or not wrong(target, truth, cast), f"rank {rank}: {wrong(target, truth, cast)}"
        if case.get("counted"):
            count(plan, target, case["counted"], device)
            assert target is None or not wrong(target, truth, cast), f"rank {rank}, again"
    if mine is not None:
        assert not wrong(source, mine, ""), "the source changed"


def count(plan: Any, target: Optional[nn.Cell], runs: int, device: str) -> None:
    """Run it again and print what that takes."""
    if device != "ascend":
        for _ in range(runs):
            plan.run()
        return
    ms.runtime.synchronize()
    before_plan = ms.runtime.memory_allocated()
    ms.runtime.reset_peak_memory_stats()
    before = Meter.read()
    told = []
    for _ in range(runs):
        report = plan.run()
        told.append(ms.runtime.memory_allocated())
    after = Meter.read()
    print(
        "COUNTS",
        json.dumps(
            {"up": after.up - before.up, "down": after.down - before.down, "link": after.link - before.link}
            | {"above": after.held - before_plan, "growth": told[-1] - told[0], "held": before_plan}
            | {"local": report.bytes_local, "received": report.bytes_received, "sent": report.bytes_sent}
            | {"rounds": report.rounds}
        ),
        flush=True,
    )


def main() -> None:
    device = sys.argv[2]
    rank = join_ranks(device)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        check(rank, case, device)
        print(f"case {case['name']} is right", flush=True)


if __name__ == "__main__":
    main()
