"""Mutants tried: in processes of their own, by tests that run what was changed."""

from __future__ import annotations

import importlib.abc
import importlib.util
import inspect
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Callable, NamedTuple

from lines import PYTEST, ROOT, Timed, quiet
from places import Mutant

KILLED, SURVIVED, NOT_RUN = "killed", "survived", "not run"


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


def imported(mutant: Mutant, tests: Sequence[str]) -> int:
    """Run tests in a process that has imported nothing yet, with a faulty module. Not 0 when one fails.

    The tests of the module itself are all run, and come first: those that look at a constant run no line of it.
    """
    import pytest

    quiet()
    sys.meta_path.insert(0, _Faulty(mutant.module, mutant.code))
    own = ROOT / "tests" / mutant.module.relative_to(ROOT / "ms_ckpt_ext").with_name(f"test_{mutant.module.name}")
    failed = pytest.main([*PYTEST, str(own)]) if own.exists() else 0
    return int(failed or pytest.main([*PYTEST, *tests]))


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
        quiet()
        pytest.main([*PYTEST, tests], plugins=[_Patched(work, jobs, out)])
        os._exit(1)
    os.close(out)
    with os.fdopen(into) as file:
        for line in file:
            number, result = line.rstrip("\n").split(" ", 1)
            yield int(number), result
    if os.waitpid(child, 0)[1]:
        raise SystemExit("the tests could not be collected")
