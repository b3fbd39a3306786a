"""Views, copies, operators, and a training step. A part of selftest.py."""

import mindspore as ms
import numpy as np
from checking import T, case, check, data, rank, world
from mindspore import mint, ops
from mindspore.mint import distributed as D
from mindspore.ops.operations import _grad_ops as G


@case
def narrow_contiguous():
    a = np.arange(60, dtype=np.float32).reshape(5, 12)
    x = T(a)
    check("narrow 0", mint.narrow(x, 0, 1, 3).contiguous(), a[1:4])
    check("narrow 1", mint.narrow(x, 1, 5, 4).contiguous(), a[:, 5:9])
    check("no copy", mint.narrow(x, 1, 5, 4), a[:, 5:9])
    check("transposed", mint.transpose(x, 0, 1).contiguous(), np.ascontiguousarray(a.T))
    check("index", x[1:4, ::3].contiguous(), np.ascontiguousarray(a[1:4, ::3]))


@case
def gather_of_a_slice():
    # the usual re-sharding step: send a column block, receive side by side
    a = np.arange(4 * 2 * world, dtype=np.float32).reshape(4, 2 * world) + 100 * rank
    out = T(np.zeros((world * 4, 2), np.float32))
    D.all_gather_into_tensor(out, mint.narrow(T(a), 1, 2, 2).contiguous())
    check("slice", out, np.concatenate([a[:, 2:4] + 100 * (r - rank) for r in range(world)]))


@case
def view_as_bytes():
    a = np.arange(10, dtype=np.float32) * 1.25
    x = T(a)
    check("uint8", x.view(ms.uint8), a.view(np.uint8))
    check("and back", T(a.view(np.uint8)).view(ms.float32), a)
    b = x.astype(ms.bfloat16).view(ms.uint8)
    check("bf16", b, (a.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))


@case
def parameter_copy():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    p = ms.Parameter(T(np.zeros((3, 4), np.float32)), name="p")
    p.copy_(T(a))
    check("copy_", p, a)
    p.set_data(T(a + 1))
    check("set_data", p, a + 1)
    mint.narrow(p, 1, 1, 2).copy_(T(np.full((3, 2), -1, np.float32)))
    want = a + 1
    want[:, 1:3] = -1
    check("copy_ into a view", p, want)
    q = T(np.zeros((3, 4), np.float16))
    q.copy_(T(a))
    check("copy_ with cast", q, a.astype(np.float16))


@case
def cat_stack_split():
    a, b = np.arange(6, dtype=np.uint8).reshape(2, 3), np.arange(9, dtype=np.uint8).reshape(3, 3)
    check("cat 0", mint.cat((T(a), T(b)), 0), np.concatenate((a, b)))
    check("cat 1", mint.cat((T(b), T(b)), 1), np.concatenate((b, b), 1))
    check("stack", mint.stack((T(b), T(b)), 1), np.stack((b, b), 1))
    for got, want in zip(mint.split(T(b), 1, 0), np.split(b, 3)):
        check("split", got.contiguous(), want)


@case
def empty_zeros_full():
    check("zeros", mint.zeros((3, 2), dtype=ms.float32), np.zeros((3, 2), np.float32))
    check("ones", mint.ones((3, 2), dtype=ms.int8), np.ones((3, 2), np.int8))
    check("full", mint.full((4,), 2.5, dtype=ms.float32), np.full(4, 2.5, np.float32))
    x = mint.empty((3, 2), dtype=ms.float32)
    assert x.shape == (3, 2)
    x.copy_(T(np.ones((3, 2), np.float32)))
    check("empty", x, np.ones((3, 2), np.float32))


@case
def cast():
    a = np.linspace(-70000, 70000, 1001).astype(np.float32)
    check("f16", ops.cast(T(a), ms.float16), a.astype(np.float16))
    b = a.view(np.uint32)
    want = ((b + 0x7FFF + ((b >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    check("bf16", ops.cast(ops.cast(T(a), ms.bfloat16), ms.float32), want)
    tiny = np.arange(0, 1 << 15, dtype=np.uint16).view(np.float16)
    tiny = tiny[np.isfinite(tiny)]
    check("all f16", ops.cast(ops.cast(T(tiny), ms.float32), ms.float16), tiny)
    check("int", ops.cast(T(a), ms.int32), a.astype(np.int32))


@case
def compare_and_arithmetic():
    a = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    x = T(a)
    check("add", x + 1, a + 1)
    check("sub", x - x, a - a)
    check("mul", x * 2.5, a * np.float32(2.5))
    check("eq", x == T(np.abs(a)), a == np.abs(a))
    check("sum", mint.sum(x), a.sum())
    check("sum dim", mint.sum(x, 1), a.sum(1))
    check("max", mint.max(x), a.max())
    assert mint.equal(x, x) and not mint.equal(x, x + 1)
    assert bool((x == x).all())


@case
def numpy_round_trip():
    for dtype in (np.bool_, np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64):
        a = data(rank, 33, np.int32).astype(dtype)
        x = T(a)
        y = mint.empty(x.shape, dtype=x.dtype)
        y.copy_(x)
        check(str(dtype), y, a)


@case
def aclop_operators():
    # Primitives that MindSpore launches by aclopCompileAndExecute instead of an aclnn kernel.
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 6)).astype(np.float32)
    x, y = T(a), T(b)

    def close(name, got, want):
        np.testing.assert_allclose(got.asnumpy(), want, rtol=1e-5, atol=1e-6, err_msg=name)

    f64 = a.astype(np.float64)
    close("AddN", ops.AddN()([x, y, x]), a + b + a)
    close("BiasAdd", ops.BiasAdd()(x, T(b[0])), a + b[0])
    close("BiasAddGrad", G.BiasAddGrad()(x), f64.sum(0))
    check("StridedSlice", ops.StridedSlice()(x, (1, 1), (4, 6), (1, 2)), np.ascontiguousarray(a[1:4, 1:6:2]))
    check(
        "masks", ops.StridedSlice(begin_mask=1, end_mask=2)(x, (1, 1), (3, 4), (1, 1)), np.ascontiguousarray(a[:3, 1:])
    )
    check("shrink", ops.StridedSlice(shrink_axis_mask=1)(x, (1, 1), (3, 4), (1, 1)), a[1, 1:4])
    want = np.zeros((4, 6), np.float32)
    want[1:4, 1:6:2] = b[1:4, 1:6:2]
    check(
        "StridedSliceGrad",
        G.StridedSliceGrad()(T(np.ascontiguousarray(want[1:4, 1:6:2])), (4, 6), (1, 1), (4, 6), (1, 2)),
        want,
    )
    close("ReduceSum", ops.ReduceSum(True)(x, (1,)), f64.sum(1, keepdims=True))
    close("ReduceMean", ops.ReduceMean()(x, (0, 1)), f64.mean())
    close("RealDiv", ops.RealDiv()(x, y), a / b)
    close("SquaredDifference", ops.SquaredDifference()(x, y), (a - b) ** 2)
    check("ZerosLike", ops.ZerosLike()(x), np.zeros_like(a))
    check("OnesLike", ops.OnesLike()(x), np.ones_like(a))
    p = ms.Parameter(T(a), name="p")
    ops.Assign()(p, y)
    check("Assign", p, b)
    ops.AssignAdd()(p, x)
    check("AssignAdd", p, b + a)
    ops.AssignSub()(p, x)
    check("AssignSub", p, b + a - a)


@case
def training_operators():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 6)).astype(np.float32)
    x, y = T(a), T(b)
    check("ReLU", ops.ReLU()(x), np.maximum(a, 0))
    check("ReluGrad", G.ReluGrad()(x, y), np.where(b > 0, a, np.float32(0)))
    check("Square", ops.Square()(x), a * a)
    check("Tile", ops.Tile()(x, (2, 3, 2)), np.tile(a, (2, 3, 2)))
    for op, f in ((ops.Exp(), np.exp), (ops.Tanh(), np.tanh), (ops.Sigmoid(), lambda v: 1 / (1 + np.exp(-v)))):
        np.testing.assert_allclose(op(x).asnumpy(), f(a), rtol=1e-6, err_msg=op.name)
    np.testing.assert_allclose(ops.Pow()(T(a * a), 1.5).asnumpy(), (a * a) ** 1.5, rtol=1e-6)

    def scalar(v):
        return T(v, ms.float32)

    def states(*arrays):
        return [ms.Parameter(T(v), name=f"s{i}") for i, v in enumerate(arrays)]

    def close(got, want):
        for g, w in zip(got, want):
            np.testing.assert_allclose(g.asnumpy(), w, rtol=1e-5, atol=1e-6)

    var, acc = states(a, b)
    ops.ApplyMomentum()(var, acc, scalar(0.1), x, scalar(0.9))
    close((var, acc), (a - 0.1 * (0.9 * b + a), 0.9 * b + a))
    var, m, v = states(a, b, b * b)
    ops.Adam()(var, m, v, scalar(0.9), scalar(0.99), scalar(0.1), scalar(0.9), scalar(0.99), scalar(1e-8), x)
    m1, v1 = 0.9 * b + 0.1 * a, 0.99 * b * b + 0.01 * a * a
    close((var, m, v), (a - 0.1 * np.sqrt(1 - 0.99) / (1 - 0.9) * m1 / (np.sqrt(v1) + 1e-8), m1, v1))


@case
def graph_mode_training_step():
    # forward, backward and the fused nn.AdamWeightDecay update, compiled (jit_level O0)
    net = ms.nn.Dense(6, 3, weight_init="ones", bias_init="zeros")
    loss_fn = ms.nn.WithLossCell(net, ms.nn.MSELoss())
    step = ms.nn.TrainOneStepCell(loss_fn, ms.nn.AdamWeightDecay(net.trainable_params(), 0.01, weight_decay=0.02))
    a = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0"})
    try:
        loss = step(T(a), T(np.zeros((4, 3), np.float32))).asnumpy()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    out = a.sum(1, keepdims=True).astype(np.float64).repeat(3, 1)
    np.testing.assert_allclose(loss, (out**2).mean(), rtol=1e-5)
    grad = (2 * out / out.size).T @ a
    update = 0.1 * grad / (np.sqrt(0.001 * grad**2) + 1e-6)
    np.testing.assert_allclose(net.weight.asnumpy(), 1 - 0.01 * (update + 0.02), rtol=1e-5)
