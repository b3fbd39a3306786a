"""Many tensors: a folder with the experts of DeepSeek-V3, and a live plan of its training, in user seconds.

Tensors are tiny, so what is measured is what a tensor costs, not its bytes. User time of whole processes tells that on
a machine with other work to do as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.measure import ROOT

LAYERS, EXPERTS, FILES = 58, 256, 160
SHAPES = {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}
_CLI = "from ms_ckpt_ext.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
_RULES = """
from ms_ckpt_ext.rules import Experts
layer, target = "model.layers.{layer}.mlp.experts.{e}.", "decoder.layers.{layer}.mlp.experts."
rules = [Experts([f"{layer}{p}_proj.weight" for p in ("gate", "up")], f"{target}weight1", merge=False),
         Experts([f"{layer}down_proj.weight"], f"{target}weight2", merge=False)]
"""
_EXPERTS = (
    "import ms_ckpt_ext, sys\n"
    + _RULES
    + """
ms_ckpt_ext.reshard(sys.argv[1], sys.argv[2], to_strategy=sys.argv[3], rules=rules)
"""
)
_LIVE = """
import sys
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid
from ms_ckpt_ext.core.exchange.plan import decide, plan_of
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
COUNT, WORLD = int(sys.argv[1]), 64
ranks = [tuple(range(cell, WORLD, 8)) for cell in range(8)]
grids = [Grid((8, 1), {(cell, 0): ranks[cell] for cell in range(8)}),
         Grid((1, 8), {(0, cell): ranks[cell] for cell in range(8)})]
dtype, at, where, demands = DTYPES["F32"], 0, {}, []
for number in range(COUNT):
    name = f"{('', 'adam_m.', 'adam_v.')[number % 3]}layers.{number // 3}.weight"
    tensor = stored_whole(TensorMeta(name, dtype, (16, 8)), (number * 160 // COUNT,))
    demands.append(Demand(name, tensor, (grids[number % 2],)))
    where[name] = Extent(at, 512)
    at += 512
import resource, time
begin = time.process_time()
table = plan_of(decide(demands, WORLD, lambda file, name: (where[name],), ExchangeLimits()))
print("PLAN", time.process_time() - begin, len(table.parts), len(table.chunks), len(table.rounds))
"""


def tensors(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """44,544 experts in 160 files: inspected, merged, verified, stacked; 140,000 tensors planned for 64 ranks."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        make_folder(root / "hf")
        make_strategy(root / "tp8.ckpt")
        jobs = {
            "inspect --json": [_CLI, "inspect", root / "hf", "--json"],
            "merge --naming huggingface": [_CLI, "merge", root / "hf", root / "merged", "--naming", "huggingface"],
            "verify against it": [_CLI, "verify", root / "hf", root / "merged"],
            "experts stacked and cut for tp8": [_EXPERTS, root / "hf", root / "tp8", root / "tp8.ckpt"],
            "140,000 tensors planned for 64 ranks": [_LIVE, 140_000],
        }
        turns = [{job: run(command) for job, command in jobs.items()} for _ in range(arguments.rounds)]
    return [
        {"job": job}
        | {name: round(statistics.median(turn[job][name] for turn in turns), 2) for name in ("user s", "system s")}
        | {"peak MiB": round(statistics.median(turn[job]["peak MiB"] for turn in turns))}
        for job in jobs
    ]


def run(command: list[Any]) -> dict[str, float]:
    """One process, once what it wrote before is gone: user and system seconds, and its peak."""
    for target in command[1:]:
        if str(target).endswith(("/merged", "/tp8")) and "verify" not in command:
            shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import resource\n" + str(command[0]).replace("sys.exit(main(sys.argv[1:]))", "code = main(sys.argv[1:])")
    code += "\nprint('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command[1:])], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "user s": after.ru_utime - before.ru_utime,
        "system s": after.ru_stime - before.ru_stime,
        "peak MiB": int(done.stdout.rsplit("PEAK", 1)[1]) / 1024,
    }


def make_folder(root: Path, layers: int = LAYERS, experts: int = EXPERTS, files: int = FILES) -> None:
    """Hugging Face's directory of the experts alone, BF16, in files of consecutive tensors with their index."""
    root.mkdir(parents=True)
    named = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight", shape)
        for layer in range(3, 3 + layers)
        for expert in range(experts)
        for projection, shape in SHAPES.items()
    ]
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        held = named[number * len(named) // files : (number + 1) * len(named) // files]
        header, at = {}, 0
        for name, shape in held:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 256]}
            weight_map[name] = file
            at += 256
        raw = json.dumps(header).encode()
        content = (bytes([number]) + os.urandom(255)) * len(held)
        (root / file).write_bytes(len(raw).to_bytes(8, "little") + raw + content)
    index = {"metadata": {"total_size": 256 * len(named)}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


def make_strategy(path: Path, layers: int = LAYERS) -> None:
    """Stacked experts, cut by eight along the width of their matrices."""
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    cuts = {"weight1": Layout((8,), ((), (), (0,))), "weight2": Layout((8,), ((), (0,), ()))}
    items = [
        LayoutItem(f"decoder.layers.{layer}.mlp.experts.{name}", 0, layout)
        for layer in range(3, 3 + layers)
        for name, layout in cuts.items()
    ]
    save_strategy(Strategy.from_items(items, "the benchmark"), path)
