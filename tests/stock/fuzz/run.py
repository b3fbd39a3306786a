"""A seed, from its number to its report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

from tests.stock.fuzz.calls import build
from tests.stock.fuzz.cases import Case, Network
from tests.stock.fuzz.compare import Difference, compare
from tests.stock.fuzz.found import Found
from tests.stock.fuzz.known import rule_of
from tests.stock.fuzz.model import Job
from tests.stock.fuzz.sides import Outcome, run


class Report(NamedTuple):
    """What a seed showed."""

    seed: int
    case: Case
    stock: Outcome
    ours: Outcome
    differences: list[Difference]

    def found(self) -> list[tuple[Optional[str], Difference]]:
        """Every difference with the rule that takes it; None is a finding."""
        return [(rule_of(Found(each, self.case, self.stock, self.ours)), each) for each in self.differences]

    @property
    def unexplained(self) -> list[Difference]:
        return [difference for rule, difference in self.found() if rule is None]

    def describe(self) -> str:
        """The call, the layouts, and every difference."""
        case, model = self.case, self.case.model
        given = [*map(_told, case.arguments), *(f"{name}={_told(value)}" for name, value in case.named.items())]
        lines = [f"seed {self.seed}: {case.function}({', '.join(given)})"]
        lines += [f"  rank {case.rank}, {', '.join(sorted(case.tags)) or 'nothing special'}"]
        lines += [f"  an error is right: {case.refusal}"] if case.refusal else []
        lines += _jobs(model.source, "source", model.parameters)
        lines += _jobs(model.target, "target", model.parameters) if model.target else []
        lines += [f"  outside every cut: {sorted(model.extras)}; every rank's own: {sorted(model.own)}"]
        lines += [f"  {rule or 'UNEXPLAINED'}: {difference}" for rule, difference in self.found()] or ["  equal"]
        return "\n".join(lines)


def _told(value: Any) -> str:
    if isinstance(value, Network):
        return f"a network of {[(n, a.dtype, a.shape) for n, a in value.parameters.items()]}"
    return "a function" if callable(value) else repr(value)


def _jobs(job: Job, side: str, parameters: Any) -> list[str]:
    unlisted = sorted({*job.cuts} - job.listed)
    lines = [f"  {side}: {job.stages} stage(s) of {job.devices} devices; not listed: {unlisted}"]
    for name, stages in job.cuts.items():
        for stage, cut in stages.items():
            whole = parameters[name]
            lines.append(f"    {name} {whole.dtype}{list(whole.shape)} stage {stage}: {tuple(cut)}")
    return lines


def run_seed(seed: int, root: Path, name: str = "", instead: Mapping[str, Callable[..., Any]] = {}) -> Report:
    """Build the case of `seed` in `root`, run both sides on equal copies, compare. `instead`: see `sides.run`."""
    case = build(seed, _fresh(root / "input"), name)
    outcomes = {}
    for side in ("stock", "ours"):
        _clear(root / side)
        shutil.copytree(root / "input", root / side)
        outcomes[side] = run(case, side, root / side, instead)
    differences = compare(case, outcomes["stock"], outcomes["ours"])
    return Report(seed, case, outcomes["stock"], outcomes["ours"], differences)


def _fresh(folder: Path) -> Path:
    _clear(folder)
    folder.mkdir(parents=True)
    return folder


def _clear(folder: Path) -> None:
    """Remove a folder; stock's files are read only."""
    if folder.exists():
        for path in folder.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)
        shutil.rmtree(folder)
