"""Many tensors: a folder with the experts of DeepSeek-V3, and a load of as many with their states, in user seconds.

Tensors are tiny, so what is measured is what a tensor costs, not its bytes. User time of whole processes tells that on
a machine with other work to do as well.
"""

from __future__ import annotations

import argparse
import json
import math
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
fused = [f"{layer}{p}_proj.weight" for p in ("gate", "up")]
rules = [Experts(fused, f"{target}weight1", merge=False, shares=(1, 1)),
         Experts([f"{layer}down_proj.weight"], f"{target}weight2", merge=False)]
"""
_EXPERTS = (
    "import ms_ckpt_ext, sys\n"
    + _RULES
    + """
ms_ckpt_ext.reshard(sys.argv[1], sys.argv[2], to_strategy=sys.argv[3], rules=rules)
"""
)
_EXPORT = (
    "import ms_ckpt_ext, sys\n"
    + _RULES
    + """
ms_ckpt_ext.export(sys.argv[1], sys.argv[2], strategy=sys.argv[3], rules=rules)
"""
)
_RANK = "import sys; from benches.tensors_rank import load; load(*sys.argv[1:])"
_STATES = 140_000


def tensors(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """44,544 experts in 160 files: inspected, merged, verified, stacked, exported; a load of 140,000 by 64 ranks."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        make_folder(root / "hf")
        make_strategy(root / "tp8.ckpt")
        make_states(root / "states", root / "states.ckpt")
        from benches.tensors_rank import prepare  # and what a load needs with it, which may not be installed

        prepare(str(root / "states"), str(root / "told"))
        jobs = {
            "inspect --json": [_CLI, "inspect", root / "hf", "--json"],
            "merge --naming huggingface": [_CLI, "merge", root / "hf", root / "merged", "--naming", "huggingface"],
            "verify against it": [_CLI, "verify", root / "hf", root / "merged"],
            "experts stacked and cut for tp8": [_EXPERTS, root / "hf", root / "tp8", root / "tp8.ckpt"],
            "those exported": [_EXPORT, root / "tp8", root / "exported", root / "tp8.ckpt"],
            "a rank of 64 up to its plan of 140,000": [_RANK, root / "states", root / "states.ckpt", root / "told"],
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
        if target in command[2:] and str(target).endswith(("/merged", "/tp8", "/exported")) and "verify" not in command:
            shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = str(command[0]).replace("sys.exit(main(sys.argv[1:]))", "code = main(sys.argv[1:])")
    code += "\nprint('PEAK', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
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
    _write(root, [(name, "BF16", shape) for name, shape in named], files)


def make_states(root: Path, strategy: Path, files: int = FILES) -> None:
    """Small matrices with their Adam states, F32, in files of consecutive tensors; and layouts of dp8 tp8 for them."""
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    root.mkdir(parents=True)
    names = [f"{('', 'adam_m.', 'adam_v.')[n % 3]}layers.{n // 3}.weight" for n in range(_STATES)]
    _write(root, [(name, "F32", (16, 8)) for name in names], files)
    cuts = Layout((8, 8), ((0,), ())), Layout((8, 8), ((), (0,)))
    items = [LayoutItem(name, 0, cuts[n // 3 % 2]) for n, name in enumerate(names)]
    save_strategy(Strategy.from_items(items, "the benchmark"), strategy)


def _write(root: Path, named: list[tuple[str, str, tuple[int, ...]]], files: int) -> None:
    """Name, dtype and shape of every tensor, in order."""
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:06d}.safetensors"
        header, at = {}, 0
        for name, dtype, shape in named[number * len(named) // files : (number + 1) * len(named) // files]:
            nbytes = math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            weight_map[name] = file
            at += nbytes
        raw = json.dumps(header).encode()
        (root / file).write_bytes(len(raw).to_bytes(8, "little") + raw + os.urandom(at))
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


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
