"""The slices of this rank, as the source of an exchange: nothing is read, a chunk is a stretch of a Parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Generic

from ms_ckpt_ext.core.exchange.demand import LocalPiece
from ms_ckpt_ext.core.exchange.one_rank import RankRound
from ms_ckpt_ext.core.exchange.plan import ExchangePlan
from ms_ckpt_ext.engine.load.slabs import Staged
from ms_ckpt_ext.engine.transfer.addresses import Addresses
from ms_ckpt_ext.transport.base import B


class Holdings(Generic[B]):
    """See `engine.load.run_exchange.ByteSource`.

    Args:
        turns: this rank's side of every round.
        local: what it takes from its own memory.
        open_slice: returns what it holds under a name, as flat bytes; called anew in every run, as its place may
            change. The result is released when no later round needs it.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        turns: Sequence[RankRound],
        addresses: Addresses,
        local: Sequence[LocalPiece],
        open_slice: Callable[[str], B],
    ) -> None:
        self._turns, self._open_slice, self.local = turns, open_slice, tuple(local)
        mine = {chunk for turn in turns for chunk in turn.chunks}
        self._at = {chunk: addresses.at(plan.chunks[chunk].extents[0].offset) for chunk in mine}
        last_use = plan.last_use()
        last = dict.fromkeys((piece.name for piece in local), 0)
        for chunk in mine:
            name = self._at[chunk].name
            last[name] = max(last.get(name, 0), last_use[chunk])
        self._until: dict[int, list[str]] = {}
        for name, number in last.items():
            self._until.setdefault(number, []).append(name)
        self._open: dict[str, B] = {}

    def start(self, number: int) -> None:
        """Nothing is read."""

    def stage(self, number: int) -> None:
        """Open the slices that the round reads."""
        for chunk in self._turns[number].chunks:
            self.held(self._at[chunk].name)

    def __getitem__(self, chunk: int) -> Staged[B]:
        """Where a chunk lies."""
        name, offset = self._at[chunk]
        return Staged(self.held(name), offset)

    def held(self, name: str) -> B:
        """What this rank holds under a name."""
        if name not in self._open:
            self._open[name] = self._open_slice(name)
        return self._open[name]

    def release(self, number: int) -> None:
        """Release what no later round needs."""
        for name in self._until.get(number, ()):
            self._open.pop(name, None)

    def close(self) -> None:
        """Release everything."""
        self._open.clear()
