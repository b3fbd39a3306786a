"""A transfer that was planned, run as often as wanted: Parameters give and take what they hold at the time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Optional, Union

import numpy as np

from ms_ckpt_ext.bridge.match import Match, mindspore_dtype
from ms_ckpt_ext.bridge.memory import contents_of, host_bytes, kept_on_host, on_device
from ms_ckpt_ext.bridge.request import half_done
from ms_ckpt_ext.bridge.together import mover_of, sinks_of
from ms_ckpt_ext.bridge.transfer.asked import TransferRequest
from ms_ckpt_ext.bridge.transfer.matching import Matching
from ms_ckpt_ext.bridge.transfer.overlap import refuse_overlaps, stays
from ms_ckpt_ext.bridge.transfer.present import PlannedParameter, present_source, present_target, refuse_parted
from ms_ckpt_ext.bridge.transfer.sides import plain, side_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.exchange.demand import LocalPiece
from ms_ckpt_ext.core.exchange.one_rank import turns_of
from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DTYPES
from ms_ckpt_ext.engine.load.replicas import Digester, compare_replicas
from ms_ckpt_ext.engine.load.run_exchange import ExchangeRun
from ms_ckpt_ext.engine.transfer.compared import TakenSlice, compare_with_source
from ms_ckpt_ext.engine.transfer.holdings import Holdings
from ms_ckpt_ext.engine.transfer.prepare import PreparedTransfer
from ms_ckpt_ext.engine.transfer.report import TransferReport
from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.transport.agree import on_all
from ms_ckpt_ext.transport.base import Bytes, Transport


class PlannedMove:
    """A transfer, planned on this rank: `run` moves the present values.

    Attributes:
        changes: names of the Parameters that a run writes on this rank.
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
        turns = turns_of(ready.plan, transport.rank)
        given = {ready.addresses.at(ready.plan.chunks[n].extents[0].offset).name for t in turns for n in t.chunks}
        numbered = _numbered(ready, matching, transport.rank)
        pieces: dict[int, list[LocalPiece]] = {}
        for piece in ready.local:
            pieces.setdefault(piece.demand, []).append(piece)
        self._idle = {n: match for n, match in numbered.items() if stays(match, pieces.get(n, ()), source)}
        self._filled = {n: match for n, match in numbered.items() if n not in self._idle}
        local = [piece for piece in ready.local if piece.demand not in self._idle]
        self._stay = {match.parameter.name: pieces[n][0].name for n, match in self._idle.items()}
        read = given | {piece.name for piece in local}
        if request.options.verify == "full":
            read |= {stored.stored_name for d in ready.demands for stored in d.tensor.stored()} & source.keys()
        self._source = source
        self._read = {name: source[name] for name in sorted(read)}
        self._planned = {name: PlannedParameter.of(parameter) for name, parameter in self._read.items()}
        holdings = Holdings(ready.plan, turns, ready.addresses, local, self._bytes_of)
        self._run = ExchangeRun(ready.plan, turns, transport, mover_of(transport), holdings, 0, Trace())
        self._kept: frozenset[int] = frozenset()
        self._scalars: dict[str, Any] = {}
        self.changes = tuple(match.parameter.name for match in self._filled.values())
        received = ready.plan.bytes_received()[transport.rank]
        moved = ready.bytes_local, ready.bytes_sent(transport.rank), received, len(ready.plan.rounds)
        self.report = TransferReport(len(matching.matches), matching.missing, matching.unused, *moved)

    def run(self, offloaded: bool = False) -> TransferReport:
        """Move. Collective.

        Args:
            offloaded: the Parameters of both sides come to the device for it, and leave it again.

        Raises:
            UsageError, LayoutMismatchError: Parameters of both sides share memory, or are not as they were when the
                transfer was planned; nothing was moved.
            LoadError: it stopped on the way; `changed` names the Parameters of this rank that may hold new bytes.
            PeerError, TransportError: another rank refused, or is gone; nothing was moved.
        """
        if not self._run.in_step:
            raise TransportError(
                f"rank {self._transport.rank}: an earlier run of this plan was cut off on this rank, maybe in the "
                "middle of an exchange of the others: close the plan on all ranks and plan anew"
            )
        wanted: Union[Digester, nullcontext[None]] = (
            Digester() if self._request.options.verify == "replicas" else nullcontext()
        )
        with wanted as digester:
            sinks = on_all(self._transport, lambda: self._begin(offloaded, digester))
            try:
                self._run.go(sinks, digester)
                self._verify(digester)
            except Exception as error:
                if not self._run.in_step:
                    self._transport.close()  # so that the others hear of it
                raise half_done(error, self.changes, "transfer", "run it again") from error
            except BaseException:
                self._transport.close()
                raise
        self._offload(offloaded)
        return self.report

    def _begin(self, offloaded: bool, digester: Optional[Digester]) -> dict[int, Any]:
        """The sinks of this run. Parameters, and where they lie, may be others than in the last."""
        self._look()
        written = [match.parameter for match in self._filled.values()]
        if on_device() and (offloaded or self._request.load_target):
            _load([*written, *(self._read.values() if offloaded else ())])
        for parameter in self._read.values():
            if parameter.has_init:
                parameter.init_data()
        refuse_overlaps(written, self._read)
        self._kept = kept_on_host([*self._read.values()]) if self._transport.traits.on_device else frozenset()
        if digester is not None:
            for number, match in self._idle.items():
                digester.add(number, contents_of(match.parameter))
        sink_of = sinks_of(self._transport, written, tell=False)
        return {number: sink_of(match) for number, match in self._filled.items()}

    def _look(self) -> None:
        """Find the Parameters again by their names. Raises as the functions of `present`."""
        source, target = self._request.source, self._request.target
        if source is not None:
            self._source = side_of(source.parameters, "source") or {}
            self._read = {name: present_source(name, self._source, each) for name, each in self._planned.items()}
        if target is not None:
            taking = side_of(target.parameters, "target") or {}
            if source is not None:
                refuse_parted(self._source, taking, self._stay)
            self._filled = {number: present_target(match, taking) for number, match in self._filled.items()}

    def _offload(self, offloaded: bool) -> None:
        if on_device() and (offloaded or self._request.offload_source):
            written = (match.parameter for match in self._filled.values())
            for parameter in (*self._source.values(), *(written if offloaded else ())):
                plain(parameter)._offload()

    def _verify(self, digester: Optional[Digester]) -> None:
        """Compare what was filled. Raises ChecksumError, PeerError."""
        if digester is not None:
            compare_replicas(self._transport, self._ready.demands, digester.wait())
        if self._request.options.verify == "full":
            compare_with_source(self._transport, self._ready.demands, self._taken, self._held)

    def _taken(self, number: int) -> TakenSlice:
        """What this rank holds now of a demand."""
        parameter = (self._filled.get(number) or self._idle[number]).parameter
        return TakenSlice(BY_MINDSPORE[str(parameter.dtype)].name, host_bytes(parameter))

    def _held(self, name: str, dtype: str) -> Bytes:
        """What this rank gives under a name, cast."""
        return host_bytes(self._read[name], mindspore_dtype(DTYPES[dtype]))

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
    """The demands of this rank by number; a Parameter without elements has none."""
    numbers = ready.numbers(rank)
    return {numbers[m.parameter.name]: m for m in matching.matches if m.parameter.name in numbers}
