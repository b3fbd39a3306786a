"""`ms-ckpt verify`: 8-way shards against their merge and by themselves, the whole process, against reading the bytes.

`cat` of both checkpoints reads the same bytes and looks at none: what verifying costs beyond that is the comparison.
Memory is the resident set of the process, the interpreter and imports included.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benches.measure import measure, take_turns
from benches.offline import make_source

CASE = "dp2_tp4_zero"


def verify(arguments: Namespace) -> list[dict[str, Any]]:
    """Two layouts of one model compared, and one checkpoint checked by itself and by its digests."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        shards, merged = str(root / "source"), str(root / "merged")
        strategy = str(make_source(CASE, arguments.size * (1 << 30), root / "source"))
        command = [sys.executable, "-m", "ms_ckpt_ext"]
        measure([*command, "merge", shards, merged, "--strategy", strategy])
        size = sum(path.stat().st_size for path in Path(merged).glob("*.safetensors"))
        both = f"cat {merged}/*.safetensors {shards}/*/*.safetensors > /dev/null"
        commands = {
            "verify shards merged": [*command, "verify", shards, merged, "--strategy", strategy],
            "verify shards": [*command, "verify", shards, "--strategy", strategy],
            "verify merged --manifest": [*command, "verify", merged, "--manifest"],
            "cat both": ["sh", "-c", both],
        }
        turns = take_turns(commands, lambda: None, arguments.rounds)
        return [
            {
                "command": name,
                "bytes": size,
                "seconds": round(statistics.median(t.seconds for t in mine), 3),
                "GiB/s": round(size / (1 << 30) / statistics.median(t.seconds for t in mine), 2),
                "slowest GiB/s": round(size / (1 << 30) / max(t.seconds for t in mine), 2),
                "peak MiB": round(mine[0].peak / (1 << 20)),
            }
            for name, mine in turns.items()
        ]
