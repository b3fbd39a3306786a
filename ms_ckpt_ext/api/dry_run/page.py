"""The plan as one HTML page that needs nothing else: no network, no libraries, a few hundred kB at any size.

The page is a template with data; what is large is condensed here: traffic by at most 64 groups of ranks, rounds by at
most 240 groups, slices of a layout by at most 32 boxes along an axis; layouts that parameters share are drawn once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ms_ckpt_ext.api.dry_run.report import PlanReport, condensed
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.engine.load.estimate import DryRun
from ms_ckpt_ext.errors import storage_error

TEMPLATE = Path(__file__).with_name("plan.html")
MOST_ROUNDS, MOST_BOXES, MOST_LISTED = 240, 32, 6


def write_page(path: str, report: PlanReport, done: DryRun) -> None:
    """Write the page. Raises StorageError."""
    data = page_data(report, done)
    text = TEMPLATE.read_text(encoding="utf-8").replace('"the data"', _script_safe(data), 1)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise storage_error("write plan page", os.fspath(path), error) from error


def _script_safe(data: Any) -> str:
    """JSON that cannot end the script it stands in, whatever names it holds."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_data(report: PlanReport, done: DryRun) -> dict[str, Any]:
    """What the page draws."""
    tally = done.tally
    layouts = _Layouts()
    parameters = []
    for demand in done.table.demands:
        meta = demand.tensor.meta
        held = [(p.parts, p.holders) for p in demand.tensor.placements]
        wanted = [(grid.parts, grid.ranks) for grid in demand.grids]
        parameters.append([demand.name, meta.dtype.name, meta.shape, layouts.number(held), layouts.number(wanted)])
    return {
        "report": {**report.to_dict(), "rounds": len(report.rounds)},
        "rounds": condensed(report.rounds, MOST_ROUNDS),
        "traffic": {"group": tally.group, "cells": tally.matrix.tolist()},
        "reading": {"group": tally.group, "file_group": tally.file_group, "cells": tally.files.tolist()},
        "layouts": layouts.drawn,
        "parameters": parameters,
    }


Holding = tuple[Shape, Mapping[Cell, tuple[int, ...]]]


class _Layouts:
    """Layouts as drawings, each different one once."""

    def __init__(self) -> None:
        self.drawn: list[dict[str, Any]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._same: dict[str, int] = {}

    def number(self, holdings: Sequence[Holding]) -> int:
        """The number of a layout's drawing; -1 for a parameter that is made of others."""
        if not holdings:
            return -1
        key = tuple((parts, id(holders)) for parts, holders in holdings)
        if key not in self._numbers:
            drawing = _drawing(*holdings[0], len(holdings) - 1)
            number = self._same.setdefault(json.dumps(drawing), len(self.drawn))
            if number == len(self.drawn):
                self.drawn.append(drawing)
            self._numbers[key] = number
        return self._numbers[key]


def _drawing(parts: Shape, holders: Mapping[Cell, tuple[int, ...]], more: int) -> dict[str, Any]:
    """Boxes over the two axes with the most slices: for every box its lowest rank, how many ranks, and which."""
    axes = sorted(sorted(range(len(parts)), key=lambda axis: (-parts[axis], axis))[:2])
    counts = [min(parts[axis], MOST_BOXES) for axis in axes]
    boxes: dict[tuple[int, ...], set[int]] = {}
    for cell, ranks in holders.items():
        place = tuple(cell[axis] * count // parts[axis] for axis, count in zip(axes, counts))
        boxes.setdefault(place, set()).update(ranks)
    cells = [[*place, min(ranks), len(ranks), _listed(sorted(ranks))] for place, ranks in sorted(boxes.items())]
    return {"parts": parts, "axes": axes, "counts": counts, "boxes": cells, "more": more}


def _listed(ranks: Sequence[int]) -> str:
    """Ranks as ranges, the first few."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    told = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs[:MOST_LISTED])
    return told + (" …" if len(runs) > MOST_LISTED else "")
