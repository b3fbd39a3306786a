"""How long a control plane waits, and how much it holds: one value for all of it, told to who keeps to it."""

from __future__ import annotations

from typing import NamedTuple


class ControlLimits(NamedTuple):
    """Bounds that do not depend on the job; how long ranks wait for each other is `timeout`, which users give.

    Attributes:
        connect_seconds: how long a rank tries to reach the hub.
        greeting_seconds: within which a connection to a hub has to say who it is.
        vanished_seconds: after which a host that does not acknowledge what it is sent counts as out of reach. Something
            is sent two pulses after its last word at the latest.
        stopped_seconds: within which a process is given up whose connection stands, and which answers nothing: it was
            stopped, or does not let its threads run.
        slack_seconds: by which a hub may miss its own timeout before it counts as stopped.
        grace_seconds: to wait for threads that are about to end, and for news that are about to come.
        strangers: connections that have not said who they are, beside those of the ranks that are still to come.
        share_bytes: what the answers to one share may be in sum over all ranks. What is more goes by the backend, where
            no process sends it more than once.
        least_answer: bytes of an answer that the hub gives to however many ranks: an error's message, who failed.
    """

    connect_seconds: float = 20.0
    greeting_seconds: float = 10.0
    vanished_seconds: float = 20.0
    stopped_seconds: float = 60.0
    slack_seconds: float = 3.0
    grace_seconds: float = 2.0
    strangers: int = 128
    share_bytes: int = 16 << 20
    least_answer: int = 8 << 10

    @property
    def pulse_seconds(self) -> float:
        """How often a process looks for who says nothing, to ask it for a sign of life."""
        return min(self.vanished_seconds, self.stopped_seconds) / 5

    @property
    def pulses(self) -> int:
        """How many may go by without a sign of life.

        >>> ControlLimits().pulse_seconds, ControlLimits().pulses
        (4.0, 15)
        """
        return round(self.stopped_seconds / self.pulse_seconds)

    def answer_bytes(self, size: int) -> int:
        """The longest answer of a hub to `size` ranks."""
        return max(self.least_answer, self.share_bytes // size)

    def told_bytes(self, size: int) -> int:
        """The longest payload that a rank sends unasked; of a longer one it sends a digest.

        >>> [ControlLimits().told_bytes(size) for size in (4, 64, 1024, 8192)]
        [1048576, 4096, 64, 64]
        """
        return max(64, self.answer_bytes(size) // size)


DEFAULT = ControlLimits()
