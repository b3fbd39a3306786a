"""One rank of a first meeting that takes too long: `roll_worker.py RANK SIZE TIMEOUT`.

It prints "ready", waits for a line on its standard input and then for as long as TIMEOUT, and prints the error.
"""

from __future__ import annotations

import sys
import time

from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.roll import calling_roll


def main(rank: int, size: int, timeout: float) -> None:
    """See the module."""
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with calling_roll(rank, size, timeout):
            time.sleep(timeout)
            raise TransportError("it took too long")
    except TransportError as error:
        print(error, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
