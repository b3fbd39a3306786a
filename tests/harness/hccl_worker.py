"""One rank that speaks to the emulated HCCL without MindSpore: `hccl_worker.py FOLDER WORLD`, its number in RANK_ID.

Makes a communicator and each kind of call once, and prints a line of JSON: what every call returned, and counters.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path

U64 = ctypes.c_uint64
INT8, UINT8 = 0, 7
COUNT = 4096


def main(folder: Path, world: int) -> None:
    rank = int(os.environ["RANK_ID"])
    acl, hccl = ctypes.CDLL("libascendcl.so", ctypes.RTLD_GLOBAL), ctypes.CDLL("libhccl.so")
    for call in (acl.cannemu_hbm_used, acl.cannemu_uploaded, hccl.cannemu_between_bytes, hccl.cannemu_count_bytes):
        call.restype = ctypes.c_size_t
    hccl.cannemu_link_bytes.restype = ctypes.c_size_t
    told: dict[str, object] = {"rank": rank}
    if os.environ.get("FIRST") == "memory":
        acl.aclrtMalloc(ctypes.byref(ctypes.c_void_p()), U64(4096), 0)
    comm = ctypes.c_void_p()
    told["init"] = hccl.HcclCommInitRootInfo(world, root_info(hccl, folder, rank), rank, ctypes.byref(comm))
    told["communicator"] = acl.cannemu_hbm_used()
    if told["init"] == 0:
        told.update(calls(hccl, comm, rank, world))
    told["between"], told["link"] = hccl.cannemu_between_bytes(), hccl.cannemu_link_bytes()
    told["counts"] = hccl.cannemu_count_bytes()
    told.update(uploads(acl, folder, rank))
    if told["init"] == 0:
        told["destroyed"] = hccl.HcclCommDestroy(comm)
    print(json.dumps(told), flush=True)


def root_info(hccl: ctypes.CDLL, folder: Path, rank: int) -> ctypes.Array[ctypes.c_char]:
    info = ctypes.create_string_buffer(4108)
    path = folder / "root"
    if rank == 0:
        assert hccl.HcclGetRootInfo(info) == 0
        (folder / "root.tmp").write_bytes(info.raw)
        (folder / "root.tmp").rename(path)
    while not path.exists():
        time.sleep(0.01)
    info.raw = path.read_bytes()
    return info


def calls(hccl: ctypes.CDLL, comm: ctypes.c_void_p, rank: int, world: int) -> dict[str, object]:
    send = (ctypes.c_char * COUNT).from_buffer(bytearray([rank + 1] * COUNT))
    received = ctypes.create_string_buffer(COUNT * world)
    counts = (U64 * world)(*[COUNT] * world)
    places = (U64 * world)(*range(0, COUNT * world, COUNT))
    share = (U64 * world)(*[COUNT // 8] * world)
    shares = (U64 * world)(*range(0, COUNT // 8 * world, COUNT // 8))
    told: dict[str, object] = {}
    told["AllGather"] = hccl.HcclAllGather(send, received, U64(COUNT), INT8, comm, None)
    told["gathered"] = [received.raw[each * COUNT] for each in range(world)]
    told["uint8"] = hccl.HcclAllGather(send, received, U64(COUNT), UINT8, comm, None)
    told["AllGatherV"] = hccl.HcclAllGatherV(send, U64(COUNT), received, counts, places, INT8, comm, None)
    out = ctypes.create_string_buffer(COUNT * world)
    out.raw = bytes([rank + 1]) * (COUNT * world)
    told["AlltoAllV"] = hccl.HcclAlltoAllV(out, share, shares, INT8, received, share, shares, INT8, comm, None)
    told["exchanged"] = [received.raw[each * COUNT // 8] for each in range(world)]
    return told


def uploads(acl: ctypes.CDLL, folder: Path, rank: int) -> dict[str, object]:
    """An upload from pinned, from pageable and from mapped memory."""
    device, pinned = ctypes.c_void_p(), ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(device), U64(8192), 0) == 0
    assert acl.aclrtMallocHost(ctypes.byref(pinned), U64(8192)) == 0
    up, size = 1, U64(8192)
    told: dict[str, object] = {"pinned": acl.aclrtMemcpyAsync(device, size, pinned, size, up, None)}
    plain = ctypes.create_string_buffer(8192)
    told["pageable"] = acl.aclrtMemcpy(device, size, plain, size, up)
    path = folder / f"file_{rank}"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as mapped:
        pages = (ctypes.c_char * 8192).from_buffer(mapped)
        told["mapped"] = acl.aclrtMemcpy(device, size, pages, size, up)
        del pages
    told["uploaded"] = [[acl.cannemu_uploaded(pin, later) for later in (0, 1)] for pin in (0, 1)]
    return told


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
