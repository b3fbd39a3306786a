"""Layouts as MindSpore's own protobuf messages, which its functions and users' code look into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.formats.strategy_wire import Entry


def messages_of(entries: Iterable[Entry]) -> dict[str, Any]:
    """Name as the strategy file has it -> `ParallelLayouts`, byte for byte what the file holds."""
    return {entry.name: ms.train.node_strategy_pb2.ParallelLayouts.FromString(entry.message) for entry in entries}
