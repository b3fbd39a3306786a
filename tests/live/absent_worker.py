"""One rank of two hosts that loads, unless it is the last: `absent_worker.py CASE FOLDER`. It leaves `told_RANK`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.communication import init
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.errors import CheckpointError

TIMEOUT = 12.0


def main(case: dict[str, Any], folder: Path) -> None:
    """See the module."""
    ms.set_device("CPU")
    init()
    rank = distributed.get_rank()
    if rank == distributed.get_world_size() - 1:
        time.sleep(3 * TIMEOUT)
        os._exit(0)
    try:
        load_distributed_checkpoint(
            ms.nn.Cell(), None, case["predicted"], case["trained"], format="safetensors",
            unified_safetensors_dir=case["source"], timeout=TIMEOUT,
        )  # fmt: skip
        told = "nothing"
    except CheckpointError as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"writing_{rank}").write_text(told)
    (folder / f"writing_{rank}").rename(folder / f"told_{rank}")
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
