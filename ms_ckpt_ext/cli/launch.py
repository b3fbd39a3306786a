"""Start the ranks of a job that resumes or serves: `scripts/resume.sh` and `infer.sh` call this.

    python -m ms_ckpt_ext.cli.launch {resume,infer} [--config FILE] [--dry-run] [options]

On several hosts the same command runs on each of them, with `--host-rank`. Both start MindSpore's msrun; the script
that it runs finds checkpoint_dir, train_strategy, prefix, mode and hardware in its environment, where
`ms_ckpt_ext.resume()` and `load_for_inference()` look.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Optional

from ms_ckpt_ext.cli import settings
from ms_ckpt_ext.errors import CheckpointError, UsageError

_SUMMARY = {
    "resume": "Start a training job's ranks with msrun; its script goes on from the newest complete checkpoint.",
    "infer": "Start the ranks of a network to serve with msrun; its script fills it from a training job's checkpoint.",
}
_VARIABLES = {
    "checkpoint_dir": "MS_CKPT_EXT_CHECKPOINT_DIR",
    "train_strategy": "MS_CKPT_EXT_TRAIN_STRATEGY",
    "prefix": "MS_CKPT_EXT_PREFIX",
    "mode": "MS_CKPT_EXT_MODE",
    "hardware": "MS_CKPT_EXT_HARDWARE",
}
_TAIL = 15
_SECONDS = 10
"""That msrun has to end its ranks."""


def parser(job: str) -> argparse.ArgumentParser:
    """The options of one script."""
    made = argparse.ArgumentParser(
        prog=f"scripts/{job}.sh",
        description=f"{_SUMMARY[job]} Every option is also a key of the configuration file, see configs/.",
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="INI file with these settings; options win over it")
    made.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    for setting in settings.SETTINGS:
        told = "needed" if setting.default is None else f"default: {setting.default}" if setting.default != "" else ""
        made.add_argument(
            "--" + setting.name.replace("_", "-"),
            metavar="{" + ",".join(setting.kind) + "}"
            if isinstance(setting.kind, tuple)
            else setting.kind.__name__.upper(),
            help=f"{setting.help}{f' ({told})' if told else ''}",
        )
    return made


def main(arguments: Sequence[str]) -> int:
    """Run one of the scripts; returns its exit code: 2 for wrong arguments, 1 for later failures."""
    if not arguments or arguments[0] not in _SUMMARY:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    job, *rest = arguments
    parsed = vars(parser(job).parse_args(rest))
    try:
        config = settings.read_settings(parsed["config"]) if parsed["config"] else settings.Settings({}, {})
        given = {
            setting.name: settings.value_of(setting, parsed[setting.name], "--" + setting.name.replace("_", "-"))
            for setting in settings.SETTINGS
            if parsed[setting.name] is not None
        }
        values = settings.complete(config.values, given)
        return _start(values, config.environment, parsed["dry_run"])
    except CheckpointError as error:
        sys.stderr.write(f"scripts/{job}.sh: {error}\n")
        return 2 if isinstance(error, UsageError) else 1


def command(values: Mapping[str, Any], port: int) -> list[str]:
    """The msrun command of this host."""
    hosts, ranks = values["hosts"], values["ranks_per_host"]
    return [
        "msrun",
        f"--worker_num={hosts * ranks}",
        f"--local_worker_num={ranks}",
        f"--master_addr={values['master']}",
        f"--master_port={port}",
        *([f"--node_rank={values['host_rank']}"] if hosts > 1 else []),
        f"--log_dir={values['log_dir']}",
        f"--cluster_time_out={values['start_timeout']}",
        "--join=True",
        values["script"],
        *shlex.split(values["arguments"]),
    ]


def variables(values: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that are added for the ranks."""
    return {**{_VARIABLES[name]: str(values[name]) for name in _VARIABLES if values[name]}, **more}


def _start(values: Mapping[str, Any], environment: Mapping[str, str], dry_run: bool) -> int:
    added = variables(values, environment)
    words = command(values, values["port"] or _free_port())
    if dry_run:
        print(*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(words), sep=" \\\n  ")
        return 0
    if not os.path.isfile(values["script"]):
        raise UsageError(f"no such script: {values['script']!r}; give --script, or call this where it can be found")
    try:
        code = _run(words, {**os.environ, **added})
    except FileNotFoundError as error:
        raise UsageError("msrun is not on PATH: it comes with MindSpore; activate its environment") from error
    if code:
        _show_logs(Path(values["log_dir"]))
    print(f"{'failed' if code else 'done'}; the ranks' logs are in {values['log_dir']}")
    return code


def _run(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run msrun to its end. Ctrl-C and SIGTERM end it first, and the ranks that it started (it does so at SIGINT)."""

    def end(number: int, frame: Optional[FrameType]) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    process = None
    try:
        process = subprocess.Popen(words, env=environment)
        return process.wait()
    finally:
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS)
            process.kill()
        signal.signal(signal.SIGTERM, before)


def _show_logs(folder: Path) -> None:
    for log in sorted(folder.glob("worker_*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if any("Error" in line for line in lines[-4 * _TAIL :]):
            sys.stderr.write("\n".join([f"--- the end of {log}:", *lines[-_TAIL:], ""]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _cli(argv: Optional[Sequence[str]] = None) -> int:
    logging.basicConfig(format="%(levelname)s %(message)s")
    return main(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(_cli())
