"""Runs seeds, and tells what they showed.

scripts/fuzz.sh                     the seeds 0 to 1999
scripts/fuzz.sh --seed 7            one seed: its call, its layouts, every difference
scripts/fuzz.sh --start 5000 --count 100 --call by_rank
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path

from tests.harness.ending import taking_all_along
from tests.harness.stock_memory import let_stock_merge
from tests.stock.fuzz.calls import BUILDERS
from tests.stock.fuzz.run import Report, run_seed


def main() -> int:
    options = _parser().parse_args()
    let_stock_merge()
    import mindspore

    mindspore.set_device("CPU")
    seeds = range(options.start, options.start + options.count) if options.seed is None else [options.seed]
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    counts: collections.Counter[str] = collections.Counter()
    failed = []
    with taking_all_along(), tempfile.TemporaryDirectory(prefix="ms_ckpt_ext_fuzz_", dir=shared) as folder:
        for seed in seeds:
            report = run_seed(seed, Path(options.keep or folder), options.call)
            counts.update({rule or "unexplained" for rule, _ in report.found()} or ["equal"])
            if options.seed is not None:
                print(report.describe(), flush=True)
            elif report.unexplained:
                failed.append(seed)
                print("\n".join(_lines(report)), flush=True)
    _summary(len(seeds), counts, failed)
    return 1 if counts["unexplained"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/fuzz.sh", description="Compare with stock MindSpore, at random.")
    parser.add_argument("--seed", type=int, help="one seed, told in full")
    parser.add_argument("--start", type=int, default=0, help="the first of several seeds (default: 0)")
    parser.add_argument("--count", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--call", choices=sorted(BUILDERS), default="", help="calls of one kind only")
    parser.add_argument("--keep", metavar="DIR", help="leave the files of the last seed there: input, stock, ours")
    return parser


def _lines(report: Report) -> list[str]:
    """One line for every kind of difference of a seed that no rule takes."""
    kinds = {(each.kind, each.right): each for each in reversed(report.unexplained)}
    return [f"seed {report.seed}: {report.case.function}: {each}" for each in kinds.values()]


def _summary(seeds: int, counts: collections.Counter[str], failed: list[int]) -> None:
    print(f"{seeds} seeds: {counts.pop('equal', 0)} equal, {len(failed)} with a difference that no rule takes")
    for rule, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:6}  {rule}")
    if failed:
        print(f"see scripts/fuzz.sh --seed {failed[0]}")


if __name__ == "__main__":
    sys.exit(main())
