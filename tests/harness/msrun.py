"""Runs a worker script on N ranks of this host, as a user would with msrun, and returns what every rank wrote.

Two ways of starting the same script:

* supervised: `msrun --join=True`. msrun looks at its workers once a second and kills all of them when one has failed,
  so a rank that outlives another has about a second to say something. It also takes 7 s longer to start and end, so it
  is for tests of what users start with it.
* unsupervised (default): the same processes with the environment variables that msrun sets (MindSpore's "dynamic
  cluster" start-up), and nobody who kills survivors, as on a cluster whose other hosts have launchers of their own.
  Fault tests need it: how a survivor ends is then its own doing. They are forked from one that has imported MindSpore,
  since the import takes longer than most of what a rank does.

One rank of a run, and no more, may die of SIGSEGV after its script came to its end; that is a warning: MindSpore's
teardown crashes now and then (2.10.0, one of some thousand ranks on the CPU; known of other projects' tests as well).
If Python was still up, the warning shows what its fault handler said.

No process outlives a call, whatever happens: descendants are found through psutil, because msrun gives each worker a
session of its own and so a kill of the process group would miss them. Nor do temporary files: each run has a folder for
them, and for the messages between emulated devices.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol

import psutil

from tests.harness import emulator
from tests.harness.ending import running

ROOT = Path(__file__).resolve().parents[2]
_RANK = Path(__file__).with_name("rank.py")
_ENDED = ".ended"
_TAIL = 3000
_GRACE = 10.0
PATIENCE = "MS_CKPT_EXT_PATIENCE"


@dataclass(frozen=True)
class MsrunResult:
    """How a run ended.

    Attributes:
        returncode: 0, or that of msrun or of the first rank that failed.
        logs: "worker_0", "worker_1", …, "scheduler" (and "msrun") -> everything that was written there.
        returncodes: of every rank; empty for a supervised run, where only msrun knows them.
        seconds: wall time of the whole run.
    """

    returncode: int
    logs: Mapping[str, str]
    returncodes: tuple[Optional[int], ...]
    seconds: float

    def worker(self, rank: int) -> str:
        """Log of a rank."""
        return self.logs[f"worker_{rank}"]

    def tails(self) -> str:
        """The end of every log, for a message."""
        return "\n".join(f"---- {name} ----\n{text[-_TAIL:]}" for name, text in sorted(self.logs.items()))


def run_msrun(
    script: Path,
    *args: object,
    ranks: int,
    tmp_path: Path,
    device: str = "cpu",
    env: Optional[Mapping[str, str]] = None,
    timeout: float = 120,
    expect_failure: bool = False,
    supervised: bool = False,
    old: bool = False,
) -> MsrunResult:
    """Run `script *args` on `ranks` ranks and wait for all of them.

    Args:
        device: "cpu", or "ascend" for the emulated one (the test is skipped where that cannot be built).
        env: additional variables; `CANNEMU_*` of the caller are passed on too.
        timeout: seconds after which everything is killed and the run counts as hung, on a machine that does nothing
            else: MS_CKPT_EXT_PATIENCE multiplies them. When a rank failed and that was not expected, the others have
            10 s more at most.
        expect_failure: return a run that failed instead of raising; a hung one raises all the same.
        supervised: see the module.
        old: on "ascend", also under a MindSpore that cannot load there.

    Raises:
        AssertionError: the run hung, or failed though that was not expected; it shows the tail of every log.
    """
    timeout *= float(os.environ.get(PATIENCE, "1"))
    command = [sys.executable, str(Path(script).resolve()), *map(str, args)]
    log_dir = tmp_path / f"log_{time.monotonic_ns()}"
    log_dir.mkdir(parents=True)
    launch = _msrun if supervised else _dynamic_cluster
    with tempfile.TemporaryDirectory(dir=log_dir) as scratch:
        variables = _environment(device, env or {}, old, Path(scratch))
        start = time.monotonic()
        codes = launch(command, ranks, variables, log_dir, start + timeout, expect_failure)
    codes = _excused(codes, log_dir)
    logs = {path.stem: _said(path) for path in log_dir.glob("*.log")}
    code = next((code for code in codes if code), 0)
    result = MsrunResult(code, logs, () if supervised else tuple(codes), time.monotonic() - start)
    if code and not expect_failure:
        raise AssertionError(f"{script.name} on {ranks} ranks ({device}) failed: {codes}\n{result.tails()}")
    if None in codes:
        raise AssertionError(f"{script.name} on {ranks} ranks ({device}) still ran after {timeout} s\n{result.tails()}")
    return result


def _excused(codes: list[Optional[int]], log_dir: Path) -> list[Optional[int]]:
    """The codes; where MindSpore crashed exactly one rank at exit, its code becomes 0, with a warning."""
    crashed = [
        rank
        for rank, code in enumerate(codes)
        if code == -signal.SIGSEGV and (log_dir / f"worker_{rank}{_ENDED}").exists()
    ]
    if len(crashed) != 1:
        return codes
    (rank,) = crashed
    _, fault, told = _said(log_dir / f"worker_{rank}.log").rpartition("Fatal Python error")
    warnings.warn(f"rank {rank} died of SIGSEGV after its script had ended\n{fault}{told[:_TAIL]}", stacklevel=3)
    return [*codes[:rank], 0, *codes[rank + 1 :]]


def _said(log: Path) -> str:
    """Standard output, then standard error; in one file they would break each other's lines."""
    err = log.with_suffix(".err")
    return log.read_text(errors="replace") + (err.read_text(errors="replace") if err.exists() else "")


def _environment(device: str, extra: Mapping[str, str], old: bool, scratch: Path) -> dict[str, str]:
    """For the workers. One thread per rank: with more, 8 ranks on 2 cores mostly wait for each other."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK_", "DEVICE_"))}
    env[PATIENCE] = os.environ.get(PATIENCE, "1")  # scripts whose own limits are short multiply them as well
    env.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", GLOG_v="2")
    env.update(PYTHONUNBUFFERED="1", PYTHONFAULTHANDLER="1", TMPDIR=str(scratch))
    # msrun starts "python": it must be this one, also in a virtual environment that is not activated.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if device == "ascend":
        env = emulator.environment(emulator.emulator_or_skip(old), env, scratch)
        env.setdefault("CANNEMU_TIMEOUT", "30")
    elif device != "cpu":
        raise ValueError(f"device is 'cpu' or 'ascend', not {device!r}")
    env.update(extra)
    return env


def _msrun(
    command: list[str], ranks: int, env: Mapping[str, str], log_dir: Path, deadline: float, patient: bool
) -> list[Optional[int]]:
    launcher = [sys.executable, "-c", "from mindspore.parallel.cluster.run import main; main()"]
    options = [f"--worker_num={ranks}", f"--local_worker_num={ranks}", f"--master_port={free_port()}"]
    options += [f"--log_dir={log_dir}", "--join=True", "--cluster_time_out=60", "--tail_worker_log=0"]
    with open(log_dir / "msrun.log", "w") as out, ExitStack() as stack:
        process = subprocess.Popen(
            [*launcher, *options, *command[1:]], env=dict(env), stdout=out, stderr=subprocess.STDOUT, cwd=log_dir
        )
        stack.callback(_kill, [process])
        return _wait([process], deadline, patient)


def _dynamic_cluster(
    command: list[str], ranks: int, env: Mapping[str, str], log_dir: Path, deadline: float, patient: bool
) -> list[Optional[int]]:
    shared = {"MS_WORKER_NUM": str(ranks), "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": str(free_port())}
    shared.update(MS_TOPO_TIMEOUT="100", RANK_SIZE=str(ranks))
    roles = {"scheduler": {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}}
    for rank in map(str, range(ranks)):
        roles[f"worker_{rank}"] = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank, "DEVICE_ID": rank}
    job = log_dir / "job.json"
    job.write_text(json.dumps({"command": command[1:], "roles": {n: {**shared, **role} for n, role in roles.items()}}))
    with open(log_dir / "start.log", "w") as out, ExitStack() as stack:
        starter = subprocess.Popen(
            [command[0], str(_RANK), str(job)], env=dict(env), stdout=out, stderr=out, cwd=log_dir
        )
        stack.callback(_kill, [starter])
        # The scheduler is not waited for: it may stay for minutes after a worker was lost.
        return _wait([_Forked(starter, log_dir / f"worker_{rank}.code") for rank in range(ranks)], deadline, patient)


class _Forked:
    """A process that the starter has forked; the starter writes down how it ended."""

    def __init__(self, starter: subprocess.Popen[bytes], code: Path) -> None:
        self._starter, self._code = starter, code

    def poll(self) -> Optional[int]:
        """The return code, None while it runs."""
        gone = self._starter.poll()  # it ends last, unless it fails
        return int(self._code.read_text()) if self._code.exists() else gone


class _Process(Protocol):
    def poll(self) -> Optional[int]: ...


def _wait(processes: Sequence[_Process], deadline: float, patient: bool) -> list[Optional[int]]:
    """Return codes of all; None for one that still ran at the deadline.

    Unless `patient`, the others have only `_GRACE` seconds more once one has failed: they may be waiting for it.
    """
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline:
        if any(codes) and not patient:
            deadline, patient = min(deadline, time.monotonic() + _GRACE), True
        time.sleep(0.05)
    return codes


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill those that still run, and their descendants, which are listed first so that none is lost with its parent."""
    victims = []
    for process in processes:
        if process.poll() is None:
            victims += [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    while running([victim.pid for victim in victims]):
        time.sleep(0.01)
    for process in processes:
        process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
