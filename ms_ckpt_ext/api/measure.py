"""Measure a machine, and write a profile that plans and loads take."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any, Optional

from ms_ckpt_ext.api.arguments import PathLike, checked_words, path_of
from ms_ckpt_ext.engine.load.measure import measure_machine, profile_of
from ms_ckpt_ext.errors import ArgumentTypeError, StorageError, UsageError, storage_error
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.select import HOST_VARIABLE, select_transport


def measure(
    src: PathLike, dst: PathLike, *, seconds: float = 6.0, device_target: Optional[str] = None
) -> dict[str, Any]:
    """Read, upload and exchange for some seconds, and write what was measured as a hardware profile.

    Collective in a job of several ranks, started by msrun: it joins the communication if that is not initialised. A
    single process measures only reading.

    Args:
        src: a directory of large files, such as a checkpoint, on the storage that loads will read from.
        dst: the profile to write, a `.json` file; rank 0 writes it. Give its path as `hardware` or in
            MS_CKPT_EXT_HARDWARE.
        seconds: about how long all steps take together.
        device_target: "Ascend" or "CPU" where this call joins the communication; default: what MindSpore is set to.

    Returns:
        The profile.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments.
        DiscoveryError: `src` has no large files.
        StorageError: a file cannot be read, or the profile not written.
        PeerError, TransportError: another rank failed, or is gone.
    """
    checked_words(measure, locals())
    folder, path = path_of(src, "src"), path_of(dst, "dst")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ArgumentTypeError(f"seconds must be a number, got {seconds!r:.60}")
    if not 0 < seconds < 3600:
        raise UsageError(f"seconds must be above 0 and below 3600, got {seconds}")
    if not path.endswith(".json"):
        raise UsageError(f"dst must be a .json file, got {path!r}")
    if "MS_ROLE" in os.environ:  # msrun's scheduler runs the same program, and serves when it joins
        from ms_ckpt_ext.bridge.world import join_job

        join_job(device_target)
    transport = select_transport()
    try:
        host = os.environ.get(HOST_VARIABLE) or socket.gethostname()
        found = measure_machine(transport, folder, host, float(seconds))
        described = profile_of(found, time.strftime("%Y-%m-%d"))
        share_status(transport, _write(path, described) if transport.rank == 0 else None)
    finally:
        transport.close()
    return described


def _write(path: str, described: dict[str, Any]) -> Optional[StorageError]:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(described, file, indent=1)
            file.write("\n")
    except OSError as error:
        return storage_error("write hardware profile", path, error)
    return None
