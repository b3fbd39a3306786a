"""How a load into networks is to be made, as its caller says; and what a rank did then."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Optional, Union

from ms_ckpt_ext._version import __version__
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, integer
from ms_ckpt_ext.storage.reader import ReadCount

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import Digest

_MODES = ("auto", "direct", "cooperative")
VERIFY = ("none", "replicas", "full")


class LoadOptions:
    """How a load is to be made.

    Attributes:
        mode: "direct": every rank reads its own bytes, and nobody communicates. "cooperative": every byte is read by
            one rank and exchanged, over HCCL or, on the CPU, MCCL. "auto": the cheaper of the two by the cost model.
        bucket_bytes: staging memory of a rank for one round of a cooperative load; None for what fits: on a
            device three times HCCL_BUFFSIZE, an eighth of what the Parameters leave at most; else 64 MiB.
        prefetch: rounds that are read ahead.
        threads: reading threads of a rank.
        verify: "none"; "replicas": compare digests, made during the load, of the same region on several ranks; "full":
            also compare what is stored with the digests in `ms_ckpt_ext.digests.json`, before anything is changed, at
            the cost of one more read of every wanted byte over all ranks together.
        trace: path of a Chrome trace of a cooperative load to write; "" for none.
        timeout: seconds that one exchange between ranks may last.
        host: name of this rank's host; ranks of a host see the same files.
        hardware: profile of the machine for mode "auto" and the way of an exchange, by name or path of a file (see
            `ms-ckpt measure`); "" for the one that fits.

    Raises:
        UsageError: at birth, when one of them is none that there is, or too small.
        ArgumentTypeError: `timeout` is no number, or `hardware` neither a name nor a path.
        StorageError: the profile cannot be read.
    """

    def __init__(
        self,
        mode: str = "auto",
        bucket_bytes: Optional[int] = None,
        prefetch: int = 1,
        threads: int = 2,
        verify: str = "none",
        trace: str = "",
        timeout: float = 600.0,
        host: str = "",
        hardware: Union[str, os.PathLike[str]] = "",
    ) -> None:
        for name, value, allowed in (("mode", mode, _MODES), ("verify", verify, VERIFY)):
            if value not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if type(timeout).__name__ in ("bool", "bool_") or not hasattr(timeout, "__float__"):
            raise ArgumentTypeError(
                f"timeout must be a number of seconds, got {type(timeout).__name__} {timeout!r:.60}"
            )
        if not timeout > 0:
            raise UsageError(f"timeout must be above 0 seconds, got {timeout}")
        self.mode, self.verify, self.trace, self.host, self.hardware = mode, verify, trace, host, _hardware(hardware)
        self.bucket_bytes = None if bucket_bytes is None else integer(bucket_bytes, "bucket_bytes", 4096)
        self.prefetch = integer(prefetch, "prefetch", 0)
        self.threads, self.timeout = integer(threads, "threads", 1), float(min(timeout, 1e300))

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        return {"code version": __version__, "mode": self.mode, "bucket_bytes": str(self.bucket_bytes)} | {
            "verify": self.verify,
            "trace": str(bool(self.trace)),
        }


def _hardware(named: Union[str, os.PathLike[str]]) -> str:
    """The name or path of a profile that exists."""
    if not isinstance(named, (str, os.PathLike)):
        raise ArgumentTypeError(f"hardware must be a profile's name or path, got {type(named).__name__} {named!r:.60}")
    if name := os.fspath(named):
        from ms_ckpt_ext.engine.load.profiles import profile

        profile(name)
    return name


class LoadReport(NamedTuple):
    """What one rank did.

    Attributes:
        mode: "direct" or "cooperative".
        reads: what it read.
        bytes_received: from other ranks.
        rounds: of exchange.
        digests: of its slices by number of the demand, if they were asked for.
    """

    mode: str
    reads: ReadCount
    bytes_received: int = 0
    rounds: int = 0
    digests: Mapping[int, Digest] = MappingProxyType({})

    def __str__(self) -> str:
        read = f"{self.reads.nbytes} bytes in {self.reads.reads} reads"
        return f"{self.mode}: {read}, {self.bytes_received} bytes received in {self.rounds} rounds"
