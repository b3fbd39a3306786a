"""Probes of stored tensors dealt out to all ranks: each is answered by one that sees its file, and all are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.engine.probes import Alone, Probe, Seen
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.base import Transport

Sees = Optional[Mapping[int, frozenset[int]]]
"""File number -> ranks that can open it; None when all see all."""


class Together:
    """A `Look` of all ranks, which call it with the same probes. `count` says what this rank read.

    Every probe is answered by one rank that sees its file, the bytes of all calls spread evenly. An error on one is
    raised on all.

    Args:
        sees: file number -> ranks that can open it; None when all see all.
    """

    def __init__(self, transport: Transport[Any], catalog: Catalog, sees: Sees) -> None:
        self._transport, self._sees = transport, sees
        self._load = [0] * transport.size
        self._alone = Alone(catalog)
        self.count = self._alone.count

    def __call__(self, probes: Sequence[Probe]) -> list[Seen]:
        mine = self._deal(probes)
        error: Optional[BaseException] = None
        found: list[Seen] = []
        try:
            found = self._alone([probes[number] for number in mine])
        except Exception as problem:  # noqa: BLE001 - shared with all ranks before it is raised
            error = problem
        share_status(self._transport, error)
        told = self._transport.share(json.dumps(list(zip(mine, found))).encode())
        answers = {number: Seen(*seen) for answer in told for number, seen in json.loads(answer)}
        return [answers[number] for number in range(len(probes))]

    def _deal(self, probes: Sequence[Probe]) -> list[int]:
        """The numbers of those that this rank answers."""
        load = self._load
        mine = []
        for number, probe in enumerate(probes):
            able = range(len(load)) if self._sees is None else sorted(self._sees[probe.file])
            rank = min(able, key=lambda each: load[each])
            load[rank] += probe.length
            if rank == self._transport.rank:
                mine.append(number)
        return mine
