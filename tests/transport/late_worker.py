"""Two ranks, of which rank 1 comes when FILE is there: `late_worker.py FILE`. A content one prints "CONTENT <rank>".

Every function that meets fails on rank 0 after its timeout. No call of the backend is left under way: so both meet
afterwards, and both processes end by themselves.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Callable

import mindspore

import ms_ckpt_ext
from ms_ckpt_ext.errors import PeerError, TransportError
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.select import select_transport

TIMEOUT = 1.0


def late(call: Callable[[], object]) -> None:
    """Make a call that rank 1 does not come to."""
    began = time.monotonic()
    try:
        call()
    except TransportError as error:
        assert not isinstance(error, PeerError), error
        assert f"rank 1 did not come within {TIMEOUT:g} s" in str(error), error
        assert time.monotonic() - began > TIMEOUT - 0.1, "not after the timeout"
    else:
        raise AssertionError("rank 1 did not come, and nobody minded")


if os.environ.get("ASCEND_OPP_PATH"):
    mindspore.set_device("Ascend")
    mindspore.mint.distributed.init_process_group()
else:
    mindspore.set_device("CPU")
    mindspore.communication.init()
rank = mindspore.communication.get_rank()
network = mindspore.nn.Dense(2, 2)
source = {"format": "safetensors", "unified_safetensors_dir": "no such folder"}
done = Path(sys.argv[1])
if rank == 1:
    while not done.exists():
        time.sleep(0.05)
else:
    late(lambda: ms_ckpt_ext.resume(network, checkpoint_dir=".", timeout=TIMEOUT))
    late(lambda: ms_ckpt_ext.load_distributed_checkpoint(network, mode="cooperative", timeout=TIMEOUT, **source))
    # A rank whose own arguments are wrong tells the others, so it has to meet them, too.
    wrong = "no such strategy"
    late(lambda: ms_ckpt_ext.resume(network, checkpoint_dir=".", predict_strategy=wrong, timeout=TIMEOUT))
    done.touch()
transport = select_transport(timeout=60)
share_status(transport)
mine, everybodys = transport.allocate(8), transport.allocate(16)
transport.start_all_gather(mine, 8, everybodys).wait()
transport.close()
print(f"CONTENT {rank}", flush=True)
