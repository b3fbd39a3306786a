"""HCCL by `mint.distributed`, and by what MindSpore does not call of it. A part of selftest.py."""

import ctypes

import mindspore as ms
import numpy as np
from checking import T, case, check, data, rank, world
from mindspore import mint
from mindspore.mint import distributed as D


def gather_one(dtype, n=6):
    out = mint.zeros((world * n,), dtype=dtype)
    mine = T(data(rank, n, np.int32)).astype(dtype)
    D.all_gather_into_tensor(out, mine)
    want = np.concatenate([data(r, n, np.int32) for r in range(world)])
    check(str(dtype), out.astype(ms.int32), want)


@case
def all_gather_into_tensor():
    for dtype in (ms.float32, ms.bfloat16, ms.float16, ms.uint8, ms.int8, ms.int32, ms.int64):
        gather_one(dtype)


@case
def all_gather_2d_large():
    out = mint.empty((world * 300, 1001), dtype=ms.float32)
    D.all_gather_into_tensor(out, T(data(rank, 300300, np.float32).reshape(300, 1001)))
    check("2d", out, np.concatenate([data(r, 300300, np.float32).reshape(300, 1001) for r in range(world)]))


@case
def all_gather_into_tensor_uneven():
    for dtype in (np.float32, np.uint8):
        rows = [r + 1 for r in range(world)]
        out = T(np.zeros((sum(rows), 3), dtype))
        D.all_gather_into_tensor_uneven(out, T(data(rank, rows[rank] * 3, dtype).reshape(-1, 3)), rows)
        check("uneven", out, np.concatenate([data(r, rows[r] * 3, dtype).reshape(-1, 3) for r in range(world)]))


@case
def all_to_all_single_even():
    for dtype in (np.uint8, np.float32):
        out = T(np.zeros((world * 2,), dtype))
        D.all_to_all_single(out, T(data(rank, world * 2, dtype)))
        check("even", out, np.concatenate([data(r, world * 2, dtype)[rank * 2 : rank * 2 + 2] for r in range(world)]))


@case
def all_to_all_single_uneven():
    # rank r sends (r + d) % 3 bytes to rank d; some of them are zero
    def split(r):
        return [(r + d) % 3 for d in range(world)]

    def piece(r, d):
        at = sum(split(r)[:d])
        return data(r, sum(split(r)), np.uint8)[at : at + split(r)[d]]

    want = np.concatenate([piece(r, rank) for r in range(world)])
    out = T(np.zeros(want.shape, np.uint8))
    D.all_to_all_single(
        out, T(data(rank, sum(split(rank)), np.uint8)), [split(r)[rank] for r in range(world)], split(rank)
    )
    check("uneven", out, want)


@case
def broadcast():
    for dtype in (np.uint8, np.float32):
        for root in range(world):
            x = T(data(rank, 9, dtype))
            D.broadcast(x, root)
            check(f"root {root}", x, data(root, 9, dtype))


@case
def all_reduce():
    for dtype in (np.float32, np.float16, np.int32):
        x = T(data(rank, 5, dtype))
        D.all_reduce(x)
        check(str(dtype), x, sum(data(r, 5, dtype) for r in range(world)).astype(dtype))


@case
def reduce_scatter_tensor():
    out = T(np.zeros((4,), np.float32))
    D.reduce_scatter_tensor(out, T(data(rank, 4 * world, np.float32)))
    check("rs", out, sum(data(r, 4 * world, np.float32) for r in range(world))[rank * 4 : rank * 4 + 4])


@case
def scatter_and_all_gather_list():
    out = T(np.zeros((3,), np.float32))
    D.scatter(out, [T(data(r, 3, np.float32)) for r in range(world)], 0)
    check("scatter", out, data(rank, 3, np.float32))
    outs = [T(np.zeros((3,), np.float32)) for _ in range(world)]
    D.all_gather(outs, out)
    for r in range(world):
        check("all_gather", outs[r], data(r, 3, np.float32))


@case
def new_group_all_gather():
    for members in ([0, 1], list(range(1, world)), list(range(0, world, 2))):
        if rank in members:  # only members may call: on others it "fails" and the next creation hangs
            g = D.new_group(members)
            assert g != ""
            out = T(np.zeros((len(members) * 5,), np.float32))
            D.all_gather_into_tensor(out, T(data(rank, 5, np.float32)), group=g)
            check(str(members), out, np.concatenate([data(r, 5, np.float32) for r in members]))


@case
def batch_isend_irecv():
    for dtype in (np.float32, np.uint8):
        right, left = (rank + 1) % world, (rank - 1) % world
        out = T(np.zeros((7,), dtype))
        todo = [D.P2POp("isend", T(data(rank, 7, dtype)), right), D.P2POp("irecv", out, left)]
        for h in D.batch_isend_irecv(todo):
            if h is not None:
                h.wait()
        check("ring", out, data(left, 7, dtype))


@case
def send_recv():
    if rank == 0:
        D.send(T(data(0, 4, np.float32)), 1)
    elif rank == 1:
        x = T(np.zeros((4,), np.float32))
        D.recv(x, 0)
        check("recv", x, data(0, 4, np.float32))


@case
def async_handle():
    out = T(np.zeros((world * 5,), np.float32))
    h = D.all_gather_into_tensor(out, T(data(rank, 5, np.float32)), async_op=True)
    h.wait()
    check("async", out, np.concatenate([data(r, 5, np.float32) for r in range(world)]))


@case
def barrier():
    for _ in range(3):
        D.barrier()


@case
def hccl_by_ctypes():
    # What MindSpore itself does not call: HcclBarrier, HcclAlltoAllVC, HcclCreateSubCommConfig.
    lib, u64, ptr = ctypes.CDLL("libhccl.so"), ctypes.c_uint64, ctypes.c_void_p
    info = ctypes.create_string_buffer(4108)
    if rank == 0:
        assert lib.HcclGetRootInfo(info) == 0
    shared = T(np.frombuffer(info.raw, np.uint8).copy())
    D.broadcast(shared, 0)
    info.raw = shared.asnumpy().tobytes()
    comm, sub = ptr(), ptr()
    assert lib.HcclCommInitRootInfo(world, info, rank, ctypes.byref(comm)) == 0
    ms.runtime.synchronize()
    assert lib.HcclBarrier(comm, None) == 0
    matrix = np.array([[(r + 2 * d) % 3 for d in range(world)] for r in range(world)], np.uint64)
    send = np.concatenate([np.full(int(matrix[rank, d]), 16 * rank + d, np.uint8) for d in range(world)])
    recv = np.zeros(int(matrix[:, rank].sum()), np.uint8)
    assert (
        lib.HcclAlltoAllVC(ptr(send.ctypes.data), ptr(matrix.ctypes.data), 7, ptr(recv.ctypes.data), 7, comm, None) == 0
    )
    assert lib.aclrtSynchronizeStream(None) == 0
    check(
        "AlltoAllVC",
        recv,
        np.concatenate([np.full(int(matrix[r, rank]), 16 * r + rank, np.uint8) for r in range(world)]),
    )
    if rank < 2:
        ids = (ctypes.c_uint32 * 2)(0, 1)
        assert lib.HcclCreateSubCommConfig(ctypes.byref(comm), 2, ids, u64(5), rank, None, ctypes.byref(sub)) == 0
        send, recv = np.full(3, rank + 1, np.int32), np.zeros(6, np.int32)
        assert lib.HcclAllGather(ptr(send.ctypes.data), ptr(recv.ctypes.data), u64(3), 2, sub, None) == 0
        assert lib.aclrtSynchronizeStream(None) == 0
        check("sub", recv, np.array([1, 1, 1, 2, 2, 2], np.int32))
        assert lib.HcclCommDestroy(sub) == 0
    assert lib.HcclCommDestroy(comm) == 0
