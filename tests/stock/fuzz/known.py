"""Differences that are meant. Each rule is a row of docs/differences.md, which tells who is right, and why.

A rule says as narrowly as it can which differences are its own; what no rule takes is a finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Callable, Optional

from tests.stock.fuzz import known_fails, known_right, known_wrong
from tests.stock.fuzz.found import Found

RULES: Mapping[str, Callable[[Found], bool]] = {**known_fails.RULES, **known_wrong.RULES, **known_right.RULES}
"""Name -> whether a difference is one of its kind."""


def rule_of(found: Found) -> Optional[str]:
    return next((name for name, rule in RULES.items() if rule(found)), None)
