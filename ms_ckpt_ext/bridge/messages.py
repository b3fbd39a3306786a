"""Layouts as MindSpore's own protobuf messages, which its functions and users' code look into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ms_ckpt_ext.bridge.world import mindspore as ms


def messages_of(items: Iterable[Any]) -> dict[str, Any]:
    """Entries of a strategy file by their names there, as MindSpore's messages: `ParallelLayouts`, byte for byte."""
    theirs = ms.train.node_strategy_pb2.ParallelLayouts
    return {item.param_name: theirs.FromString(item.parallel_layouts.SerializePartialToString()) for item in items}
