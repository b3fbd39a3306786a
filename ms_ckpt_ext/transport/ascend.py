"""What MindSpore reports about NPUs: the product and what it lacks, free memory, groups that have a communicator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Optional

import mindspore

from ms_ckpt_ext.transport.base import Ranks

_BUFFER_MB = 200
"""HCCL_BUFFSIZE where it is not set, in MiB."""


def _can_give(pool: Mapping[str, int], free: int, total: int) -> int:
    """Bytes that a memory pool can give at least.

    Args:
        pool: from `mindspore.runtime.memory_stats`. Its "eager free" bytes are addresses that the pool has
            reserved, up to its limit, and not backed yet; 0 where it takes memory in blocks (310P), or took all of it
            at the start and reports only the blocks in use (910A).
        free, total: bytes of the device; MindSpore leaves a sixteenth of the total unused.
    """
    idle = pool["total_reserved_memory"] - pool["total_allocated_memory"]
    may_take = pool["total_eager_free_memory"] or max(0, free - total // 16)
    return idle + min(free, may_take)


def own_groups(rank: int, size: int) -> dict[Ranks, str]:
    """The groups of some ranks that this process made, or MindSpore for the network it compiled: ranks -> name.

    The communicator of each exists, so using it takes no more device memory. Empty where MindSpore does not list them.
    """
    try:
        from mindspore._c_expression import CollectiveManager

        told = CollectiveManager.get_instance().get_group_map()
    except (ImportError, AttributeError, RuntimeError):
        return {}
    found: dict[Ranks, str] = {}
    for name, ranks in sorted(told.items(), reverse=True):
        if rank in ranks and 1 < len(ranks) < size and list(ranks) == sorted(set(ranks)):
            found[tuple(ranks)] = str(name)
    return found


def soc_version() -> str:
    """The product, in lower case."""
    from mindspore._c_expression import MSContext

    return str(MSContext.get_instance().get_ascend_soc_version()).lower()


def free_bytes() -> int:
    """What MindSpore's pool may still take of the device, plus what it holds idle; 0 where that is not known."""
    try:
        device = mindspore.hal.get_device_properties(0, "Ascend")  # of this process's device, whatever the number
        pool = mindspore.runtime.memory_stats()
        return _can_give(pool, int(device.free_memory), int(device.total_memory))
    except (AttributeError, KeyError, RuntimeError):  # another version reports it differently
        return 0


def call_limit() -> int:
    """Bytes of one call beyond which it is slow: HCCL_BUFFSIZE."""
    told = os.environ.get("HCCL_BUFFSIZE", "")
    return (int(told) if told.isdecimal() and int(told) else _BUFFER_MB) << 20


def on_one_server(size: int, group: Optional[str]) -> bool:
    """Whether all ranks are on this host, as far as MindSpore knows."""
    try:
        return group is not None or int(mindspore.communication.get_local_rank_size()) >= size
    except RuntimeError:  # the backend does not count hosts
        return True


def lacks_all_to_all(product: str, size: int, one_server: bool) -> bool:
    """By HCCL's documentation: 300I Duo has it for at most 4 NPUs of one server, 910A for whole clusters of 4."""
    if product.startswith("ascend310p"):
        return size > 4 or not one_server
    return product == "ascend910" and size > 2 and size % 4 != 0
