"""Dry runs by size: `ms-ckpt plan` as a whole process on one core, from strategy files and shapes.

A transformer's weights and Adam states, 2,400 parameters of 1.2 TB, trained under dp N/64, tp8, pp8 with optimizer
sharding; of fewer than 8 layers there are fewer stages, and more data parallelism. It is resumed with tp4 and twice the
data parallelism, as many ranks; or it is taken over by as many ranks without optimizer sharding, so that everything is
wanted dp times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.measure import measure

HIDDEN, INNER = 8192, 28672
WEIGHTS = {
    "attention.wqkv": ((3 * HIDDEN, HIDDEN), ((0,), ())),
    "attention.wo": ((HIDDEN, HIDDEN), ((), (0,))),
    "feed_forward.gate": ((INNER, HIDDEN), ((0,), ())),
    "feed_forward.up": ((INNER, HIDDEN), ((0,), ())),
    "feed_forward.down": ((HIDDEN, INNER), ((), (0,))),
    "attention_norm": ((HIDDEN,), ((),)),
    "ffn_norm": ((HIDDEN,), ((),)),
    "attention.q_norm": ((128,), ((),)),
}
"""Name -> full shape, and which axis tensor parallelism cuts; norms lie whole on every rank of a stage."""


def dryrun(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Dry runs of 64 to 16,384 ranks, one core: seconds, memory, and what they grow with."""
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        stages = max(number for number in (1, 2, 4, 8) if number <= arguments.layers)
        listed = _parameters(stages, arguments.layers)
        shapes = {name: {"dtype": "F32", "shape": shape} for name, _, shape, _ in listed}
        (root / "shapes.json").write_text(json.dumps(shapes))
        for ranks in arguments.ranks:
            data = ranks // (8 * stages)
            source = _strategy(listed, root / "train.ckpt", data, 8, sharded=True)
            for job, target in (
                ("resume with tp4", _strategy(listed, root / "resume.ckpt", 2 * data, 4, sharded=True)),
                ("without optimizer sharding", _strategy(listed, root / "plain.ckpt", data, 8, sharded=False)),
            ):
                results += [_row(root, ranks, job, source, target) for _ in range(arguments.rounds)]
    return results


Listed = list[tuple[str, int, tuple[int, ...], tuple[tuple[int, ...], ...]]]


def _parameters(stages: int, layers: int) -> Listed:
    """(name, stage, shape, tensor map) of every parameter."""
    return [
        (f"{state}layers.{layer}.{name}.weight", layer * stages // layers, shape, cut)
        for layer in range(layers)
        for name, (shape, cut) in WEIGHTS.items()
        for state in ("", "adam_m.", "adam_v.")
    ]


def _strategy(listed: Listed, path: Path, data: int, tensor: int, sharded: bool) -> Path:
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    items = []
    for name, stage, shape, cut in listed:
        shard = (1, -1) if sharded and len(shape) > 1 else (0, 0)
        items.append(LayoutItem(name, stage, Layout((data, tensor), cut, *shard)))
    save_strategy(Strategy.from_items(items, "the benchmark"), path)
    return path


def _row(root: Path, ranks: int, job: str, source: Path, target: Path) -> dict[str, Any]:
    core = str(min(os.sched_getaffinity(0)))
    found = root / "plan.json"
    call = ["plan", str(source), str(target), "--shapes", str(root / "shapes.json"), "--html", str(root / "plan.html")]
    code = (
        f"import os, sys; from ms_ckpt_ext.cli.main import main; sys.stdout = open({str(found)!r}, 'w'); "
        f"code = main(sys.argv[1:]); open({str(root / 'cpu')!r}, 'w').write(str(sum(os.times()[:2]))); sys.exit(code)"
    )
    turn = measure(["taskset", "-c", core, sys.executable, "-c", code, *call, "--json"])
    report = json.loads(found.read_text())
    return {
        "ranks": ranks,
        "job": job,
        "seconds": round(turn.seconds, 2),
        "processor s": round(float((root / "cpu").read_text()), 2),
        "peak MiB": round(turn.peak / (1 << 20)),
        "read calls": report["cooperative"]["reads"]["total"],
        "rounds": len(report["rounds"]),
        "messages": report["cooperative"]["messages"]["total"],
        "page kB": round((root / "plan.html").stat().st_size / 1000),
    }
