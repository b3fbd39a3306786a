"""MindFormers' loaders, stock and ours, in one run: its own folder of 4 ranks and a Hugging Face directory on 2 ranks.

The worker is the tests' (tests/bridge/mindformers/folder_worker.py) with larger parameters: every loader fills a
network twice in each process, and the second time counts. `read` is what a rank reads of tensors (stock maps files
into memory, so its tensors are counted as it gets them, whole); `memory` is how far its peak of resident memory rises
during the load.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parents[2] / "tests/bridge/mindformers/folder_worker.py"


def mindformers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """MindFormers' loaders against ours; needs MindFormers installed."""
    from tests.harness.msrun import run_msrun

    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        shared = {"tmp_path": root, "timeout": 1200.0}
        run_msrun(WORKER, "save", "2x2", root, root / "saved", arguments.scale, ranks=4, **shared)  # type: ignore[arg-type]
        run_msrun(WORKER, "load", "1x2", root, root / "loaded", arguments.scale, ranks=2, **shared)  # type: ignore[arg-type]
        by_rank = [json.loads((root / f"loaded.{rank}").read_text()) for rank in range(2)]
    return [
        {
            "job": f"mindformers {case}",
            "right": all(all(found[case]["right"].values()) for found in by_rank),
            "wanted_mb": round(max(found[case]["wanted"] for found in by_rank) / 1e6, 1),
            "read_mb": round(max(found[case]["read"] for found in by_rank) / 1e6, 1),
            "memory_mb": round(max(found[case]["peak"] for found in by_rank) / 1e6, 1),
            "seconds": round(max(found[case]["seconds"] for found in by_rank), 2),
        }
        for case in by_rank[0]
    ]
