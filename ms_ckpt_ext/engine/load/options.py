"""How a load into networks is to be made, as its caller says; and what a rank did then."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Optional

from ms_ckpt_ext._version import __version__
from ms_ckpt_ext.core.integer import integer
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError
from ms_ckpt_ext.storage.pool import ReadCount

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import Digest

_MODES = ("auto", "direct", "cooperative")
VERIFY = ("none", "replicas", "full")


class LoadOptions:
    """How a load is to be made.

    Attributes:
        mode: "direct": every rank reads its own bytes, nobody communicates. "cooperative": every byte is read by one
            rank and exchanged. "auto": the cheaper of the two by the cost model.
        bucket_bytes: staging memory of a rank for one round; None for what fits the machine.
        prefetch: rounds read ahead.
        threads: reading threads of a rank.
        verify: "none"; "replicas" compares digests between ranks that hold the same region: made during the load,
            compared afterwards; "full" also compares what is stored with the digests on record, before anything is
            changed.
        trace: path of a Chrome trace to write; "" for none.
        timeout: seconds that one exchange may last.
        host: name of this rank's host; ranks of a host see the same files.
        hardware: profile that the cost model takes, by name or path; "" for the one that fits.

    Raises:
        UsageError: at birth, when one of them is none that there is, or too small.
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
        hardware: str = "",
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
        self.mode, self.verify, self.trace, self.host, self.hardware = mode, verify, trace, host, hardware
        self.bucket_bytes = None if bucket_bytes is None else integer(bucket_bytes, "bucket_bytes", 4096)
        self.prefetch = integer(prefetch, "prefetch", 0)
        self.threads, self.timeout = integer(threads, "threads", 1), float(min(timeout, 1e300))

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        return {"code version": __version__, "mode": self.mode, "bucket_bytes": str(self.bucket_bytes)} | {
            "verify": self.verify,
            "trace": str(bool(self.trace)),
        }


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
