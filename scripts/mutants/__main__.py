#!/usr/bin/env python3
"""Mutation testing: small faults are put into `ms_ckpt_ext/core`, one at a time, and `tests/core` must find each.

1. The tests run once under coverage: which test runs which line, and how long each takes.
2. The operators of cosmic-ray say what may be changed; `OPERATORS` has those that make faults people make, and one of
   our own leaves a statement away. Annotations and what an error says are left as they are.
3. Of every module a sample, drawn from a seed, is tried: a copy of a process that has collected the tests gives the
   functions of the module the faulty code, and runs the tests that run its line, the quickest first, until one fails.
   What differs outside of functions is imported anew, and the tests of the module itself come first.
   Nothing is written into the project.

What survives is a test that is missing, code that is not needed, or *equivalent*: no input tells it from the original.
`equivalent.txt` has those that were found to be so, and why; they do not count.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

from lines import CORE, ROOT, Lines, all_tests, measured, tests_of, within
from places import Mutant, mutant_of, places_of
from trials import KILLED, NOT_RUN, SURVIVED, all_tried, imported, in_functions, patched

EQUIVALENT = Path(__file__).resolve().parent / "equivalent.txt"


def equivalents() -> dict[tuple[str, str, str], str]:
    """What is known to be equivalent -> why. Four lines each: module, line, line as changed, reason."""
    found = {}
    text = EQUIVALENT.read_text(encoding="utf-8") if EQUIVALENT.exists() else ""
    for block in text.split("\n\n"):
        rows = [row for row in block.strip().split("\n") if not row.startswith("#")]
        if len(rows) == 4:
            found[(rows[0], rows[1][2:], rows[2][2:])] = rows[3]
    return found


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=["*"], help="below ms_ckpt_ext/core, such as 'geometry/*'")
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module at most (0: all)")
    parser.add_argument("--skip", type=int, default=0, help="the first of them: what a smaller sample has tried")
    parser.add_argument("--seed", type=int, default=1, help="which of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--tests", default="tests/core", help="what must find them")
    parser.add_argument("--seconds", type=float, default=5.0, help="of tests for a mutant at most, the quickest first")
    parser.add_argument("--verbose", action="store_true", help="tell of those that are killed as well")
    parser.add_argument("--containing", default="", help="only mutants of lines that contain this")
    parser.add_argument("--lines", type=Path, help="keep here which test runs which line, for the next time")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from tests.harness.ending import taking_all_along

    with taking_all_along():
        _measure(options)
    return 0


def _measure(options: argparse.Namespace) -> None:
    lines = measured(options.tests, options.lines)
    for name in ("numpy", "pytest", "hypothesis", "safetensors.numpy"):  # once, before the forks
        importlib.import_module(name)
    scratch = tempfile.mkdtemp()
    os.environ.update(PYTEST_DEBUG_TEMPROOT=scratch, OPENBLAS_NUM_THREADS="1")
    try:
        _report(options, lines)
    finally:
        shutil.rmtree(scratch)


class Sample(NamedTuple):
    """What of a module is tried: how many mutants it has, those that are judged, and how many are left out."""

    mutants: int
    judged: list[Mutant]
    equivalent: int


def _report(options: argparse.Namespace, lines: Lines) -> None:
    samples = {}
    for path in sorted(CORE.rglob("*.py")):
        name = str(path.relative_to(CORE).with_suffix(""))
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.modules):
            samples[name] = _sample(name, path, options)
    originals = [Mutant(CORE / f"{name}.py", "", 1, (CORE / f"{name}.py").read_text(), "", "") for name in samples]
    every = [*originals, *(mutant for sample in samples.values() for mutant in sample.judged)]
    chosen = (tests_of(m, lines) if m.operator else all_tests(m.module, lines)[:5] for m in every)
    work = [(mutant, within(timed, options.seconds)) for mutant, timed in zip(every, chosen)]
    texts = {path: path.read_text(encoding="utf-8") for path in {mutant.module for mutant in every}}
    fast = [n for n, mutant in enumerate(every) if in_functions(mutant, texts[mutant.module])]
    slow = [n for n in range(len(every)) if n not in set(fast)]
    found: dict[int, str] = {}
    for numbers, ways in ((fast, partial(patched, tests=options.tests)), (slow, partial(all_tried, run=imported))):
        for place, result in ways([work[n] for n in numbers], options.jobs):
            number = numbers[place]
            found[number] = result
            mutant = every[number]
            if mutant.operator and result != KILLED:
                print(f"{mutant.module.relative_to(ROOT)}:{mutant.line} {result} ({mutant.operator})")
                print(f"- {mutant.before}\n+ {mutant.after}", flush=True)
            elif mutant.operator and options.verbose:
                print(f"{mutant.module.relative_to(ROOT)}:{mutant.line} {result}", flush=True)
            elif not mutant.operator and result == KILLED:
                raise SystemExit(f"{mutant.module} is said to be faulty as it is")
    totals: Counter[str] = Counter()
    for name, sample in samples.items():
        results = [
            found[n] for n, mutant in enumerate(every) if mutant.operator and mutant.module == CORE / f"{name}.py"
        ]
        counts = Counter(mutants=sample.mutants, equivalent=sample.equivalent) + Counter(results)
        totals += counts
        _tell(name, counts)
    _tell("all", totals)


def _sample(name: str, path: Path, options: argparse.Namespace) -> Sample:
    source = path.read_text(encoding="utf-8")
    text = source.split("\n")
    places = [place for place in places_of(source) if options.containing in text[place.line - 1]]
    random.Random(f"{options.seed} {name}").shuffle(places)
    made = (mutant_of(path, place) for place in places[options.skip : options.sample or None])
    chosen = [mutant for mutant in made if mutant is not None]
    known = equivalents()
    judged = [mutant for mutant in chosen if mutant.key not in known]
    return Sample(len(places), judged, len(chosen) - len(judged))


def _tell(name: str, counts: Mapping[str, int]) -> None:
    judged = sum(counts[result] for result in (KILLED, SURVIVED, NOT_RUN))
    score = f"{100 * counts[KILLED] / judged:.1f} %" if judged else "-"
    told = ", ".join(f"{counts[each]} {each}" for each in ("mutants", KILLED, SURVIVED, NOT_RUN, "equivalent"))
    print(f"== {name}: {score} ({told})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
