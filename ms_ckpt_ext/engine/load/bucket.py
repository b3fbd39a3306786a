"""How much staging memory a rank has for one round, and how long its reads are.

Every round costs a status and a call or two, and a call is slow beyond HCCL_BUFFSIZE: so on a device a round reads,
sends and receives about that much each. Two rounds are under way, and what Parameters still take of the device comes
first: never more than an eighth of what is left then. What is left the device tells; where it does not, its profile and
the plan do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits
from ms_ckpt_ext.transport.base import Transport

_SHARE_OF_LOAD = 24
"""A chunk is at most this fraction of a rank's fair share of the reading: readers can be balanced within 5 %."""
_LEAST = 4 << 20
"""Bytes; below, reads are short."""
_CALLS, _SHARE_OF_FREE = 3, 8
"""A bucket is as many calls' worth, and such a fraction of what is left, at most."""
_OTHERS = 8
"""The fraction of a device that driver, communicators and the like are assumed to take."""


def limits_for(demands: Sequence[Demand], world: int, bucket: int) -> ExchangeLimits:
    """Chunks of several MiB, smaller where the checkpoint is, so that every reader has several."""
    total = sum(d.tensor.meta.dtype.nbytes(math.prod(d.tensor.meta.shape)) for d in demands)
    chunk = min(ExchangeLimits().chunk, max(1024, total // (world * _SHARE_OF_LOAD)))
    return ExchangeLimits(bucket, chunk)


def bucket_for(asked: Optional[int], call_bytes: int, left: int) -> int:
    """The bucket that was asked for, or one that fits.

    Args:
        call_bytes: HCCL_BUFFSIZE; 0 where there is none.
        left: bytes of the device that the rank with the least has left; 0 where buffers are in host memory.
    """
    if asked is not None:
        return asked
    wanted = max(_CALLS * call_bytes, ExchangeLimits().bucket)
    return max(_LEAST, min(wanted, left // _SHARE_OF_FREE)) if left else ExchangeLimits().bucket


def left_on_all(transport: Transport[Any], to_come: int, demands: Sequence[Demand], hardware: Hardware) -> int:
    """Bytes that the device with the least will have left; 0 where buffers are in host memory. Collective.

    Args:
        to_come: bytes that this rank's Parameters will still take of its device.
    """
    free = transport.free_bytes()
    told = [int(answer) for answer in transport.share(str(free and max(free - to_come, 1)).encode())]
    if all(told) or not transport.traits.on_device:
        return min(told)
    return left_by(demands, transport.size, hardware)


def left_by(demands: Sequence[Demand], world: int, hardware: Hardware) -> int:
    """Bytes of a device of this profile that the Parameters of the rank with the most leave; 0 where it has none."""
    if not hardware.memory:
        return 0
    wanted = np.zeros(world, np.int64)
    for demand in demands:
        meta = demand.tensor.meta
        for grid in demand.grids:
            if grid.uneven:
                for cell, ranks in grid.ranks.items():
                    wanted[list(ranks)] += meta.dtype.nbytes(grid.region(cell, meta.shape).size)
                continue
            sizes = (extent // count for extent, count in zip(meta.shape, grid.parts))
            wanted[[rank for ranks in grid.ranks.values() for rank in ranks]] += meta.dtype.nbytes(math.prod(sizes))
    usable = int(hardware.memory) * (_OTHERS - 1) // _OTHERS
    return max(usable - int(wanted.max(initial=0)), 1)
