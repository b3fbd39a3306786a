"""Which test runs which line of the core, and how long it takes."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Optional

from places import Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
CORE = ROOT / "ms_ckpt_ext" / "core"
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Timed(NamedTuple):
    """A test and the seconds that it takes."""

    seconds: float
    test: str


Lines = Mapping[str, Mapping[int, Sequence[Timed]]]
"""Path of a module -> line -> the tests that run it, the quickest first."""


@cache
def _statements(module: Path) -> list[ast.stmt]:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def all_tests(module: Path, lines: Lines) -> list[Timed]:
    """The tests that run anything of a module, the quickest first."""
    found = {each for some in lines.get(str(module), {}).values() for each in some}
    return sorted(each for each in found if each.test)


def tests_of(mutant: Mutant, lines: Lines) -> list[Timed]:
    """The tests that run the statement that is changed, the quickest first; what runs at import: all of the module."""
    of_module = lines.get(str(mutant.module), {})
    low, high = _statement(mutant)
    found = {each for line in range(low, high + 1) for each in of_module.get(line, ())}
    if any(not each.test for each in found):
        return all_tests(mutant.module, lines)
    return sorted(found)


def _statement(mutant: Mutant) -> tuple[int, int]:
    """The first and last line of the innermost statement, its body aside."""
    low, high = mutant.line, mutant.line
    for node in _statements(mutant.module):
        if node.lineno <= mutant.line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or 0
            if node.lineno <= mutant.line <= last:
                low, high = node.lineno, last
    return low, high


class _Noted:
    """A plugin of pytest's: every test is a context of coverage's, and timed."""

    def __init__(self, measured: Any) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = {}
        """Seconds of the processor's."""
        self._begun = 0.0

    def pytest_runtest_protocol(self, item: Any) -> None:
        """Called before each test."""
        self._measured.switch_context(item.nodeid)
        self._begun = time.process_time()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called behind each phase of a test."""
        if report.when == "call":
            self.seconds[report.nodeid] = time.process_time() - self._begun


def measured(tests: str, kept: Optional[Path]) -> Lines:
    """Run the tests once under coverage, in a process of their own; or take what was kept of the same files."""
    files = sorted([*CORE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    if kept and kept.exists():
        held = json.loads(kept.read_text(encoding="utf-8"))
        if held["state"] == state:
            return _lines(held["lines"])
    into, out = os.pipe()
    if (child := os.fork()) == 0:
        os.close(into)
        with os.fdopen(out, "w") as file:
            json.dump(_measure(tests), file)
        os._exit(0)
    os.close(out)
    with os.fdopen(into) as file:
        told = file.read()
    os.waitpid(child, 0)
    if not told or (found := json.loads(told)) is None:
        raise SystemExit(f"{tests} does not pass as it is: mend that first")
    if kept:
        kept.write_text(json.dumps({"state": state, "lines": found}), encoding="utf-8")
    return _lines(found)


def _lines(found: Any) -> Lines:
    return {
        path: {int(line): [Timed(*each) for each in timed] for line, timed in lines.items()}
        for path, lines in found.items()
    }


def within(timed: Sequence[Timed], seconds: float) -> list[Timed]:
    """As many tests as fit the time, at least one."""
    stops = accumulate(each.seconds for each in timed)
    return [each for number, (each, stop) in enumerate(zip(timed, stops)) if stop <= seconds or not number]


def _measure(tests: str) -> Any:
    import coverage
    import pytest

    run = coverage.Coverage(data_file=None, config_file=False, include=[f"{ROOT}/ms_ckpt_ext/core/*"])
    quiet()
    run.start()
    noted = _Noted(run)
    passed = pytest.main([*PYTEST, tests], plugins=[noted]) == 0
    run.stop()
    if not passed:
        return None
    data = run.get_data()
    return {
        path: {
            line: sorted((round(noted.seconds.get(test, 0.0), 3), test) for test in contexts)
            for line, contexts in data.contexts_by_lineno(path).items()
        }
        for path in data.measured_files()
    }


def quiet() -> None:
    """The settings of a process that runs tests: examples are always the same, and not made smaller."""
    from hypothesis import HealthCheck, Phase, settings

    if not os.environ.get("MUTANTS_LOUD"):
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
    phases = (Phase.explicit, Phase.generate)
    every = list(HealthCheck)
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=every
    )
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
