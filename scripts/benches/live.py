"""Live loads, measured: 8 shards into the networks of 4 processes, against stock MindSpore and PyTorch.

Every start of a job makes one cold load (the first of its processes, what a job does) and then warm ones. Peers take
turns. A load's time is that of its slowest rank, from a barrier on; memory is a rank's resident peak during the cold
load above what it was before, by the kernel's own high-water mark. Every load's Parameters start as poison and are
compared with the source afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
SOURCE, TARGET, RANKS = "dp2_tp4", "tp4", 4
MERGE = """
import time, mindspore
begin = time.perf_counter()
mindspore.unified_safetensors({source!r}, {strategy!r}, {merged!r})
print("MERGE", time.perf_counter() - begin)
"""


class Loads(NamedTuple):
    """One start of a job.

    Attributes:
        seconds: of every load, the cold one first.
        peak: bytes above the start in the cold load, of the rank with the most.
        before: seconds of work that had to be done first (a merge).
    """

    seconds: list[float]
    peak: int
    before: float = 0.0


def live(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Load 8 shards (tp4 x dp2) into 4 ranks (tp4) on the CPU."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        case = _make_source(root, arguments.size * (1 << 30))
        peers = {"ms_ckpt_ext": "ours"}
        if arguments.stock:
            peers["stock MindSpore, merge and load"] = "stock"
        if _torch_answers(arguments.torch_python):
            _run_torch(arguments.torch_python, "save", case, root, 8)
            peers["PyTorch distributed checkpoint"] = "torch"
        turns: dict[str, list[Loads]] = {name: [] for name in peers}
        for _ in range(arguments.rounds):
            for name, peer in peers.items():
                turns[name].append(_turn(peer, case, root, arguments))
        return [_row(name, turns, case["bytes"]) for name in peers]


def _turn(peer: str, case: dict[str, Any], root: Path, arguments: argparse.Namespace) -> Loads:
    if peer == "torch":
        return parse_loads(_run_torch(arguments.torch_python, "load", case, root, RANKS))
    if peer == "ours":
        return parse_loads(run_ranks("ours", case, root))
    merged = root / "merged"
    code = MERGE.format(source=case["source"], strategy=case["trained"], merged=str(merged))
    told = _checked([sys.executable, "-c", code], dict(os.environ), root)
    before = next(float(line.split()[1]) for line in told.splitlines() if line.startswith("MERGE "))
    try:
        return parse_loads(run_ranks("stock", {**case, "merged": str(merged)}, root))._replace(before=before)
    finally:
        subprocess.run(["rm", "-r", str(merged)], check=True)


def _make_source(root: Path, size: float) -> dict[str, Any]:
    """The golden case with its shapes scaled to `size` bytes; replicas are equal, slices differ."""
    import numpy as np

    from ms_ckpt_ext.formats import safetensors
    from ms_ckpt_ext.formats.index import TensorSpec
    from ms_ckpt_ext.formats.registry import read_index
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    strategy = load_strategy(GOLDEN / SOURCE / "strategy.ckpt")
    full = read_index(str(GOLDEN / "full" / "model.safetensors"))
    factor = max(1, round(math.sqrt(size / sum(entry.nbytes for entry in full.tensors.values()))))
    shapes = {name: tuple(extent * factor for extent in entry.shape) for name, entry in full.tensors.items()}
    parts = {name: stages[0].parts for name, stages in strategy.layouts.items()}
    noise = np.random.default_rng(0).bytes(8 << 20)
    for rank in range(strategy.world):
        specs = []
        for name, entry in full.tensors.items():
            layout = strategy.layout(name, rank)
            assert layout is not None
            specs.append(TensorSpec(name, entry.dtype, layout.slice_shape(shapes[name])))
        laid = safetensors.layout(specs, {"format": "ms"})
        folder = root / "source" / f"rank_{rank}"
        folder.mkdir(parents=True)
        with (folder / "net.safetensors").open("wb") as file:
            file.write(laid.literals[0][1])
            for name, entry in laid.tensors.items():
                slice_ = rank % RANKS if math.prod(parts[name]) > 1 else 0
                file.write(_contents(noise, f"{name}, {slice_}", entry.nbytes))
    return {
        "source": str(root / "source"),
        "trained": str(GOLDEN / SOURCE / "strategy.ckpt"),
        "predicted": str(GOLDEN / TARGET / "strategy.ckpt"),
        "bytes": sum(entry.dtype.nbytes(math.prod(shapes[name])) for name, entry in full.tensors.items()),
        "tensors": {name: [entry.dtype.name, shapes[name], parts[name]] for name, entry in full.tensors.items()},
    }


def _contents(noise: bytes, what: str, nbytes: int) -> bytes:
    """`nbytes` of noise, from a place that depends on what it is for."""
    start = zlib.crc32(what.encode()) % len(noise)
    return (noise[start:] + noise * (nbytes // len(noise) + 1))[:nbytes]


def run_ranks(peer: str, case: dict[str, Any], root: Path, worker: Optional[Path] = None) -> str:
    """Run a worker on every rank, `live_rank.py` by default; what they wrote."""
    (root / "case.json").write_text(json.dumps(case))
    logs = Path(tempfile.mkdtemp(dir=root))
    msrun = [sys.executable, "-c", "from mindspore.parallel.cluster.run import main; main()", "--join=True"]
    msrun += [f"--worker_num={RANKS}", f"--local_worker_num={RANKS}", f"--master_port={_free_port()}"]
    msrun += ["--cluster_time_out=120", "--tail_worker_log=0", f"--log_dir={logs}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    script = worker or Path(__file__).with_name("live_rank.py")
    _checked([*msrun, str(script), peer, str(root / "case.json"), str(logs)], env, logs)
    return "\n".join(log.read_text(errors="replace") for log in sorted(logs.glob("worker_*.log")))


def _run_torch(python: str, action: str, case: dict[str, Any], root: Path, ranks: int) -> str:
    (root / "case.json").write_text(json.dumps(case))
    worker = str(Path(__file__).with_name("live_torch.py"))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = [python, worker, action, str(root / "case.json"), str(root / "torch"), tempfile.mkdtemp(dir=root)]
    jobs = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    told = [job.communicate()[0] for job in jobs]
    if any(job.returncode for job in jobs):
        raise SystemExit(f"{' '.join(command)} failed: {[job.returncode for job in jobs]}")
    return "\n".join(told)


def _torch_answers(python: Optional[str]) -> bool:
    if python is None:
        print("PyTorch is left out: name a Python that has it with --torch-python")
        return False
    code = "import torch, torch.distributed.checkpoint; print(torch.__version__)"
    try:
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"PyTorch is left out: {python} cannot import it ({error})")
        return False
    return True


def _checked(command: list[str], env: dict[str, str], folder: Path) -> str:
    run = subprocess.run(command, env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        logs = "\n".join(log.read_text(errors="replace")[-1500:] for log in folder.glob("*.log"))
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stdout[-2000:]}\n{logs}")
    return run.stdout


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse_loads(told: str) -> Loads:
    """Lines `LOAD rank number seconds peak` of all ranks."""
    by_load: dict[int, list[tuple[float, int]]] = {}
    for line in told.splitlines():
        if line.startswith("LOAD "):
            _, _, number, seconds, peak = line.split()
            by_load.setdefault(int(number), []).append((float(seconds), int(peak)))
    assert all(len(ranks) == RANKS for ranks in by_load.values()) and by_load, told[-2000:]
    return Loads([max(s for s, _ in by_load[n]) for n in sorted(by_load)], max(peak for _, peak in by_load[0]))


def _row(name: str, turns: dict[str, list[Loads]], nbytes: int) -> dict[str, Any]:
    mine = turns[name]

    def total(loads: Loads) -> float:
        return loads.before + loads.seconds[0]

    def ratio(peer: str) -> Optional[float]:
        if peer not in turns:
            return None
        return round(statistics.median(total(a) / total(b) for a, b in zip(mine, turns[peer])), 3)

    return {
        "job": f"{SOURCE} to {TARGET}, {nbytes / (1 << 30):.2f} GiB",
        "command": name,
        "merge s": round(statistics.median(loads.before for loads in mine), 2),
        "load s": round(statistics.median(loads.seconds[0] for loads in mine), 3),
        "least": round(min(loads.seconds[0] for loads in mine), 3),
        "most": round(max(loads.seconds[0] for loads in mine), 3),
        "warm s": round(statistics.median(s for loads in mine for s in loads.seconds[1:]), 3),
        "x stock": ratio("stock MindSpore, merge and load"),
        "x PyTorch": ratio("PyTorch distributed checkpoint"),
        "peak MiB": round(max(loads.peak for loads in mine) / (1 << 20)),
    }
