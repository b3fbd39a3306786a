"""How long a control plane waits, and how much it holds: one value, passed to all of its parts."""

from __future__ import annotations

from typing import NamedTuple

PULSES = 15
"""After this many without a sign of life, a process is given up."""


class ControlLimits(NamedTuple):
    """Bounds that do not depend on the job; how long ranks wait for each other is `timeout`, which users give.

    Attributes:
        connect_seconds: how long a rank tries to reach the hub.
        greeting_seconds: how soon a connection to a hub has to say who it is.
        vanished_seconds: a host that is silent, or acknowledges nothing, for so long counts as out of reach. Sending
            during the silence restarts the time, once.
        stopped_seconds: a process whose connection stands, but which answers nothing, is given up after so long: it was
            stopped, or does not let its threads run.
        stopped_rank_seconds: additional time for each rank of the job. A hub whose process computes has to wait for its
            turn (5 ms in Python) after each message that it sends or receives.
        slack_seconds: how much a hub may exceed its own timeout before it counts as stopped.
        grace_seconds: how long to wait for threads that are about to end, and for news about to arrive.
        strangers: how many connections may not have said who they are, besides those of ranks still to come.
        share_bytes: most bytes of the answers to one share, summed over all ranks. Larger ones go over the backend,
            where no process sends them more than once.
        least_answer: bytes of an answer that the hub sends to any number of ranks: an error's message, who failed.
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
        """How often a process looks for silent peers; a hub asks those for a sign of life.

        >>> [round(ControlLimits().pulse_seconds(size), 1) for size in (4, 1024, 8192)]
        [4.0, 6.7, 25.8]
        """
        return self.stopped_within(size) / PULSES

    def answer_bytes(self, size: int) -> int:
        """The longest answer of a hub to `size` ranks."""
        return max(self.least_answer, self.share_bytes // size)

    def longest_answer(self, size: int) -> int:
        """Bytes of an answer with what surrounds it: which payload each rank has, compressed."""
        return self.answer_bytes(size) + 8 * size + 1024

    def told_bytes(self, size: int) -> int:
        """The longest payload that a rank sends unasked; of a longer one it sends a digest.

        >>> [ControlLimits().told_bytes(size) for size in (4, 64, 1024, 8192)]
        [1048576, 4096, 64, 64]
        """
        return max(64, self.answer_bytes(size) // size)


DEFAULT = ControlLimits()
