"""A difference with all that is known about it, for the rules that take it."""

from __future__ import annotations

from typing import NamedTuple

from tests.stock.fuzz.cases import Case
from tests.stock.fuzz.compare import Difference
from tests.stock.fuzz.model import Cut, Job
from tests.stock.fuzz.sides import Outcome


class Found(NamedTuple):
    """A difference with all that is known about it."""

    difference: Difference
    case: Case
    stock: Outcome
    ours: Outcome

    def kind(self, *kinds: str) -> bool:
        return self.difference.kind in kinds

    @property
    def ours_is_right(self) -> bool:
        """By the truth; a mistake has none, and the rule alone decides."""
        right = self.difference.right
        return right == "ours" or (right == "unknown" and "mistake" in self.case.tags)

    @property
    def name(self) -> str:
        """The parameter, where it is about one."""
        return self.difference.where[-1] if len(self.difference.where) > 1 else ""

    def stock_says(self, *texts: str) -> bool:
        return self.kind("served", "error type") and any(text in str(self.stock.error) for text in texts)

    @property
    def unlisted(self) -> set[str]:
        """What the target's strategy does not list."""
        target, model = self.case.model.target, self.case.model
        return {n for n in model.parameters if target is not None and n not in target.listed}

    @property
    def jobs(self) -> list[Job]:
        return [job for job in (self.case.model.source, self.case.model.target) if job is not None]

    @property
    def cuts(self) -> list[Cut]:
        """How the parameter is cut, on either side."""
        name = self.name.replace("model.", "")
        return [cut for job in self.jobs for cut in job.cuts.get(name, {}).values()]
