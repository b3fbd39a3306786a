"""What the modules of selftest.py share: joining the ranks, a list of cases, comparing bytes."""

import sys
import traceback

import mindspore as ms
import numpy as np
from mindspore.mint import distributed as D

ms.set_device("Ascend")
D.init_process_group()
rank, world = D.get_rank(), D.get_world_size()
T = ms.Tensor
cases = []


def check(name, got, want):
    got = got.asnumpy() if isinstance(got, ms.Tensor) else np.asarray(got)
    want = np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{name}: got {got.dtype}{got.shape}, want {want.dtype}{want.shape}"
    )
    assert got.tobytes() == want.tobytes(), f"{name}:\n got  {got.ravel()[:16]}\n want {want.ravel()[:16]}"


def case(f):
    """Has `run` run it."""
    cases.append(f)
    return f


def run():
    """Run all cases; returns the names of those that failed."""
    failed = []
    for f in cases:
        try:
            f()
            ms.runtime.synchronize()
            print(f"OK {f.__name__} (rank {rank})", flush=True)
        except Exception as e:  # pylint: disable=broad-except
            failed.append(f.__name__)
            print(f"FAIL {f.__name__} (rank {rank}) {type(e).__name__}: {str(e)[:600]}", flush=True)
            if "-v" in sys.argv:
                traceback.print_exc()
    D.barrier()
    ms.runtime.synchronize()
    return failed


def data(r, n, dtype):
    """What rank r contributes: n numbers, different for every rank and position, all dtypes exact."""
    return ((np.arange(n) * 7 + r * 31) % 101).astype(dtype)
