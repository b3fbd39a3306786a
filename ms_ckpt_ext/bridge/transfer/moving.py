"""A transfer that was planned, run as often as wanted: Parameters give and take what they hold at the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ms_ckpt_ext.bridge.match import Match
from ms_ckpt_ext.bridge.memory import contents_of, kept_on_host, on_device
from ms_ckpt_ext.bridge.request import half_done
from ms_ckpt_ext.bridge.together import mover_of, sinks_of
from ms_ckpt_ext.bridge.transfer.asked import TransferRequest
from ms_ckpt_ext.bridge.transfer.matching import Matching
from ms_ckpt_ext.bridge.transfer.overlap import refuse_overlaps, stays
from ms_ckpt_ext.bridge.transfer.sides import plain
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.exchange.demand import LocalPiece
from ms_ckpt_ext.engine.load.replicas import Digester, compare_replicas
from ms_ckpt_ext.engine.load.run_exchange import ExchangeRun, turns_of
from ms_ckpt_ext.engine.transfer.holdings import Holdings
from ms_ckpt_ext.engine.transfer.prepare import PreparedTransfer
from ms_ckpt_ext.engine.transfer.report import TransferReport
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.transport.agree import on_all
from ms_ckpt_ext.transport.base import Transport


class PlannedMove:
    """A transfer, planned on this rank: `run` moves the present values.

    Attributes:
        report: what every run moves on this rank.
    """

    def __init__(
        self,
        transport: Transport[Any],
        request: TransferRequest,
        source: Mapping[str, Any],
        matching: Matching,
        ready: PreparedTransfer,
    ) -> None:
        self._transport, self._request, self._ready = transport, request, ready
        self.changes = tuple(match.parameter.name for match in matching.matches)
        turns = turns_of(ready.plan, transport.rank)
        given = {ready.addresses.at(ready.plan.chunks[n].extents[0].offset).name for t in turns for n in t.chunks}
        numbered = _numbered(ready, matching, transport.rank)
        pieces: dict[int, list[LocalPiece]] = {}
        for piece in ready.local:
            pieces.setdefault(piece.demand, []).append(piece)
        self._idle = {n: match for n, match in numbered.items() if stays(match, pieces.get(n, ()), source)}
        self._filled = {n: match for n, match in numbered.items() if n not in self._idle}
        local = [piece for piece in ready.local if piece.demand not in self._idle]
        self._read = {name: source[name] for name in sorted(given | {piece.name for piece in local})}
        holdings = Holdings(ready.plan, turns, ready.addresses, local, self._bytes_of)
        self._run = ExchangeRun(ready.plan, turns, transport, mover_of(transport), holdings, 0, Trace())
        self._kept: frozenset[int] = frozenset()
        self._scalars: dict[str, Any] = {}
        received = ready.plan.bytes_received()[transport.rank]
        moved = ready.bytes_local, ready.bytes_sent(transport.rank), received, len(ready.plan.rounds)
        self.report = TransferReport(len(matching.matches), matching.missing, matching.unused, *moved)

    def run(self, offloaded: bool = False) -> TransferReport:
        """Move. Collective.

        Args:
            offloaded: the Parameters of both sides come to the device for it, and leave it again.

        Raises:
            UsageError: Parameters of both sides share memory; nothing was moved.
            LoadError: it stopped on the way; `changed` names the Parameters of this rank that may hold new bytes.
            ChecksumError: verify, and ranks hold different bytes of one region afterwards.
            PeerError, TransportError: another rank refused, or is gone; nothing was moved.
        """
        written = [match.parameter for match in self._filled.values()]
        if on_device() and (offloaded or self._request.load_target):
            _load([*written, *(self._read.values() if offloaded else ())])
        sinks = on_all(self._transport, lambda: self._begin(written))
        verify = self._request.options.verify
        try:
            if verify == "none":
                self._run.go(sinks)
            else:
                with Digester() as digester:
                    for number, match in self._idle.items():
                        digester.add(number, contents_of(match.parameter))
                    self._run.go(sinks, digester)
                    compare_replicas(self._transport, self._ready.demands, digester.wait())
        except Exception as error:
            raise half_done(error, self.changes, "transfer", "run it again") from error
        if on_device() and (offloaded or self._request.offload_source):
            for parameter in (*self._read.values(), *(written if offloaded else ())):
                plain(parameter)._offload()
        return self.report

    def _begin(self, written: Sequence[Any]) -> dict[int, Any]:
        """The sinks of this run. Where Parameters lie may have changed since the last."""
        for name, parameter in self._read.items():
            if getattr(parameter, "is_meta", False):
                raise UsageError(f"parameter {name!r} of the source is a meta Parameter, which has no contents")
            if parameter.has_init:
                parameter.init_data()
        refuse_overlaps(written, self._read)
        self._kept = kept_on_host([*self._read.values()]) if self._transport.traits.on_device else frozenset()
        sink_of = sinks_of(self._transport, written, tell=False)
        return {number: sink_of(match) for number, match in self._filled.items()}

    def _bytes_of(self, name: str) -> Any:
        """What this rank holds under a name, as flat bytes where they are cut."""
        parameter = self._read[name]
        if not self._transport.traits.on_device:
            return np.ascontiguousarray(parameter.asnumpy()).reshape(-1).view(np.uint8)
        if id(parameter) in self._kept:
            return _uploaded(self._transport, parameter)
        if not parameter.shape:
            return self._scalar(name, parameter)
        flat = parameter.view(-1)
        return flat if flat.dtype == ms.int8 else flat.view(ms.int8)

    def _scalar(self, name: str, parameter: Any) -> Any:
        """A copy of a Parameter without axes: MindSpore 2.10.0 crashes where one is seen as bytes."""
        if name not in self._scalars:
            self._scalars[name] = self._transport.allocate(parameter.itemsize)
        buffer = self._scalars[name]
        (buffer if parameter.dtype == ms.int8 else buffer.view(parameter.dtype)).copy_(parameter.view(1))
        return buffer

    def close(self) -> None:
        """Let go of buffers, and leave the other ranks."""
        self._transport.close()


def _load(parameters: Iterable[Any]) -> None:
    """Bring Parameters to the device, unless they have no memory yet."""
    for parameter in parameters:
        if not parameter.has_init:
            plain(parameter)._load()


def _uploaded(transport: Transport[Any], parameter: Any) -> Any:
    """A copy on the device of a Parameter that was offloaded, which goes up from pinned memory."""
    held = np.ascontiguousarray(parameter.asnumpy()).reshape(-1).view(np.uint8)
    buffer, host = transport.allocate(held.nbytes), transport.pinned(held.nbytes)
    host[:] = held
    transport.upload(host, buffer, 0)
    return buffer


def _numbered(ready: PreparedTransfer, matching: Matching, rank: int) -> dict[int, Match]:
    """The demands of this rank by number; a Parameter without elements is none."""
    numbers = ready.numbers(rank)
    return {numbers[m.parameter.name]: m for m in matching.matches if m.parameter.name in numbers}
