#!/usr/bin/env python3
"""Draws the trace of a cooperative load: scripts/trace_picture.py TRACE.json PICTURE [--ranks 4] (needs matplotlib).

One band per rank: above what its reading threads do and, in a stripe over them, the digesting of what has landed; below
what its main thread does, and in two stripes under that the rounds that travel, from where they are started to where
they have come.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLORS = {
    "read": "#4c78a8",
    "exchange": "#d3d3d3",
    "place own": "#54a24b",
    "place": "#54a24b",
    "place local": "#54a24b",
    "stage": "#72b7b2",
    "pack": "#eeca3b",
    "start": "#9d755d",
    "travels": "#f58518",
    "send on": "#ff9da6",
    "status": "#b279a2",
    "wait for reads": "#d3d3d3",
    "digest": "#e45756",
    "finish": "#54a24b",
    "wait for digests": "#d3d3d3",
}
UNNAMED = ("place own", "place local", "finish", "wait for digests", "exchange")
"""Drawn in the colour of what they belong to, without a line in the legend."""
LANES = {"read": (0.08, 0.28), "digest": (0.02, 0.06), "travels": (0.72, 0.08), "travels too": (0.82, 0.08)}


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
    events += travelling(events)
    ranks = sorted({event["pid"] for event in events})
    figure, axes = pyplot.subplots(figsize=(10, 0.5 + 0.75 * len(ranks)), dpi=100)
    for number, rank in enumerate(ranks):
        for event in sorted((e for e in events if e["pid"] == rank), key=depth):
            low, height = LANES.get(event.get("lane", event["name"]), (0.40, 0.28))
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


def travelling(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds that travel, from where a rank starts them to where they have come; two at a time."""
    begun = {(e["pid"], e["args"]["round"]): e["ts"] for e in events if e["name"] == "start"}
    found = []
    for event in events:
        key = (event["pid"], event["args"].get("round"))
        if event["name"] == "exchange" and key in begun:
            end, lane = event["ts"] + event["dur"], "travels too" if key[1] % 2 else "travels"
            found.append({**event, "name": "travels", "lane": lane, "ts": begun[key], "dur": end - begun[key]})
    return found


def depth(event: dict[str, Any]) -> int:
    """What is drawn over what: placing its own happens within an exchange."""
    return 1 if event["name"] == "place own" else 0


if __name__ == "__main__":
    main()
