"""How long a control plane waits, and how much it holds: one value for all of it, told to who keeps to it."""

from __future__ import annotations

from typing import NamedTuple

PULSES = 15
"""So many without a sign of life are too many."""


class ControlLimits(NamedTuple):
    """Bounds that do not depend on the job; how long ranks wait for each other is `timeout`, which users give.

    Attributes:
        connect_seconds: how long a rank tries to reach the hub.
        greeting_seconds: within which a connection to a hub has to say who it is.
        vanished_seconds: of silence, or for which it does not acknowledge what it is sent, after which a host counts as
            out of reach. What is sent in the silence begins the time anew, once.
        stopped_seconds: within which a process is given up whose connection stands, and which answers nothing: it was
            stopped, or does not let its threads run.
        stopped_rank_seconds: as much more for each rank of the job. A hub whose process computes has to wait for its
            turn (5 ms in Python) after each thing that it sends or receives.
        slack_seconds: by which a hub may miss its own timeout before it counts as stopped.
        grace_seconds: to wait for threads that are about to end, and for news that are about to come.
        strangers: connections that have not said who they are, beside those of the ranks that are still to come.
        share_bytes: what the answers to one share may be in sum over all ranks. What is more goes by the backend, where
            no process sends it more than once.
        least_answer: bytes of an answer that the hub gives to however many ranks: an error's message, who failed.
    """

    connect_seconds: float = 20.0
    greeting_seconds: float = 10.0
    vanished_seconds: float = 15.0
    stopped_seconds: float = 60.0
    stopped_rank_seconds: float = 0.04
    slack_seconds: float = 3.0
    grace_seconds: float = 2.0
    strangers: int = 128
    share_bytes: int = 16 << 20
    least_answer: int = 8 << 10

    def stopped_within(self, size: int) -> float:
        """Seconds until a stopped process is given up, in a job of `size` ranks."""
        return self.stopped_seconds + self.stopped_rank_seconds * size

    def pulse_seconds(self, size: int) -> float:
        """How often a process looks for who says nothing; a hub asks those for a sign of life.

        >>> [round(ControlLimits().pulse_seconds(size), 1) for size in (4, 1024, 8192)]
        [4.0, 6.7, 25.8]
        """
        return self.stopped_within(size) / PULSES

    def answer_bytes(self, size: int) -> int:
        """The longest answer of a hub to `size` ranks."""
        return max(self.least_answer, self.share_bytes // size)

    def longest_answer(self, size: int) -> int:
        """Bytes of an answer with all that stands around it: which payload each rank has, compressed."""
        return self.answer_bytes(size) + 8 * size + 1024

    def told_bytes(self, size: int) -> int:
        """The longest payload that a rank sends unasked; of a longer one it sends a digest.

        >>> [ControlLimits().told_bytes(size) for size in (4, 64, 1024, 8192)]
        [1048576, 4096, 64, 64]
        """
        return max(64, self.answer_bytes(size) // size)


DEFAULT = ControlLimits()
