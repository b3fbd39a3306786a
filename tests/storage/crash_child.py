"""Runs a merge and kills itself, without a word to anybody, just before its n-th call that changes the disk."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any, Callable

from ms_ckpt_ext import load_distributed_checkpoint, unified_safetensors

SEALED = b"0123456789ABCDEF"
CALLS = ("pwrite", "copy_file_range", "rename", "replace", "unlink", "fsync", "mkdir", "rmdir")


def main() -> None:
    job, kill_at, root, target = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    counter = itertools.count(1)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **more: Any) -> Any:
            if next(counter) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)

        return wrapper

    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, counted(getattr(os, name)))
    run_job(job, root, target)
    print(next(counter) - 1)


def run_job(job: str, root: Path, target: str | Path) -> Any:
    """The job that is killed: a merge in parts, synced or not or encrypted, or a re-cut for every rank."""
    shards, strategy = root / "shards", root / "strategy.ckpt"
    if job == "sealed":
        more = {"output_format": "ckpt", "enc_key": SEALED, "crc": True}
        return unified_safetensors(shards, strategy, target, part_bytes=9000, max_process_num=2, **more)
    if job in ("merge", "unsynced"):
        return unified_safetensors(shards, strategy, target, part_bytes=9000, max_process_num=2, sync=job == "merge")
    return load_distributed_checkpoint(
        None, None, root / "target.ckpt", strategy, format="safetensors", unified_safetensors_dir=shards,
        dst_safetensors_dir=target, max_process_num=2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
