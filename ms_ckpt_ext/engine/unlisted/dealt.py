"""Reading dealt out to all ranks: every file is read by ranks that see it, and all ranks get what was found.

For comparisons before a load: each answer is found by one rank, so all ranks together read what one alone would.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Optional

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.engine.integrity.contents import Seen
from ms_ckpt_ext.engine.load.hosts import Work, deal
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.alike import OnRecord, recorded
from ms_ckpt_ext.engine.unlisted.whole_slices import Alone, Probe
from ms_ckpt_ext.transport.agree import NATURAL, numbered, told_by_all
from ms_ckpt_ext.transport.base import Transport

_SEEN = (str, bool, NATURAL, NATURAL)
"""The form of a `Seen`: see `transport.agree.JsonForm`."""


def _seen(told: Sequence[tuple[int, Sequence[Any]]]) -> list[tuple[int, Seen]]:
    """What a rank told of probes, by their numbers."""
    return [(number, Seen(*each)) for number, each in told]


class Together:
    """A `Look` of all ranks, which call it with the same probes. `count` is what this rank read.

    Every probe is answered by one rank that sees its file, with the bytes of all calls spread evenly. An error on one
    rank is raised on all.

    Args:
        sees: file number -> ranks that can open it; None when all see all.
    """

    def __init__(self, transport: Transport[Any], catalog: Catalog, sees: Optional[Sees]) -> None:
        self._transport, self._sees = transport, sees
        self._load = [0] * transport.size
        self._alone = Alone(catalog)
        self.count = self._alone.count

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        mine = self._mine(probes)

        def look() -> list[tuple[int, Seen]]:
            return list(zip(mine, self._alone([probes[n] for n in mine])))

        return numbered(told_by_all(self._transport, look, [(NATURAL, _SEEN)], _seen), len(probes))

    def _mine(self, probes: Sequence[Probe]) -> list[int]:
        """The numbers of the probes that this rank answers."""
        ranks = deal([Work(probe.file, probe.length) for probe in probes], self._load, self._sees)
        return [number for number, rank in enumerate(ranks) if rank == self._transport.rank]


def on_record_together(
    transport: Transport[Any], catalog: Catalog, sees: Optional[Sees], names: Collection[str]
) -> OnRecord:
    """Finds digests on record of tensors that the files store under these names; one rank looks for each file's."""

    def on_record(files: Sequence[int]) -> Mapping[int, Mapping[str, str]]:
        ranks = deal([Work(file, 1) for file in files], [0] * transport.size, sees)
        mine = [file for file, rank in zip(files, ranks) if rank == transport.rank]

        def look() -> list[tuple[int, dict[str, str]]]:
            return [(f, {n: held[n] for n in names if n in held}) for f, held in recorded(catalog, mine).items()]

        return dict(chain.from_iterable(told_by_all(transport, look, [(NATURAL, {str: str})])))

    return on_record
