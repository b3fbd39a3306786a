"""One rank of loads that fail, one after the other, and one that does not: fault_worker.py CASE kill|live.

After every failure the rank prints what it was told and whether its Parameters are still as they were; the job goes on
with the next. With `kill` a rank is killed in the middle of one more load, at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import mindspore as ms

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.bridge import together
from ms_ckpt_ext.errors import CheckpointError, LoadError
from tests.harness.start import join_ranks
from tests.support.checkpoints import Stored, read_file
from tests.support.parameters import bytes_of, poisoned

VICTIM = 1


def hear(name: str, rank: int, cell: ms.nn.Cell, act: Callable[[], Any]) -> None:
    """Do what must fail here; print what the rank is told, and what is changed."""
    before, began = bytes_of(cell), time.monotonic()
    try:
        act()
    except CheckpointError as error:
        changed = {n for n, data in bytes_of(cell).items() if data != before[n]} if name != "killed" else set()
        reported = set(error.changed) if isinstance(error, LoadError) else set()
        told = {
            "name": name, "rank": rank, "error": type(error).__name__, "message": str(error),
            "seconds": time.monotonic() - began, "changed": len(changed), "unreported": sorted(changed - reported),
            "reported": len(reported),
        }  # fmt: skip
        print("FAULT", json.dumps(told), flush=True)
    else:
        raise AssertionError(f"{name}: rank {rank} was told of nothing")


class Job:
    """This rank's part of one case."""

    def __init__(self, case: dict[str, Any], rank: int, device: str) -> None:
        self.case, self.rank, self.device = case, rank, device
        self.expected: dict[str, Stored] = read_file(next(Path(case["expected"]).glob(f"rank_{rank}/*.safetensors")))

    def load(self, cell: ms.nn.Cell, **changes: Any) -> None:
        given = {**self.case, "mode": "cooperative", "verify": "none", **changes}
        load_distributed_checkpoint(
            cell, None, given["predicted"], given["trained"], format="safetensors",
            unified_safetensors_dir=given["source"], mode=given["mode"], verify=given["verify"], bucket_bytes=16384,
            timeout=30.0,
        )  # fmt: skip

    def fail(self, name: str, **changes: Any) -> None:
        """Make a load that must fail here; print how."""
        cell = poisoned(self.expected)
        hear(name, self.rank, cell, lambda: self.load(cell, **changes))

    def succeed(self) -> None:
        cell = poisoned(self.expected)
        self.load(cell, verify="full")
        found = bytes_of(cell)
        assert {name: found[name] for name in self.expected} == {n: t.data for n, t in self.expected.items()}
        print("RECOVERED", flush=True)

    @contextmanager
    def broken_sink(self, name: str, act: Callable[[], None]) -> Iterator[None]:
        """What happens on the victim when the second piece of a parameter lands."""
        if self.device == "ascend":
            from ms_ckpt_ext.bridge.npu.cutting import DeviceSink as Sink

            def name_of(sink: Any) -> str:
                return str(sink._parameter.name)
        else:
            from ms_ckpt_ext.bridge.memory import ParameterSink as Sink  # type: ignore[assignment]

            def name_of(sink: Any) -> str:
                return str(sink._match.parameter.name)

        real = Sink.place

        def place(sink: Any, *arguments: Any) -> None:
            if name_of(sink) == name:
                act()
            real(sink, *arguments)

        with mock.patch.object(Sink, "place", place) if self.rank == VICTIM else nullcontext():
            yield


def gone(source: str) -> Any:
    """Meanwhile no file of a checkpoint can be opened: it is gone."""
    real = os.open

    def refuse(path: Any, *more: Any, **named: Any) -> int:
        return real(f"{path}.gone" if str(path).startswith(source) else path, *more, **named)

    return mock.patch.object(os, "open", refuse)


@contextmanager
def unreadable(rank: int, source: str) -> Iterator[None]:
    """The victim cannot open any file again once the load is under way."""
    real = together._load

    def load(*arguments: Any) -> Any:
        with gone(source):
            return real(*arguments)

    with mock.patch.object(together, "_load", load) if rank == VICTIM else nullcontext():
        yield


def device_lost() -> None:
    raise RuntimeError("the device is lost")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def faults(job: Job, case: dict[str, Any]) -> None:
    """Everything that can be survived; what is done on one rank only is done on the victim."""

    def only(**changes: Any) -> dict[str, Any]:
        return changes if job.rank == VICTIM else {}

    with gone(case["source"]) if job.rank == VICTIM else nullcontext():
        job.fail("gone before")
    with unreadable(job.rank, case["source"]):
        job.fail("gone")
        job.fail("gone, direct", mode="direct", verify="replicas")
    job.fail("truncated", source=case["truncated"])
    job.fail("flipped", source=case["flipped"], verify="full")
    job.fail("flipped, direct", source=case["flipped"], verify="full", mode="direct")
    job.fail("no digests", source=case["bare"], verify="full")
    job.fail("no strategy file", **only(trained="nowhere.ckpt"))
    job.fail("another training strategy", **only(trained=case["other"]))
    job.fail("another target", **only(predicted=case["elsewhere"]))
    job.fail("another mode", **only(mode="auto"))
    with job.broken_sink("layers.1.wo.weight", device_lost):
        job.fail("sink")
    job.succeed()


def main() -> None:
    case, killed = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2] == "kill"
    device = "ascend" if os.environ.get("ASCEND_OPP_PATH") else "cpu"
    rank = join_ranks(device)
    job = Job(case, rank, device)
    faults(job, case)
    if killed:
        with job.broken_sink("layers.1.wo.weight", kill):
            job.fail("killed")
        os._exit(0)  # at exit MindSpore waits for the dead rank until the backend gives up


if __name__ == "__main__":
    main()
