"""Merge and re-cut against `cp`, `cp` with a sync, and stock MindSpore.

Stock MindSpore cannot re-cut shards, so there it merges and then cuts the merged files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Optional

from benches.measure import ROOT, against_cp, measure, python, row, take_turns

GOLDEN = ROOT / "tests" / "data" / "golden"
JOBS: dict[str, tuple[str, Optional[str]]] = {
    "merge": ("dp2_tp4_zero", None),
    "8to4": ("dp2_tp4_zero", "tp4"),
    "24to8": ("dp3_tp8", "dp2_tp4"),
}
STOCK = "stock MindSpore"


def make_source(case: str, size: float, root: Path) -> Path:
    """`size` bytes of parameters (replicas not counted), sharded as the golden case is."""
    import numpy as np

    from ms_ckpt_ext.formats import safetensors
    from ms_ckpt_ext.formats.index import TensorSpec
    from ms_ckpt_ext.formats.registry import read_index
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    golden = GOLDEN / case
    strategy = load_strategy(golden / "strategy.ckpt")
    full = read_index(str(GOLDEN / json.loads((golden / "case.json").read_text())["full"] / "model.safetensors"))
    held = sum(entry.nbytes for entry in full.tensors.values())
    factor = max(1, round(math.sqrt(size / held)))
    for rank in range(strategy.world):
        noise = np.random.default_rng(rank).bytes(8 << 20)  # slices that are all equal are refused
        specs = []
        for name in strategy.names_of(rank):
            entry = full.tensors.get(name)
            layout = strategy.layout(name, rank)
            if entry is not None and layout is not None:
                shape = layout.slice_shape(tuple(extent * factor for extent in entry.shape))
                specs.append(TensorSpec(name, entry.dtype, shape))
        laid = safetensors.layout(specs, {"format": "ms"})
        folder = root / f"rank_{rank}"
        folder.mkdir(parents=True)
        with (folder / "net.safetensors").open("wb") as file:
            file.write(laid.literals[0][1])
            while file.tell() < laid.size:
                file.write(noise[: laid.size - file.tell()])
    return golden / "strategy.ckpt"


def offline(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Merge and re-cut."""
    results = []
    size = arguments.size * (1 << 30)
    for source_case, target_case in (JOBS[name] for name in arguments.only or JOBS):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            root = Path(work)
            strategy = make_source(source_case, size, root / "source")
            results += one_job(root, strategy, target_case, source_case, arguments)
    return results


def one_job(
    root: Path, strategy: Path, target_case: Optional[str], source_case: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    source, out, copy, kept, merged = (str(root / name) for name in ("source", "out", "copy", "kept", "merged"))
    merge = f"unified_safetensors({source!r}, {str(strategy)!r}"
    if target_case is None:
        title = f"merge of {source_case}"
        stock = f"import mindspore as ms; ms.{merge}, {out!r})"
    else:
        title = f"re-cut {source_case} to {target_case}"
        target = str(GOLDEN / target_case / "strategy.ckpt")
        stock = (
            f"import mindspore as ms; ms.{merge}, {merged!r}); ms.load_distributed_checkpoint(None, None, {target!r}, "
            f"format='safetensors', unified_safetensors_dir={merged!r}, dst_safetensors_dir={out!r})"
        )

    def ours(sync: bool) -> str:
        if target_case is None:
            return f"from ms_ckpt_ext import unified_safetensors; {merge}, {out!r}, sync={sync})"
        return (
            "from ms_ckpt_ext import load_distributed_checkpoint as f; "
            f"f(None, None, {target!r}, {str(strategy)!r}, format='safetensors', unified_safetensors_dir={source!r}, "
            f"dst_safetensors_dir={out!r}, sync={sync})"
        )

    measure(python(ours(False)))
    os.rename(out, kept)
    for name in Path(kept).glob(".ms_ckpt_ext*"):
        name.unlink()
    written = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())
    commands = against_cp(ours, Path(kept), Path(copy))
    if arguments.stock:
        commands[STOCK] = python(stock)

    def clean() -> None:
        for folder in (out, copy, merged):
            shutil.rmtree(folder, ignore_errors=True)

    turns = take_turns(commands, clean, arguments.rounds, once=[STOCK], memory=round(1.5 * written))
    return [row(title, written, name, turns) for name in commands]
