"""A load over a backend that delivers other bytes than were sent: an error names it, and nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LoadError, TransportError
from ms_ckpt_ext.transport.base import Done
from ms_ckpt_ext.transport.known_answer import prove
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.cells import POISON, load, threads
from tests.support.checkpoints import strategy_of
from tests.support.shards import Full, write

__all__ = ["threads"]


class Zeros(LocalTransport):
    """A rank's transport that delivers zeros."""

    def __init__(self, transport: LocalTransport) -> None:
        self.__dict__ = transport.__dict__

    def start_all_to_all(self, send: Any, send_counts: Sequence[int], recv: Any, recv_counts: Sequence[int]) -> Done:
        recv[: sum(recv_counts)] = 0
        return Done()

    def prove(self) -> None:
        prove(self, lambda buffer: buffer, "HCCL on ascend910")

    def close(self) -> None:
        """The rank stays."""


def test_zeros_are_named_with_the_call_and_the_bytes(tmp_path: Path, threads: None) -> None:
    full: Full = {"w": ("F32", np.arange(64, dtype=np.float32).reshape(8, 8))}
    trained = strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "trained.ckpt")
    strategy_of({"w": Layout((2,), ((), (0,)))}, tmp_path / "predicted.ckpt")
    write(trained, full, tmp_path / "source")
    slice_ = np.zeros((8, 4), np.float32)
    filled = load(
        lambda rank: {"w": slice_}, 2, by=Zeros, mode="cooperative", unified_safetensors_dir=str(tmp_path / "source"),
        predict_strategy=str(tmp_path / "predicted.ckpt"), train_strategy_filename=str(tmp_path / "trained.ckpt"),
    )  # fmt: skip
    for each in filled:
        assert isinstance(each.error, TransportError) and not isinstance(each.error, LoadError), each.error
        for told in ("HCCL on ascend910 returned success", "rank 0: all_to_all: expected ", "found 00000000"):
            assert told in str(each.error)
        assert (each.held["w"] == POISON).all()
