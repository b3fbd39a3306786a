"""Loads into real Cells by all ranks of a world of threads."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Callable, NamedTuple, Optional

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.bridge import network, together
from ms_ckpt_ext.bridge.request import LoadRequest
from ms_ckpt_ext.bridge.settle import Manner
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load.options import LoadOptions, LoadReport
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from ms_ckpt_ext.transport.select import lent
from tests.support.parameters import held_by

ms.set_device("CPU")  # while tests are collected: MindSpore refuses it once a kernel has run
POISON = 77
HERE = threading.local()


class Filled(NamedTuple):
    """What one rank ended with; `error` instead where it failed."""

    held: Mapping[str, np.ndarray]
    missing: list[str]
    unused: list[str]
    report: Optional[LoadReport]
    error: Optional[BaseException]


def cell(shapes: Mapping[str, Any], cut: bool = False) -> Any:
    """A Cell with Parameters of these names, with the shape and dtype of each array, all values wrong.

    `cut`: MindSpore has cut them already.
    """
    made = ms.nn.Cell()
    for number, (name, like) in enumerate(shapes.items()):
        data = ms.Tensor(np.full(np.shape(like), POISON, np.asarray(like).dtype))
        parameter = ms.Parameter(data, name=name)
        parameter.sliced = cut
        made.insert_param_to_cell(f"p{number}", parameter, check_name_contain_dot=False)
    return made


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore's `get_rank` gives, in every thread, the rank of that thread's transport."""
    monkeypatch.setattr(ms.communication, "get_rank", lambda: HERE.transport.rank)
    monkeypatch.setattr(ms.communication, "get_group_size", lambda: HERE.transport.size)


def on_ranks(ranks: int, work: Callable[[LocalTransport], Filled]) -> list[Filled]:
    """Run `work` on every rank; errors are results."""

    def rank(transport: LocalTransport) -> Filled:
        HERE.transport = transport
        return work(transport)

    return LocalWorld(ranks, timeout=20.0).run(rank)


def load(
    wanted: Callable[[int], Mapping[str, Any]],
    ranks: int,
    by: Optional[Callable[[LocalTransport], LocalTransport]] = None,
    **arguments: Any,
) -> list[Filled]:
    """`load_distributed_checkpoint` into a Cell on every rank; `by` wraps its transport."""

    def work(transport: LocalTransport) -> Filled:
        made = cell(wanted(transport.rank))
        try:
            with nullcontext() if by is None else lent(by(transport)):
                missing, unused = load_distributed_checkpoint(made, **{"format": "safetensors", **arguments})
        except Exception as error:
            return Filled(held_by(made), [], [], None, error)
        return Filled(held_by(made), missing, unused, None, None)

    return on_ranks(ranks, work)


def fill(
    source: together.SharedSource,
    target: Any,
    wanted: Callable[[int], Mapping[str, Any]],
    ranks: int,
    mode: str = "cooperative",
    verify: str = "none",
    host: Callable[[int], str] = lambda rank: "one",
    cut: bool = False,
) -> list[Filled]:
    """Load into a Cell on every rank. `target`: a strategy, or one by rank; mode "alone" is `network.fill`."""

    def work(transport: LocalTransport) -> Filled:
        rank = transport.rank
        made = cell(wanted(rank), cut)
        strategy: Optional[Strategy] = target(rank) if callable(target) else target
        alone = mode == "alone"
        options = LoadOptions(
            mode="direct" if alone else mode, verify=verify, host=host(rank), bucket_bytes=1 << 20, timeout=20.0
        )
        request = LoadRequest(made, strategy, rank, Manner(strict=False, exact=False), options=options)
        try:
            if alone:
                found = network.fill(request, request.read(source.look(), source.strategy, source.access))
            else:
                found = together.fill_together(request, source)
        except Exception as error:
            return Filled(held_by(made), [], [], None, error)
        return Filled(held_by(made), found.missing, found.unused, found.report, None)

    return on_ranks(ranks, work)
