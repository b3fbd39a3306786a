"""One rank on one of several hosts: loads in every mode from what its host sees, and resumes. Nothing names a host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore.communication import init
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint, resume
from tests.support.checkpoints import read_file
from tests.support.parameters import bytes_of, poisoned

MODES = ("direct", "cooperative", "auto")


def load(case: dict[str, Any], mode: str, cell: ms.nn.Cell) -> None:
    """By the folder of the checkpoint."""
    missing, unused = load_distributed_checkpoint(
        cell,
        None,
        case["predicted"],
        case["trained"],
        format="safetensors",
        unified_safetensors_dir=case["source"],
        mode=mode,
        verify="replicas",
    )
    assert (missing, unused) == ([], []), (missing, unused)


def restore(case: dict[str, Any], mode: str, cell: ms.nn.Cell) -> None:
    """By the folder of all checkpoints."""
    state = resume(
        cell,
        checkpoint_dir=case["source"],
        predict_strategy=case["predicted"],
        train_strategy_filename=case["trained"],
        mode=mode,
        verify="replicas",
    )
    assert not state.skipped, state


def main(cases: Path) -> None:
    """All cases; what is wrong raises."""
    ms.set_device("CPU")
    init()
    rank = distributed.get_rank()
    for case in json.loads(cases.read_text()):
        expected = read_file(next(Path(case["expected"]).glob(f"rank_{rank}/*.safetensors")))
        for mode in MODES:
            for way in (load, restore):
                cell = poisoned(expected)
                way(case, mode, cell)
                found = bytes_of(cell)
                wrong = [name for name, tensor in expected.items() if found[name] != tensor.data]
                assert not wrong, f"{way.__name__}, {mode}: {wrong}"
                print(f"{way.__name__} {case['name']} {mode} is right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
