"""One rank of transfers that fail, and of resumes from peers that do: transfer_fault_worker.py CASE transfer|alive.

After every failure the rank prints what it was told and whether its Parameters are still as they were; the job goes on
with the next. At the end the victim is killed in the middle of one more, of the kind that was named.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np

from ms_ckpt_ext import plan_transfer, resume
from tests.harness.start import join_ranks
from tests.live.fault_worker import VICTIM, Job, device_lost, hear, kill
from tests.live.transfer_worker import network, shards, wrong

LAST, GIVEN = "layers.1.wo.weight", "b.w"
"""What fails to land on the victim: in a transfer, and in a resume that takes it from another rank."""


class Ranks:
    """This rank's part."""

    def __init__(self, case: dict[str, Any], rank: int, device: str) -> None:
        self.case, self.rank = case, rank
        self.breaking = Job({**case, "expected": case["serves"]}, rank, device)
        self.truth = shards(case["serves"], rank)
        self.source = network(shards(case["trains"], rank), poison=False)
        self.target = network(self.truth, poison=True)

    def plan(self, timeout: float = 30.0) -> Any:
        """A new plan, of many rounds."""
        return plan_transfer(
            self.source, self.target, source_strategy=self.case["trained"], target_strategy=self.case["predicted"],
            bucket_bytes=16384, timeout=timeout,
        )  # fmt: skip

    def succeed(self, plan: Any) -> None:
        plan.run()
        assert not wrong(self.target, self.truth, "")
        print("RECOVERED", flush=True)

    def alive(self) -> Callable[[], Any]:
        """A resume of the victim, from the others and from a checkpoint."""
        held = shards(self.case["held"], self.rank)
        self.job = network(held, poison=self.rank == VICTIM)
        how = {"predict_strategy": self.case["held_by"], "mode": "cooperative", "timeout": 30.0}
        good = self.rank != VICTIM
        return lambda: resume(
            self.job, checkpoint_dir=self.case["saved"], alive=good, alive_step=3 if good else None, **how
        )


def faults(here: Ranks) -> None:
    """Everything that can be survived."""
    plan = here.plan()
    here.succeed(plan)
    first = next(iter(here.source._params.values()))
    if here.rank == VICTIM:
        other = ms.Tensor(np.zeros((*first.shape, 2), np.float32))
        here.source._params["p0"] = ms.Parameter(other, name=first.name)
    hear("changed", here.rank, here.target, plan.run)
    here.source._params["p0"] = first
    with here.breaking.broken_sink(LAST, device_lost):
        hear("sink", here.rank, here.target, plan.run)
    here.succeed(plan)
    plan.close()
    again = here.alive()
    with here.breaking.broken_sink(GIVEN, device_lost):
        hear("alive", here.rank, here.job, again)
    again()
    assert not wrong(here.job, shards(here.case["held"], here.rank), "")
    limit = 2.0 * float(os.environ["MS_CKPT_EXT_PATIENCE"])
    late = here.plan(timeout=limit)
    if here.rank == VICTIM:
        time.sleep(2 * limit)
    hear("late", here.rank, here.target, late.run)
    late.close()
    anew = here.plan()
    here.succeed(anew)
    anew.close()
    left = [each.name for each in threading.enumerate() if each.name.startswith(("digest", "ms_ckpt_ext control"))]
    assert not left, left


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    device = "ascend" if os.environ.get("ASCEND_OPP_PATH") else "cpu"
    rank = join_ranks(device)
    here = Ranks(case, rank, device)
    faults(here)
    if sys.argv[2] == "alive":
        resuming = here.alive()
        with here.breaking.broken_sink(GIVEN, kill) if here.rank == VICTIM else nullcontext():
            hear("killed", here.rank, here.job, resuming)
    else:
        plan = here.plan()
        with here.breaking.broken_sink(LAST, kill):
            hear("killed", here.rank, here.target, plan.run)
        plan.close()
        plan.close()
    print("CLOSED", flush=True)
    os._exit(0)  # at exit MindSpore waits for the dead rank until the backend gives up


if __name__ == "__main__":
    main()
