#!/usr/bin/env python3
"""Mutation testing: small faults are put into `ms_ckpt_ext/core`, one at a time, and `tests/core` must find each.

1. The tests run once under coverage: which test runs which line, and how long each takes.
2. The operators of cosmic-ray say what may be changed; `OPERATORS` has those that make faults people make, and one of
   our own leaves a statement away. Annotations and what an error says are left as they are.
3. Of every module a sample, drawn from a seed, is tried: a copy of a process that has collected the tests gives the
   functions of the module the faulty code, and runs the tests that run its line, the quickest first, until one fails.
   What differs outside of functions is imported anew. Nothing is written into the project.

What survives is a test that is missing, code that is not needed, or *equivalent*: no input tells it from the original.
`scripts/equivalent_mutants.txt` has those that were found to be so, and why; they do not count.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import fnmatch
import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, Callable, NamedTuple, Optional

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "ms_ckpt_ext" / "core"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.txt"

SWAPPED = ["Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is"]
ARITHMETIC = ["Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul", "Mod_FloorDiv", "Pow_Mul"]
BITS = ["RShift_LShift", "LShift_RShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr"]
OPERATORS = [
    *(f"ReplaceComparisonOperator_{name}" for name in SWAPPED),
    *(f"ReplaceBinaryOperator_{name}" for name in (*ARITHMETIC, *BITS)),
    *(f"ReplaceUnaryOperator_{name}" for name in ("Delete_USub", "Delete_Not", "Delete_Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop"),
]
PYTEST = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
KILLED, SURVIVED, NOT_RUN = "killed", "survived", "not run"


class LeaveAway(Operator):
    """Leave a statement away that calls something or changes a value in place."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """See `Operator`."""
        if node.type != "simple_stmt":
            return
        first = node.children[0]
        changed = first.type == "expr_stmt" and first.children[1].type == "operator" and first.children[1].value != "="
        augmented = first.type == "expr_stmt" and first.children[1].type == "augassign"
        if changed or augmented or first.type in ("atom_expr", "power"):
            yield first.start_pos, first.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """See `Operator`."""
        old = node.children[0]
        node.children[0] = parso.python.tree.Name("pass", old.start_pos, prefix=old.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """See `Operator`."""
        return ()


class Mutant(NamedTuple):
    """A module with one fault in it; `line` is where."""

    module: Path
    operator: str
    line: int
    code: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by when lines move: the module, and the changed lines."""
        return self.module.stem, self.before, self.after


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


class Place(NamedTuple):
    """Where an operator may change something: the `number`-th place of those that it finds in a statement."""

    operator: str
    number: int
    line: int
    before: str
    statement: str
    after: str


def places_of(source: str) -> list[Place]:
    """All places in a module."""
    left_alone = [*_left_alone(ast.parse(source))]
    statements = [(node, node.get_code()) for node in get_ast(source).children]
    found = []
    for at, (statement, text) in enumerate(statements):
        nodes = [*ast_nodes(statement)]
        rest = "".join(other for _, other in statements[:at]), text, "".join(other for _, other in statements[at + 1 :])
        for name in (*OPERATORS, LeaveAway.__name__):
            positions = (position for node in nodes for position in _operator(name).mutation_positions(node))
            for number, (start, _) in enumerate(positions):
                if not any(low <= start < high for low, high in left_alone):
                    found.append(Place(name, number, start[0], *rest))
    return found


@cache
def _operator(name: str) -> Operator:
    return LeaveAway() if name == LeaveAway.__name__ else get_operator(f"core/{name}")()


def mutant_of(module: Path, place: Place) -> Optional[Mutant]:
    """A module with a fault; None where that is no Python."""
    faulty = mutate_code(place.statement, _operator(place.operator), place.number)
    code = place.before + faulty + place.after
    if not _compiles(code):
        return None
    changed = [*difflib.unified_diff(place.statement.split("\n"), faulty.split("\n"), lineterm="", n=0)][2:]
    before, after = (" ".join(text[1:].strip() for text in changed if text[0] == sign) for sign in "-+")
    return Mutant(module, place.operator, place.line, code, before, after)


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _left_alone(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing is changed: annotations and types, errors that are raised, imports for type checkers only."""
    for node in ast.walk(tree):
        part: Any = None
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            part = node.annotation
        elif isinstance(node, ast.FunctionDef):
            part = node.returns
        elif (
            isinstance(node, ast.Raise)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            or (isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("Union[", "Callable[")))
        ):
            part = node
        if part is not None:
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


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


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Faulty(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports one module from other code than its file has."""

    def __init__(self, path: Path, code: str) -> None:
        self._path, self._code, self._name = str(path), code, _name_of(path)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """See `MetaPathFinder`."""
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=self._path, is_package=False)

    def get_source(self, fullname: str) -> str:
        """See `InspectLoader`."""
        return self._code

    def get_code(self, fullname: str) -> Any:
        """See `InspectLoader`."""
        return compile(self._code, self._path, "exec")


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


def _within(timed: Sequence[Timed], seconds: float) -> list[Timed]:
    """As many tests as fit the time, at least one."""
    stops = accumulate(each.seconds for each in timed)
    return [each for number, (each, stop) in enumerate(zip(timed, stops)) if stop <= seconds or not number]


def _measure(tests: str) -> Any:
    import coverage
    import pytest

    run = coverage.Coverage(data_file=None, config_file=False, include=[f"{ROOT}/ms_ckpt_ext/core/*"])
    _quiet()
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


def _quiet() -> None:
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


Work = Sequence[tuple[Mutant, Sequence[Timed]]]
"""Mutants, and the tests that each is tried by."""


class _Child(NamedTuple):
    """A process that tries the mutant `number`, until `end` at most."""

    number: int
    end: float


def all_tried(work: Work, jobs: int, run: Callable[[Mutant, Sequence[str]], int]) -> Iterator[tuple[int, str]]:
    """Try mutants, `jobs` at a time, in processes that leave with what `run` gives: (number, what became of it)."""
    running: dict[int, _Child] = {}
    waiting = iter(range(len(work)))
    while True:
        while len(running) < jobs and (number := next(waiting, None)) is not None:
            mutant, timed = work[number]
            if not timed:
                yield number, NOT_RUN
                continue
            # The limit is on the processor's time; what waits without end is ended by the clock.
            usual = sum(each.seconds for each in timed)
            if (child := os.fork()) == 0:
                _alone(int(3 * usual) + 10, partial(run, mutant, [each.test for each in timed]))
            running[child] = _Child(number, time.monotonic() + 20 * usual + 120)
        if not running:
            return
        time.sleep(0.01)
        for child, each in [*running.items()]:
            if time.monotonic() > each.end:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                yield each.number, KILLED if os.waitstatus_to_exitcode(status) else SURVIVED


def _alone(seconds: int, run: Callable[[], int]) -> None:
    """Run in a process of its own, so many seconds of the processor's at most, and leave."""
    code = 9
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        code = run()
    finally:
        os._exit(code)


def imported(mutant: Mutant, tests: Sequence[str]) -> int:
    """Run tests in a process that has imported nothing yet, with a faulty module. Not 0 when one fails."""
    import pytest

    _quiet()
    sys.meta_path.insert(0, _Faulty(mutant.module, mutant.code))
    return int(pytest.main([*PYTEST, *tests]))


class _Patched:
    """A plugin of pytest's: when all tests are collected, mutants are tried, each in a copy of the process in which
    the functions of the module have the mutant's code. So nothing is imported more than once."""

    def __init__(self, work: Work, jobs: int, out: int) -> None:
        self._work, self._jobs, self._out = work, jobs, out
        self._items: dict[str, Any] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        """Called when all tests are collected."""
        self._items = {item.nodeid: item for item in session.items}
        for number, result in all_tried(self._work, self._jobs, self._run):
            os.write(self._out, f"{number} {result}\n".encode())
        os._exit(0)

    def _run(self, mutant: Mutant, tests: Sequence[str]) -> int:
        source = mutant.module.read_text(encoding="utf-8")
        module = sys.modules[_name_of(mutant.module)]
        functions = dict(_functions(vars(module), module.__name__))
        old, new = (dict(_codes(compile(text, str(mutant.module), "exec"))) for text in (source, mutant.code))
        for name, code in new.items():
            if code != old[name]:
                functions[name].__code__ = code
        items = [self._items[test] for test in tests]
        failed: list[Any] = []
        for item, following in zip(items, [*items[1:], None]):
            item.config.pluginmanager.register(_Failures(failed), "failures")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            item.config.pluginmanager.unregister(name="failures")
            if failed:
                return 1
        return 0


class _Failures:
    """A plugin of pytest's: which tests failed."""

    def __init__(self, found: list[Any]) -> None:
        self._found = found

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called behind each phase of a test."""
        if report.failed:
            self._found.append(report.nodeid)


def _codes(code: CodeType, before: str = "") -> Iterator[tuple[str, CodeType]]:
    """The code of the functions of a module, and of the methods of its classes, by qualified name."""
    for each in code.co_consts:
        if isinstance(each, CodeType) and not each.co_name.startswith("<"):
            if each.co_flags & inspect.CO_OPTIMIZED:
                yield before + each.co_name, each
            else:
                yield from _codes(each, f"{before}{each.co_name}.")


def _functions(names: Mapping[str, Any], module: str) -> Iterator[tuple[str, FunctionType]]:
    """The functions of a module, and the methods of its classes, by qualified name; what wraps them taken off."""
    for value in names.values():
        for attribute in ("fget", "func", "__func__", "__wrapped__"):
            value = getattr(value, attribute, value) if not isinstance(value, (type, FunctionType)) else value
        if isinstance(value, FunctionType) and value.__module__ == module:
            yield value.__qualname__, value
        elif isinstance(value, type) and value.__module__ == module:
            yield from _functions(vars(value), module)


def in_functions(mutant: Mutant, source: str) -> bool:
    """Whether a mutant differs in the code of functions only; else it has to be imported."""
    bodies = [_bodies(compile(text, "module", "exec")) for text in (source, mutant.code)]
    return bodies[0] == bodies[1]


def _bodies(code: CodeType) -> list[Any]:
    """What runs when a module is imported, apart from its functions."""
    found: list[Any] = [code.co_code, code.co_names]
    for each in code.co_consts:
        inner = isinstance(each, CodeType)
        if not inner:
            found.append(each)
        elif not each.co_flags & inspect.CO_OPTIMIZED:
            found.append(_bodies(each))
        elif each.co_name.startswith("<"):
            found.append(each)
    return found


def patched(work: Work, jobs: int, tests: str) -> Iterator[tuple[int, str]]:
    """Try mutants that differ in functions only: (number, what became of it)."""
    into, out = os.pipe()
    if (child := os.fork()) == 0:
        import pytest

        os.close(into)
        _quiet()
        pytest.main([*PYTEST, tests], plugins=[_Patched(work, jobs, out)])
        os._exit(1)
    os.close(out)
    with os.fdopen(into) as file:
        for line in file:
            number, result = line.rstrip("\n").split(" ", 1)
            yield int(number), result
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the tests could not be collected")


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
    parser.add_argument("--seed", type=int, default=1, help="which of them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--tests", default="tests/core", help="what must find them")
    parser.add_argument("--seconds", type=float, default=10.0, help="of tests for a mutant at most, the quickest first")
    parser.add_argument("--containing", default="", help="only mutants of lines that contain this")
    parser.add_argument("--lines", type=Path, help="keep here which test runs which line, for the next time")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    lines = measured(options.tests, options.lines)
    for name in ("numpy", "pytest", "hypothesis", "safetensors.numpy"):  # once, before the forks
        importlib.import_module(name)
    scratch = tempfile.mkdtemp()
    os.environ.update(PYTEST_DEBUG_TEMPROOT=scratch, OPENBLAS_NUM_THREADS="1")
    try:
        _report(options, lines)
    finally:
        shutil.rmtree(scratch)
    return 0


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
    chosen = (tests_of(m, lines) if m.operator else all_tests(m.module, lines)[:20] for m in every)
    work = [(mutant, _within(timed, options.seconds)) for mutant, timed in zip(every, chosen)]
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
    made = (mutant_of(path, place) for place in places[: options.sample or None])
    chosen = [mutant for mutant in made if mutant is not None]
    known = equivalents()
    judged = [mutant for mutant in chosen if mutant.key not in known]
    return Sample(len(places), judged, len(chosen) - len(judged))


def _tell(name: str, counts: Mapping[str, int]) -> None:
    judged = sum(counts[result] for result in (KILLED, SURVIVED, NOT_RUN))
    score = f"{100 * counts[KILLED] / judged:.1f} %" if judged else "-"
    told = ", ".join(f"{counts[each]} {each}" for each in ("mutants", KILLED, SURVIVED, NOT_RUN, "equivalent"))
    print(f"== {name}: {score} ({told})", flush=True)


def _interrupted(number: int, frame: Optional[FrameType]) -> None:
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupted)
    sys.exit(main())
