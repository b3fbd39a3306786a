"""Reading dealt out to all ranks: every file is looked into by ranks that see it, and all are told what was found.

For what is compared before a load: each answer is found by one rank, so it costs the job as much as one process alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Optional

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.alike import OnRecord, recorded
from ms_ckpt_ext.engine.unlisted.probes import Alone, Probe, Seen
from ms_ckpt_ext.transport.agree import told_by_all
from ms_ckpt_ext.transport.base import Transport

_TOGETHER = 1 << 20
"""Bytes up to which probes of one file go to one rank, which opens it once."""


class Together:
    """A `Look` of all ranks, which call it with the same probes. `count` says what this rank read.

    Every probe is answered by one rank that sees its file, the bytes of all calls spread evenly. An error on one is
    raised on all.

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
        found = told_by_all(self._transport, lambda: list(zip(mine, self._alone([probes[n] for n in mine]))))
        answers = {number: Seen(*seen) for answer in found for number, seen in answer}
        return [answers[number] for number in range(len(probes))]

    def _mine(self, probes: Sequence[Probe]) -> list[int]:
        """The numbers of the probes that this rank answers."""
        mine: list[int] = []
        for file, numbers in _bundles(probes):
            able = range(len(self._load)) if self._sees is None else sorted(self._sees[file])
            rank = min(able, key=self._load.__getitem__)
            self._load[rank] += sum(probes[number].length for number in numbers)
            mine += numbers if rank == self._transport.rank else []
        return mine


def _bundles(probes: Sequence[Probe]) -> Iterator[tuple[int, list[int]]]:
    """(file, numbers of probes of it) that one rank answers."""
    open_: dict[int, tuple[list[int], int]] = {}
    for number, probe in enumerate(probes):
        numbers, nbytes = open_.pop(probe.file, ([], 0))
        numbers.append(number)
        if nbytes + probe.length < _TOGETHER:
            open_[probe.file] = numbers, nbytes + probe.length
        else:
            yield probe.file, numbers
    for file, (numbers, _) in open_.items():
        yield file, numbers


def on_record_together(
    transport: Transport[Any], catalog: Catalog, sees: Optional[Sees], names: Collection[str]
) -> OnRecord:
    """Digests on record of tensors that the files store under these names, each file's found by one rank."""

    def on_record(files: Sequence[int]) -> Mapping[int, Mapping[str, str]]:
        ranks = range(transport.size)
        able = {file: ranks if sees is None else sorted(sees[file]) for file in files}
        mine = [file for n, file in enumerate(files) if able[file][n % len(able[file])] == transport.rank]

        def look() -> list[tuple[int, dict[str, str]]]:
            return [(f, {n: held[n] for n in names if n in held}) for f, held in recorded(catalog, mine).items()]

        return {file: held for answer in told_by_all(transport, look) for file, held in answer}

    return on_record
