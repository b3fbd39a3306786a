"""Live loads on ranks of the CPU and of the emulated Ascend: Parameters equal the target's shards, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import load_distributed_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.checkpoints import cut, read_file, scalars, shard, strategy_of
from tests.support.formats import KEY, format_of, key_of, make_source
from tests.support.outside import Content, listed, slices, source
from tests.support.shards import Full, write

pytestmark = [
    pytest.mark.msrun,
    # fork of a process that has threads, in msrun's own clients
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
WORKER = Path(__file__).with_name("load_worker.py")
STRICTEST = {"CANNEMU_STRICT_TYPES": "1"}
if "CANNEMU_SOC" not in os.environ:  # `scripts/ascend.sh` runs all products
    STRICTEST |= {"CANNEMU_SOC": "Ascend910_9392", "CANNEMU_SERVERS": "2"}
"""A product on two servers, which has no AllGatherV there; types that HCCL lists everywhere."""
PAIRS = (("dp2_tp4", "tp4"), ("dp2_tp2_pp2_zero", "dp2_tp2"), ("dp3_tp8", "tp4"))


def run(cases: list[dict[str, Any]], ranks: int, tmp_path: Path, device: str = "cpu", **env: str) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(cases, default=str))
    result = run_msrun(
        WORKER, tmp_path / "cases.json", device, ranks=ranks, device=device, env=env or None, tmp_path=tmp_path
    )
    for rank in range(ranks):
        for case in cases:
            assert f"case {case['name']} is right" in result.worker(rank)


def golden_case(golden: Path, source: str, target: str, **more: Any) -> dict[str, Any]:
    return {
        "name": f"{source} to {target} {more.get('mode') or ''}",
        "source": golden / source / "shards",
        "trained": golden / source / "strategy.ckpt",
        "predicted": golden / target / "strategy.ckpt",
        "expected": golden / target / "shards",
        **more,
    }


def with_scalars(shards: Path, extras: dict[str, Any], target: Path) -> Path:
    """The shards and, whole on every rank, the scalars."""
    import struct

    for folder in shards.iterdir():
        held = {**read_file(shard(folder)), **extras}
        header, at = {}, 0
        for name, tensor in held.items():
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
            at += len(tensor.data)
        text = json.dumps(header).encode()
        (target / folder.name).mkdir(parents=True)
        data = struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in held.values())
        (target / folder.name / "net.safetensors").write_bytes(data)
    return target


def cooperative(golden: Path, source: str, target: str, **options: Any) -> dict[str, Any]:
    """All bytes read once, exchanged, and replicas compared."""
    return golden_case(golden, source, target, mode="cooperative", options={"verify": "replicas", **options})


def in_all_modes(golden: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The pairs that every back end must do in every mode; they hold Adam states, scalars, F32, F16, BF16 and NaNs."""
    formats = golden / "formats_dp2_tp4"
    known = load_strategy(formats / "strategy.ckpt").layouts
    few = {n: t for n, t in read_file(shard(formats / "dedup" / "rank_0")).items() if n not in known}
    dedup = {
        "source": formats / "dedup",
        "trained": formats / "strategy.ckpt",
        "predicted": golden / "dp2_tp2" / "strategy.ckpt",
        "expected": with_scalars(golden / "dp2_tp2" / "shards", few, tmp_path / "few"),
        "scalars": {name: tensor.data.hex() for name, tensor in few.items()},
    }
    cases = []
    for mode in ("direct", "cooperative", "auto"):
        cases += [golden_case(golden, source, target, mode=mode) for source, target in PAIRS]
        cases.append({**dedup, "name": f"dedup {mode}", "mode": mode})
    return [*cases, *bit_patterns(tmp_path / "bits"), *frozen(tmp_path / "frozen")]


def frozen(root: Path) -> list[dict[str, Any]]:
    """A frozen matrix that is cut, and a state of each rank's own, which no strategy lists: under the same
    strategy ranks take their own, and another one is refused."""
    matrix = np.arange(64 * 96, dtype=np.float32).reshape(64, 96)
    held: dict[str, Content] = {
        "dense.weight": slices(Layout((2, 2), ((0,), ())), matrix, 4),
        "seed": lambda rank: np.array([rank + 5], np.int64),
        "global_step": np.array([7], np.int32),
    }
    root.mkdir()
    made = source(root / "shards", listed(4, matrices=[(2, 2)]), held)
    turned = source(root / "turned", listed(4, matrices=[(4, 1)]), held)
    case = {"source": made.shards, "trained": made.strategy, "predicted": made.strategy, "expected": made.shards}
    other = {**case, "predicted": turned.strategy, "expected": turned.shards}
    return [
        {**case, "name": "frozen direct", "mode": "direct"},
        {**case, "name": "frozen direct replicas", "mode": "direct", "options": {"verify": "replicas"}},
        {**case, "name": "frozen cooperative", "mode": "cooperative", "options": {"verify": "replicas"}},
        {**case, "name": "frozen auto", "mode": "auto"},
        *(
            {**other, "name": f"frozen, other slices, {mode}", "mode": mode, "error": "LayoutMismatchError"}
            | {"says": ["'dense.weight'", "ranks", "only_trainable_params"]}
            for mode in ("direct", "cooperative")
        ),
    ]


def bit_patterns(root: Path) -> list[dict[str, Any]]:
    """Every pattern of 16 bits as F16 and as BF16, and random ones as F32: NaNs of all payloads; split on both axes."""
    rng = np.random.default_rng(0)
    full: Full = {
        "half": ("F16", rng.permutation(1 << 16).astype(np.uint16).reshape(256, 256)),
        "brain": ("BF16", rng.permutation(1 << 16).astype(np.uint16).reshape(256, 256)),
        "single": ("F32", rng.integers(0x7F800000, 0x80000000, (64, 64), np.uint32)),
    }
    root.mkdir()
    trained = strategy_of(dict.fromkeys(full, Layout((4, 2), ((0,), ()))), root / "trained.ckpt")
    predicted = strategy_of(dict.fromkeys(full, Layout((2, 2), ((1,), (0,)))), root / "predicted.ckpt")
    write(trained, full, root / "source")
    write(predicted, full, root / "expected")
    paths = {name: root / f"{name}.ckpt" for name in ("trained", "predicted")}
    folders = {name: root / name for name in ("source", "expected")}
    return [{"name": f"bits {mode}", "mode": mode, **paths, **folders} for mode in ("direct", "cooperative")]


def test_the_pairs_hold_what_they_should(golden: Path) -> None:
    """NaNs in every floating dtype, Adam's two states, scalars beside the strategy."""
    held = read_file(golden / "full/model.safetensors")
    for dtype, width, exponent in (("F32", "<u4", 0x7F800000), ("F16", "<u2", 0x7C00), ("BF16", "<u2", 0x7F80)):
        bits = np.concatenate([np.frombuffer(t.data, width) for t in held.values() if t.dtype == dtype])
        assert (bits & (0x7FFFFFFF >> (32 - 8 * bits.itemsize)) > exponent).any(), dtype
    assert {"adam_m.head.weight", "adam_v.head.weight"} <= held.keys()
    dedup = read_file(shard(golden / "formats_dp2_tp4/dedup/rank_0"))
    assert {"global_step", "epoch_num", "loss_scale", "learning_rate"} <= dedup.keys()


def local_disks(golden: Path, root: Path) -> list[dict[str, Any]]:
    """Eight shards on two disks, each seen by half of the ranks; then one shard is on neither."""
    case = golden_case(golden, "dp2_tp4_zero", "tp4")
    for rank in range(8):
        for name in ("whole", "lacking") if rank != 5 else ("whole",):
            target = root / name / f"disk-{rank % 2}" / f"rank_{rank}"
            shutil.copytree(golden / "dp2_tp4_zero" / "shards" / f"rank_{rank}", target)
    split = {**case, "hosts": 2}
    says = ["should be in the file of rank 5", "hosts asked: host-0, host-1"]
    return [
        {**split, "name": "local disks", "source": root / "whole" / "disk-{host}", "options": {"verify": "replicas"}},
        {**split, "name": "a folder nowhere", "source": root / "lacking" / "disk-{host}", "error": "CoverageError"}
        | {"says": says},
    ]


def test_four_ranks(golden: Path, tmp_path: Path) -> None:
    formats = golden / "formats_dp2_tp4"
    known = load_strategy(formats / "strategy.ckpt").layouts
    extras = {n: t for n, t in read_file(shard(formats / "safetensors" / "rank_0")).items() if n not in known}
    resumed = {
        "trained": formats / "strategy.ckpt",
        "predicted": golden / "dp2_tp2" / "strategy.ckpt",
    }
    wide = wide_case(tmp_path / "wide", Layout((2, 2), ((1,), (0,))))
    run(
        [
            *in_all_modes(golden, tmp_path),
            {**golden_case(golden, "tp4", "dp2_tp2"), "name": "merged", "source": golden / "full", "trained": None},
            {
                "name": "scalars",
                "source": formats / "safetensors",
                "expected": with_scalars(golden / "dp2_tp2" / "shards", extras, tmp_path / "resumed"),
                "scalars": {name: tensor.data.hex() for name, tensor in extras.items()},
                **resumed,
            },
            *(
                {
                    "name": f"{kind} {mode}",
                    "source": make_source(golden, "formats_dp2_tp4", kind, tmp_path / f"{kind}_{mode}"),
                    "format": format_of(kind),
                    "expected": tmp_path / "resumed",
                    "mode": mode,
                    "options": {"dec_mode": str(key_of(kind).get("dec_mode", "AES-GCM"))},
                    **resumed,
                }
                for kind, mode in (
                    ("ckpt", "cooperative"),
                    ("ckpt_aes_cbc", "direct"),
                    ("ckpt_aes_gcm", "cooperative"),
                    ("safetensors_chunked", "cooperative"),
                    ("safetensors_chunked", "direct"),
                )
            ),
            {**wide, "mode": "direct", "counted": 2 * 4096 + 8 * 8},
            cooperative(golden, "dp2_tp2_pp2_zero", "dp2_tp2", bucket_bytes=16384),
            *local_disks(golden, tmp_path),
        ],
        4,
        tmp_path,
        MS_CKPT_EXT_DEC_KEY=f"hex:{KEY.hex()}",
    )


@pytest.mark.ascend
@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_four_emulated_npus(mode: str, golden: Path, tmp_path: Path) -> None:
    """MindSpore's Ascend back end and HCCL code: pieces are cut on the device and land in device tensors."""
    emulator_or_skip()
    if mode == "synchronous":
        long_one("the asynchronous mode finds what this one does")
    env = STRICTEST if mode == "synchronous" else {**STRICTEST, "CANNEMU_ASYNC": "1", "CANNEMU_POISON": "1"}
    run(
        [
            *in_all_modes(golden, tmp_path),
            cooperative(golden, "dp3_tp8", "tp4", bucket_bytes=16384),
            golden_case(golden, "dp2_tp4_zero", "tp4", mode="auto"),
            *local_disks(golden, tmp_path),
        ],
        4,
        tmp_path,
        "ascend",
        **env,
    )


@pytest.mark.ascend
def test_eight_emulated_npus(golden: Path, tmp_path: Path) -> None:
    emulator_or_skip()
    run([cooperative(golden, "dp2_tp4", "dp4_tp2_zero2")], 8, tmp_path, "ascend")


def wide_case(root: Path, layout: Layout) -> dict[str, Any]:
    """Adam's states and their weight, in rows too wide to be read over."""
    rng = np.random.default_rng(0)
    names = ("dense.weight", "adam_m.dense.weight", "adam_v.dense.weight")
    full = {name: rng.standard_normal((8, 16384), np.float32) for name in names}
    root.mkdir()
    trained = strategy_of({name: Layout((4, 2), ((1,), ())) for name in names}, root / "trained.ckpt")
    predicted = strategy_of(dict.fromkeys(names, layout), root / "predicted.ckpt")
    cut(trained, full, root / "source", scalars(4))
    cut(predicted, full, root / "expected", scalars(4))
    return {
        "name": "wide",
        "source": root / "source",
        "trained": root / "trained.ckpt",
        "predicted": root / "predicted.ckpt",
        "expected": root / "expected",
        "scalars": {name: value.tobytes().hex() for name, value in scalars(4).items()},
    }


def two_ranks_of(strategy: Strategy) -> Strategy:
    """The same cut of every parameter, over two devices instead of four."""
    items = []
    for name, stages in strategy.layouts.items():
        layout = stages[0]
        assert 4 in layout.dev_matrix
        halved = tuple(extent // 2 if extent == 4 else extent for extent in layout.dev_matrix)
        items.append(LayoutItem(name, 0, layout._replace(dev_matrix=halved)))
    return Strategy.from_items(items, "tp2")


def test_two_ranks(golden: Path, tmp_path: Path) -> None:
    predicted = two_ranks_of(load_strategy(golden / "tp4" / "strategy.ckpt"))
    save_strategy(predicted, tmp_path / "tp2.ckpt")
    case = golden / "dp2_tp4_zero"
    unified_safetensors(case / "shards", case / "strategy.ckpt", tmp_path / "merged")
    load_distributed_checkpoint(
        None, None, tmp_path / "tp2.ckpt", format="safetensors", unified_safetensors_dir=tmp_path / "merged",
        dst_safetensors_dir=tmp_path / "expected",
    )  # fmt: skip
    to_tp2 = {"predicted": tmp_path / "tp2.ckpt", "expected": tmp_path / "expected"}
    wide = wide_case(tmp_path / "wide", Layout((2,), ((), (0,))))
    run(
        [
            {**golden_case(golden, "dp2_tp4_zero", "tp4"), **to_tp2},
            {**golden_case(golden, "dp3_tp8", "tp4", mode="direct"), **to_tp2},
            {"name": "merged", "source": tmp_path / "merged", "trained": None, **to_tp2},
            {**wide, "mode": "direct", "counted": 2 * 4096 + 8 * 8},
            {**wide, "name": "wide, as it likes"},
        ],
        2,
        tmp_path,
    )
