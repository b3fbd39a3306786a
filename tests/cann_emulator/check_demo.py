"""Checks what train_demo.py saved: python check_demo.py CPU_DIR OUT...     (plain CPU, no emulator needed)

For each OUT and each step it saved: merges the ranks' slices with stock ms.unified_safetensors, compares the
whole with the single-process run in CPU_DIR, re-cuts the whole by the layouts in the strategy file and compares
with what every rank saved, bit for bit, and does the same for net.ckpt. Prints one line a step, and what is odd.
"""

import glob
import json
import os
import re
import shutil
import sys

import mindspore as ms
import numpy as np
from mindspore.train.node_strategy_pb2 import ParallelStrategyMap


def load(path):
    with open(path, "rb") as f:
        b = f.read()
    n = int.from_bytes(b[:8], "little")
    head = json.loads(b[8 : 8 + n])
    head.pop("__metadata__", None)
    dt = {"F32": np.float32, "I32": np.int32, "F16": np.float16}
    out = {}
    for k, v in head.items():
        lo, hi = v["data_offsets"]
        out[k] = np.frombuffer(b, np.uint8, hi - lo, 8 + n + lo).view(dt[v["dtype"]]).reshape(v["shape"])
    return out


def layouts(path):
    """name -> [(pipeline stage, device matrix, tensor map, optimizer shard step, optimizer shard size)]"""
    m = ParallelStrategyMap()
    with open(path, "rb") as f:
        m.ParseFromString(f.read())
    out = {}
    for it in m.parallel_layout_item:
        p = it.parallel_layouts
        tm = [list(t.dim) for t in p.tensor_map]
        tm = [t for t in tm if t] if len(tm) > 1 else [[x] for x in tm[0]]
        stage, name = re.match(r"^(?:(\d+)-)?(.*)$", it.param_name).groups()  # "1-net.w" in a merged file
        out.setdefault(name, []).append(
            (int(stage or 0), list(p.dev_matrix[0].dim), tm, p.opt_weight_shard_step, p.opt_weight_shard_size)
        )
    return out


def region(layout, shape, rank):
    """The box of a parameter which a rank holds."""
    _, dev, tm, step, size = layout
    coord = np.unravel_index(rank % int(np.prod(dev)), dev)
    lo, hi, used = [], [], set()
    for d, axes in enumerate(tm):
        idx, parts = 0, 1
        for a in axes:
            if a >= 0:
                ax = len(dev) - 1 - a
                used.add(ax)
                idx, parts = idx * dev[ax] + coord[ax], parts * dev[ax]
        n = shape[d] // parts
        lo.append(idx * n)
        hi.append(idx * n + n)
    if step and size:  # optimizer sharding cuts dimension 0 further, over the axes left, innermost first
        rep = [i for i in range(len(dev)) if i not in used and dev[i] > 1]
        left = n = int(np.prod([dev[i] for i in rep], dtype=int)) if size == -1 else size
        picked = []
        for i in reversed(rep):
            take = min(dev[i], left)
            if take > 1:
                picked.insert(0, (coord[i] % take, take))
            left //= take
        idx = 0
        for c, t in picked:
            idx = idx * t + c
        m = (hi[0] - lo[0]) // n
        lo[0] += idx * m
        hi[0] = lo[0] + m
    return tuple(slice(int(a), int(b)) for a, b in zip(lo, hi))


def box_of(name, value_shape, rank):
    """(box, whether optimizer sharding counts), or None if no stage of this rank has the parameter."""
    for lay in strategy.get(name, ()):
        if lay[0] == rank // int(np.prod(lay[1])):
            box = region(lay, shape_of(name), rank)
            if tuple(b.stop - b.start for b in box) == value_shape:
                return box, True
            return region(lay[:3] + (0, 0), shape_of(name), rank), False
    return None


def shape_of(name):
    return full[name].shape if name in full else full[name.split(".", 1)[1]].shape  # accu_grads.<name>


def read_all(directory):
    out = {}
    for p in glob.glob(f"{directory}/*.safetensors"):
        out.update(load(p))
    return out


cpu, bad = sys.argv[1], 0
for out in sys.argv[2:]:
    files = sorted(glob.glob(f"{out}/strategy/strategy_*.ckpt"))
    strategy_file = files[0]
    if set(layouts(files[0])) != set(layouts(files[-1])):  # pipeline stages
        strategy_file = f"{out}/strategy_merged.ckpt"
        ms.merge_pipeline_strategys(f"{out}/strategy", strategy_file)
    strategy = layouts(strategy_file)
    for step in sorted(glob.glob(f"{out}/step*")):
        ranks = len(glob.glob(f"{step}/rank_*"))
        shards = [load(f"{step}/rank_{r}/net.safetensors") for r in range(ranks)]
        full = load(f"{cpu}/{os.path.basename(step)}/rank_0/net.safetensors")
        src, dst = f"{out}/src_{os.path.basename(step)}", f"{out}/merged_{os.path.basename(step)}"
        shutil.rmtree(src, ignore_errors=True)
        shutil.rmtree(dst, ignore_errors=True)
        for r in range(ranks):  # unified_safetensors wants a directory with nothing else
            os.makedirs(f"{src}/rank_{r}")
            os.link(f"{step}/rank_{r}/net.safetensors", f"{src}/rank_{r}/net.safetensors")
        try:
            ms.unified_safetensors(src, strategy_file, dst)
            whole = read_all(dst)
        except Exception as e:  # pylint: disable=broad-except
            print(f"{step}: unified_safetensors failed: {type(e).__name__}: {str(e)[:300]}")
            whole, bad = {}, bad + 1
        wrong_shape = {k: v.shape for k, v in whole.items() if v.shape != (shape_of(k) if k in strategy else v.shape)}
        diffs = [
            (float(np.abs(full[k].astype(np.float64) - v).max()), k)
            for k, v in whole.items()
            if k in full and v.shape == full[k].shape
        ]
        n = wrong = same_ckpt = 0
        not_cut = set()  # optimizer sharding in the strategy file, but not in the checkpoint
        for r, shard in enumerate(shards):
            old = {k: v.asnumpy() for k, v in ms.load_checkpoint(f"{step}/rank_{r}/net.ckpt").items()}
            same_ckpt += set(old) == set(shard) and all(
                old[k].tobytes() == v.tobytes() and old[k].shape == v.shape for k, v in shard.items()
            )
            for k, v in shard.items():
                n += 1
                want, found = whole.get(k, shards[0].get(k)), box_of(k, v.shape, r)
                if found is not None:
                    if not found[1]:
                        not_cut.add(k)
                    if want is not None and want.shape == shape_of(k):
                        want = want[found[0]]
                    else:  # not merged, or wrongly (reported below): compare with the first rank that has this box
                        want = next(x[k] for i, x in enumerate(shards) if k in x and box_of(k, x[k].shape, i) == found)
                if want.shape != v.shape or want.tobytes() != v.tobytes():
                    wrong += 1
                    print(f"{step} rank {r} {k}: saved {v.shape}, expected {want.shape}")
        bad += wrong
        every = set().union(*shards)
        print(
            f"{step}: {n} slices, {wrong} differ from the re-cut whole; largest difference from the CPU run "
            f"{max(diffs)[0]:.3g} ({max(diffs)[1]}, {len(diffs)} compared); net.ckpt same as net.safetensors on "
            f"{same_ckpt}/{ranks} ranks; not in strategy: {sorted(every - set(strategy))}; not in merged: "
            f"{sorted(every - set(whole))}; not in the CPU run: {sorted(set(whole) - set(full))}"
            + (f"; SHAPE WRONG in merged: {wrong_shape}" if wrong_shape else "")
            + (f"; strategy says optimizer-sharded, saved without: {sorted(not_cut)}" if not_cut else "")
        )
sys.exit(1 if bad else 0)
