"""Feeds every parser of outside data what is meant to hurt it, each in a process of its own with little memory.

scripts/fuzz.sh parsers --minutes 60              all of them, the time shared out
scripts/fuzz.sh parsers --minutes 5 --only ckpt   one of them
scripts/fuzz.sh parsers --input FILE --only ckpt  an input that was found, once more

By coverage where atheris is installed (`pip install atheris`), else at random.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.harness.ending import taking_all_along


def main() -> int:
    options = _parser().parse_args()
    from tests.hostile.parsers import PARSERS

    names = options.only or list(PARSERS)
    unknown = [name for name in names if name not in PARSERS]
    if unknown:
        print(f"no parser {unknown[0]!r}: there are {', '.join(PARSERS)}", file=sys.stderr)
        return 2
    if options.input:
        return _once_more(names, Path(options.input))
    engine = "atheris" if importlib.util.find_spec("atheris") and not options.blind else "random"
    folder = Path(options.keep)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(names)} parsers, {options.minutes:g} minutes, {engine}; findings go to {folder}", flush=True)
    from tests.hostile.seeds import scratch_folder

    with taking_all_along(), scratch_folder() as scratch:
        return _search_all(names, options, engine, folder, scratch)


def _search_all(names: list[str], options: argparse.Namespace, engine: str, folder: Path, scratch: str) -> int:
    found = 0
    for name in names:
        told = _search(name, options.minutes * 60 / len(names), options.seed, engine, folder, scratch)
        found += len(told["found"])
        reached = _reached((folder / f"{name}.log").read_text(errors="replace"))
        figures = f"{told['tried']:>10,} inputs in {told['seconds']:3.0f} s{reached}"
        print(f"{name:<16} {figures}, {len(told['found'])} findings", flush=True)
        for where, what in told["found"].items():
            print(f"    {what}\n        {where}", flush=True)
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz.sh parsers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="in all (default: 5)")
    parser.add_argument("--only", action="append", metavar="NAME", help="this parser; may be repeated")
    parser.add_argument("--seed", type=int, default=1, help="of what is random (default: 1)")
    parser.add_argument("--blind", action="store_true", help="at random, though atheris is there")
    parser.add_argument("--keep", metavar="DIR", default="build/hostile", help="gets what was found (build/hostile)")
    parser.add_argument("--input", metavar="FILE", help="judge this file instead, by the parser that --only names")
    return parser


def _search(name: str, seconds: float, seed: int, engine: str, folder: Path, scratch: str) -> dict[str, Any]:
    from tests.hostile.seeds import SCRATCH

    words = [sys.executable, "-m", "tests.hostile.one", name, str(seconds), str(seed), engine, str(folder)]
    began = time.monotonic()
    with open(folder / f"{name}.log", "wb") as log:
        # A fuzzer works in one thread; libraries that start one for each core only take up address space.
        few = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", SCRATCH: scratch}
        ended = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, env=few, timeout=seconds + 600, check=False)
    lines = ended.stdout.splitlines()
    if ended.returncode == 0 and lines:
        told: dict[str, Any] = json.loads(lines[-1])
        return {**told, "seconds": time.monotonic() - began}
    return {
        "tried": 0,
        "seconds": time.monotonic() - began,
        "found": {f"see {name}.log": f"the process ended with {ended.returncode}"},
    }


def _reached(log: str) -> str:
    """How much of the code inputs reached, and how many are kept for it, as libFuzzer says; "" where it did not run."""
    told = re.findall(r" cov: (\d+) ft: \d+ corp: (\d+)", log)
    return f", {int(told[-1][0]):,} edges by {int(told[-1][1]):,} inputs" if told else ""


def _once_more(names: list[str], path: Path) -> int:
    from tests.hostile.judge import judge
    from tests.hostile.parsers import PARSERS

    found = [(name, judge(PARSERS[name], path.read_bytes())) for name in names]
    for name, finding in found:
        print(f"{name}: {finding.what if finding else 'nothing wrong'}")
    return 1 if any(finding for _, finding in found) else 0


if __name__ == "__main__":
    sys.exit(main())
