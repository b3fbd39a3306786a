"""One rank on one of two hosts between which the link goes down during a load: link_worker.py CASE FOLDER.

It leaves `under_way_RANK` in the folder when its first bytes have landed, waits for `cut`, and goes on; then it leaves
in `told_RANK` what it is told, and when.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import mindspore as ms
from mindspore.communication import init
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.bridge.memory import ParameterSink
from ms_ckpt_ext.errors import CheckpointError
from tests.support.checkpoints import read_file
from tests.support.parameters import poisoned


def main(case: dict[str, Any], folder: Path) -> None:
    """See the module."""
    ms.set_device("CPU")
    init()
    rank = distributed.get_rank()
    place = ParameterSink.place

    def waiting(sink: Any, *arguments: Any) -> None:
        if not (folder / "cut").exists():
            (folder / f"under_way_{rank}").touch()
            while not (folder / "cut").exists():
                time.sleep(0.05)
        place(sink, *arguments)

    cell = poisoned(read_file(next(Path(case["expected"]).glob(f"rank_{rank}/*.safetensors"))))
    told = {"kind": "", "text": "", "at": 0.0}
    try:
        with mock.patch.object(ParameterSink, "place", waiting):
            load_distributed_checkpoint(
                cell, None, case["predicted"], case["trained"], format="safetensors",
                unified_safetensors_dir=case["source"], mode="cooperative", bucket_bytes=16384,
            )  # fmt: skip
    except CheckpointError as error:
        told = {"kind": type(error).__name__, "text": str(error), "at": time.monotonic()}
    print(told, flush=True)
    (folder / f"writing_{rank}").write_text(json.dumps(told))
    (folder / f"writing_{rank}").rename(folder / f"told_{rank}")
    os._exit(0)  # at exit MindSpore waits for the ranks that are out of reach


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
