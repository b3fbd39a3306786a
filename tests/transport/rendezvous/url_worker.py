"""One rank of a job that no launcher started: `url_worker.py RANK SIZE URL`, on the emulated Ascend."""

from __future__ import annotations

import sys

import mindspore
from mindspore.mint import distributed

from ms_ckpt_ext.transport.select import select_transport


def main(rank: int, size: int, url: str) -> None:
    """Join by the URL, meet, and share."""
    mindspore.set_device("Ascend", rank)
    distributed.init_process_group(init_method=url, world_size=size, rank=rank)
    transport = select_transport(timeout=60)
    assert transport.share(b"%d" % rank) == [b"%d" % number for number in range(size)]
    transport.close()
    print(f"{type(transport).__name__} met {rank}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
