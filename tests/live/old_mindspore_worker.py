"""One of 2 ranks on NPUs, under a MindSpore without views of bytes: old_mindspore_worker.py DIR"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore.mint import distributed
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.errors import MissingDependencyError


def main(directory: Path) -> None:
    ms.set_device("Ascend")
    distributed.init_process_group()
    source = directory / str(distributed.get_rank())
    source.mkdir()
    save_file({"weight": np.ones((4, 4), np.float32)}, source / "net-1_2.safetensors")
    network, other = ms.nn.Cell(), ms.nn.Cell()
    for cell in (network, other):
        cell.insert_param_to_cell("weight", ms.Parameter(ms.Tensor(np.full((4, 4), 77, np.float32)), name="weight"))
    calls: list[Callable[[], object]] = [
        lambda: ms_ckpt_ext.resume(network, checkpoint_dir=source),
        lambda: ms_ckpt_ext.load_for_inference(network, source),
        lambda: ms_ckpt_ext.transfer(network, other),
    ]
    for mode in ("direct", "cooperative", "auto"):
        calls.append(
            lambda mode=mode: ms_ckpt_ext.load_distributed_checkpoint(  # type: ignore[misc]
                network, format="safetensors", unified_safetensors_dir=source, mode=mode
            )
        )
    for call in calls:
        try:
            call()
        except MissingDependencyError as error:
            assert f"need MindSpore 2.8 or newer, and this is {ms.__version__}" in str(error), error
        else:
            raise AssertionError("was not refused")
        assert all((cell.weight.asnumpy() == 77).all() for cell in (network, other))
    ms_ckpt_ext.merge(source / "net-1_2.safetensors", directory / f"merged_{distributed.get_rank()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
