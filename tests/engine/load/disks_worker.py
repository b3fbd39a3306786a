"""A rank of test_disks_of_hosts.py: `disks_worker.py MEETING_POINT RANK SIZE FOLDER`. Prints what the survey found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

from ms_ckpt_ext.engine.load.hosts import host_key
from ms_ckpt_ext.engine.load.survey import survey
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.transport.control import ControlPlane
from tests.harness.meeting_point import gather_at


def main(point: str, rank: int, size: int, folder: str) -> None:
    """Look at the folder together with the other ranks."""
    read: list[str] = []

    def look() -> Listing:
        read.append("list")
        return Listing({path.stem: str(path) for path in Path(folder).glob("*.safetensors")}, sharded=True, names=None)

    def header(path: str) -> FileIndex:
        read.append(Path(path).stem)
        return read_index(path)

    plane = ControlPlane(rank, size, 60.0)
    plane.enter(gather_at(Path(point), rank, size))
    try:
        seen = survey(cast(Any, plane), look, header, host_key())
        sees = seen.sees and {key: sorted(ranks) for key, ranks in seen.sees.items()}
        told = {"sees": sees, "keys": sorted(seen.indexes), "read": read, "hosts": seen.hosts}
    except CheckpointError as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    plane.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
