"""Runs one offline job and prints by how many bytes it grew the process beyond the imports, and what it read."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import pytest

from ms_ckpt_ext.api.mindspore.load import load_distributed_checkpoint
from ms_ckpt_ext.api.mindspore.merge import unified_safetensors
from tests.support.machine import watch_reads


def main() -> None:
    job, shards, strategy, target, predicted, rank = sys.argv[1:]
    reads = watch_reads(pytest.MonkeyPatch())
    if job == "merge":
        unified_safetensors(shards, strategy, target)
    else:
        load_distributed_checkpoint(
            None, None, predicted, strategy or None, format="safetensors", unified_safetensors_dir=shards,
            dst_safetensors_dir=target, rank_id=int(rank) if rank else None,
        )  # fmt: skip
    print(
        json.dumps(
            {"grown": _peak[0] - _before, "read": sum(read.nbytes for read in reads if read.path.startswith(shards))}
        )
    )


def _anonymous() -> int:
    """Bytes of memory that only this process has: mapped libraries and the page cache do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _watch() -> None:
    while True:
        _peak[0] = max(_peak[0], _anonymous())
        time.sleep(0.002)


if __name__ == "__main__":
    _before = _anonymous()
    _peak = [_before]
    threading.Thread(target=_watch, daemon=True).start()
    main()
