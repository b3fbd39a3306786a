"""What ranks of a job say of faults: lines `FAULT {json}` in their logs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.harness.msrun import MsrunResult

Faults = Mapping[str, tuple[set[str], str]]
"""Name -> errors that ranks may be told, and what every message says."""


def assert_told(result: MsrunResult, faults: Faults, ranks: int, victim: int) -> dict[str, list[dict[str, Any]]]:
    """Every rank is told of every fault, soon, and by name, and nothing is changed that is not reported.

    The last fault, "killed", ends the victim. Returns what was told: fault -> by every rank.
    """
    assert result.returncodes == tuple(-9 if rank == victim else 0 for rank in range(ranks)), result.tails()
    told: dict[str, list[dict[str, Any]]] = {}
    for rank in range(ranks):
        for line in result.worker(rank).splitlines():
            if line.startswith("FAULT "):
                fault = json.loads(line[6:])
                told.setdefault(fault["name"], []).append(fault)
    for name, (kinds, text) in faults.items():
        assert [fault["rank"] for fault in told[name]] == [r for r in range(ranks) if (name, r) != ("killed", victim)]
        for fault in told[name]:
            assert fault["error"] in kinds, fault
            assert text in fault["message"], fault
            assert fault["unreported"] == [], fault
            assert fault["seconds"] < 60, fault
            assert fault["reported"] == 0 or fault["error"] == "LoadError", fault
            assert fault["error"] == "LoadError" or fault["changed"] == 0, fault
    return told
