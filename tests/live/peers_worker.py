"""One rank of resumes among ranks that lost what they held: peers_worker.py CASES DEVICE. The others hold shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ms_ckpt_ext import resume
from ms_ckpt_ext.errors import CheckpointError, LayoutMismatchError, PeerError
from tests.harness.start import join_ranks
from tests.live.transfer_worker import network, shards, wrong


def check(rank: int, case: dict[str, Any]) -> None:
    """One resume; everything that is wrong raises."""
    good = rank not in case["lost"]
    truth = shards(case["held"], rank)
    cell = network(truth, poison=not good)
    step = case["steps"][rank] if good else None
    how = {"checkpoint_dir": case["root"], "predict_strategy": case["predicted"], "mode": case["mode"]}
    how.update({"alive": good, "alive_step": step, "bucket_bytes": case["bucket"], "verify": case["verify"]})
    if "says" in case:
        try:
            resume(cell, **how)
        except CheckpointError as error:
            assert isinstance(error, (LayoutMismatchError, PeerError)), error
            assert case["says"] in str(error), error
            assert wrong(cell, truth, "") == ([] if good else [*truth]), "something was changed"
            return
        raise AssertionError("no error")
    restored = resume(cell, **how)
    assert not wrong(cell, truth, ""), f"rank {rank}: {wrong(cell, truth, '')}"
    told = {"read": restored.bytes_read, "given": restored.bytes_from_peers, "step": restored.step}
    print("PEERS", json.dumps({"case": case["name"], "mode": restored.mode, **told}), flush=True)


def main() -> None:
    rank = join_ranks(sys.argv[2])
    for case in json.loads(Path(sys.argv[1]).read_text()):
        check(rank, case)
        print(f"case {case['name']} is right", flush=True)


if __name__ == "__main__":
    main()
