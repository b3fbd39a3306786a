"""One rank of a live load: fills Cells whose Parameters hold poison and writes down what they hold afterwards."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from mindspore.mint import distributed

from ms_ckpt_ext import load_distributed_checkpoint, training_scalars
from ms_ckpt_ext.errors import CheckpointError
from tests.harness.start import join_ranks
from tests.support.checkpoints import read_file
from tests.support.machine import ReadMade, contents_read, watch_reads
from tests.support.parameters import bytes_of, poisoned


def check(rank: int, case: dict[str, Any], reads: list[ReadMade]) -> None:
    """One load; everything that is wrong raises."""
    expected = read_file(next(Path(case["expected"]).glob(f"rank_{rank}/*.safetensors")))
    cell = poisoned(expected)
    host = rank * case.get("hosts", 1) // distributed.get_world_size()

    def load() -> tuple[list[str], list[str]]:
        source = case["source"].format(host=host)
        with mock.patch.dict(os.environ, {"MS_CKPT_EXT_HOST": f"host-{host}"}):
            return load_distributed_checkpoint(
                cell, None, case["predicted"], case["trained"], format=case.get("format", "safetensors"),
                unified_safetensors_dir=source, mode=case.get("mode"), **case.get("options", {}),
            )  # fmt: skip

    if "error" in case:
        before = bytes_of(cell)
        try:
            load()
        except CheckpointError as error:
            assert type(error).__name__ == case["error"], error
            assert all(text in str(error) for text in case["says"]), error
            assert bytes_of(cell) == before, "something was changed"
            return
        raise AssertionError(f"{case['name']}, rank {rank}: no error")
    missing, unused = load()
    found = bytes_of(cell)
    wrong = [name for name, tensor in expected.items() if found[name] != tensor.data]
    assert not wrong, f"{case['name']}, rank {rank}: {wrong}"
    assert missing == [], missing
    assert sorted(unused) == sorted(case.get("unused", [])), unused
    if "counted" in case:  # beside its slices, the beginnings of two slices, and all copies of training scalars
        own = sum(len(tensor.data) for tensor in expected.values())
        files = Path(case["source"]).rglob("*.safetensors")
        read = sum(read.nbytes for read in contents_read(reads, *files))
        beside = case["counted"]
        assert read == own + beside, f"{case['name']}, rank {rank}: read {read} bytes, its slices have {own}"
    if "scalars" in case:
        told = training_scalars(case["source"], case["trained"])
        assert {name: value.tobytes().hex() for name, value in told.items()} == case["scalars"]


def main() -> None:
    rank = join_ranks(sys.argv[2])
    reads = watch_reads(pytest.MonkeyPatch())
    for case in json.loads(Path(sys.argv[1]).read_text()):
        reads.clear()
        check(rank, case, reads)
        print(f"case {case['name']} is right", flush=True)


if __name__ == "__main__":
    main()
