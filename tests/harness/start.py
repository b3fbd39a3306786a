"""How a worker joins the ranks that msrun started."""

from __future__ import annotations

import mindspore as ms
from mindspore.communication import init
from mindspore.mint import distributed


def join_ranks(device: str) -> int:
    """Join on "ascend" or "cpu"; returns the rank."""
    if device == "ascend":
        ms.set_device("Ascend")
        distributed.init_process_group()
    else:
        ms.set_device("CPU")
        init()
    rank: int = distributed.get_rank()
    return rank
