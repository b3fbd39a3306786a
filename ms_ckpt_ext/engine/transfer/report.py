"""What a transfer moves, on one rank."""

from __future__ import annotations

from typing import NamedTuple


class TransferReport(NamedTuple):
    """What one run moves on this rank.

    Attributes:
        parameters: number of parameters that this rank takes.
        missing: Parameters of this rank's target that get nothing.
        unused: names of the source that this rank does not use.
        bytes_local: bytes that this rank takes from its own memory; they do not travel.
        bytes_sent, bytes_received: payload to and from other ranks, in bytes.
        rounds: number of rounds of the exchange.
    """

    parameters: int
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    bytes_local: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    rounds: int = 0

    def __str__(self) -> str:
        return (
            f"{self.parameters} parameters: {self.bytes_local} bytes from this rank, {self.bytes_received} bytes "
            f"received and {self.bytes_sent} sent in {self.rounds} rounds"
        )
