#!/usr/bin/env python3
"""Draws the trace of a cooperative load: scripts/trace_picture.py TRACE.json PICTURE [--ranks 4] (needs matplotlib).

One band per rank, two lanes each: above what its reading threads do and, in a stripe over them, the digesting of what
has landed; below what its main thread does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = {
    "read": "#4c78a8",
    "exchange": "#f58518",
    "place own": "#54a24b",
    "place": "#54a24b",
    "pack": "#eeca3b",
    "status": "#b279a2",
    "wait for reads": "#d3d3d3",
    "digest": "#e45756",
    "finish": "#54a24b",
    "wait for digests": "#d3d3d3",
}
UNNAMED = ("place own", "finish", "wait for digests")
"""Drawn in the colour of what they belong to, without a line in the legend."""
LANES = {"read": (0.08, 0.32), "digest": (0.02, 0.06)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--ranks", type=int, default=4, help="draw this many (default 4)")
    arguments = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("this needs matplotlib: pip install 'ms-ckpt-ext[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    events = [e for e in json.loads(arguments.trace.read_text())["traceEvents"] if e["pid"] < arguments.ranks]
    ranks = sorted({event["pid"] for event in events})
    figure, axes = pyplot.subplots(figsize=(10, 0.5 + 0.75 * len(ranks)), dpi=100)
    for number, rank in enumerate(ranks):
        for event in sorted((e for e in events if e["pid"] == rank), key=depth):
            low, height = LANES.get(event["name"], (0.46, 0.42))
            span = [(event["ts"] / 1e3, max(event["dur"] / 1e3, 0.5))]
            axes.broken_barh(span, (number + low, height), color=COLORS[event["name"]], linewidth=0)
    axes.set_yticks([number + 0.48 for number in range(len(ranks))], [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    names = [name for name in COLORS if name not in UNNAMED and any(event["name"] == name for event in events)]
    handles = [Patch(color=COLORS[name], label=name) for name in names]
    axes.legend(handles=handles, ncol=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(arguments.picture)


def depth(event: dict[str, Any]) -> int:
    """What is drawn over what: placing its own happens within an exchange."""
    return 1 if event["name"] == "place own" else 0


if __name__ == "__main__":
    main()
