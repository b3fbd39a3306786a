"""A load that ranks make together, whatever holds their parameters: agree, plan, exchange, compare.

The steps are collective: every rank calls them in this order, and an error on one is raised on all.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ms_ckpt_ext import log
from ms_ckpt_ext.core.exchange import cost
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, plan_exchange
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.replicas import Digest, Digester
from ms_ckpt_ext.engine.load.run_exchange import Mover, SliceSink, run_exchange
from ms_ckpt_ext.engine.load.survey import Survey, header_digest
from ms_ckpt_ext.engine.load.trace import Trace
from ms_ckpt_ext.engine.load.wants import Want, demands_of, share_wants
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CoverageError
from ms_ckpt_ext.storage.pool import ReadCount, ReaderPool
from ms_ckpt_ext.transport.agree import agree
from ms_ckpt_ext.transport.base import B, Transport

_SHARE_OF_LOAD = 24
"""A chunk is at most this fraction of a rank's fair share of the reading: readers can be balanced within 5 %."""


@dataclass(frozen=True)
class Prepared:
    """A load that all ranks agree on."""

    catalog: Catalog
    demands: tuple[Demand, ...]
    plan: ExchangePlan
    cooperative: bool


@dataclass
class LoadReport:
    """What one rank did, in bytes and calls; digests of its slices by number of the demand, if they were asked for."""

    mode: str
    reads: ReadCount = field(default_factory=ReadCount)
    bytes_received: int = 0
    rounds: int = 0
    digests: dict[int, Digest] = field(default_factory=dict, repr=False)


def prepare(
    transport: Transport[Any],
    seen: Survey,
    catalog: Catalog,
    wants: Mapping[str, Want],
    options: LoadOptions,
    hardware: cost.Hardware,
    more_facts: Mapping[str, str],
) -> Prepared:
    """Agree on the inputs, learn what all ranks want, plan, and choose the mode.

    Raises:
        DisagreementError: ranks were started with different inputs.
        CoverageError: a region that some rank wants is in no file that anyone sees.
    """
    headers = xxhash.xxh3_128("".join(header_digest(index) for index in catalog.files).encode()).hexdigest()
    agree(transport, {**options.facts(), "checkpoint": headers, **more_facts})
    demands = demands_of(catalog, share_wants(transport, wants))
    sees = seen.by_number
    try:
        plan = plan_exchange(
            demands, transport.size, catalog.stored, limits_for(demands, transport.size, options), sees
        )
    except CoverageError as error:
        raise CoverageError(f"{error} (hosts asked: {', '.join(seen.hosts)})") from error
    agree(transport, {"plan": repr((plan.chunks, plan.rounds))})
    return Prepared(catalog, tuple(demands), plan, _cooperative(plan, sees is None, options, hardware))


def limits_for(demands: Sequence[Demand], world: int, options: LoadOptions) -> ExchangeLimits:
    """Chunks of several MiB, smaller where the checkpoint is, so that every reader has several."""
    total = sum(d.tensor.meta.dtype.nbytes(math.prod(d.tensor.meta.shape)) for d in demands)
    chunk = min(ExchangeLimits().chunk, max(1024, total // (world * _SHARE_OF_LOAD)))
    return ExchangeLimits(options.bucket_bytes, chunk)


def _cooperative(plan: ExchangePlan, all_see_all: bool, options: LoadOptions, hardware: cost.Hardware) -> bool:
    if options.mode != "auto" or not all_see_all:
        return options.mode != "direct"
    read, received = plan.bytes_read(), plan.bytes_received()
    figures = (wanted_bytes(plan), read, received, len(plan.rounds))
    together, alone = cost.cooperative_seconds(*figures[1:], hardware), cost.direct_seconds(figures[0], hardware)
    log.info("predicted: direct %.3f s, cooperative %.3f s", alone, together)
    return cost.cooperates(*figures, hardware)


def wanted_bytes(plan: ExchangePlan) -> list[int]:
    """Bytes that every rank wants."""
    totals = [0] * plan.world
    for part in plan.parts:
        for delivery in part.deliveries:
            nbytes = plan.dtype(part).nbytes(delivery.in_part.size)
            for rank in delivery.ranks:
                totals[rank] += nbytes
    return totals


def exchange(
    transport: Transport[B],
    prepared: Prepared,
    mover: Mover[B],
    sinks: Mapping[int, SliceSink[B]],
    readers: ReaderPool,
    options: LoadOptions,
) -> LoadReport:
    """Run a prepared cooperative load, and digest what lands unless `verify` is "none". Raises as `run_exchange`."""
    trace = Trace(transport.rank, bool(options.trace))
    with Digester(trace) as digester:
        digesting = digester if options.verify != "none" else None
        run_exchange(
            prepared.plan, transport, mover, sinks, readers, options.prefetch, options.threads, trace, digesting
        )
        digests = digester.wait()
    if options.trace:
        events = transport.share(zlib.compress(json.dumps(trace.events).encode()))
        if transport.rank == 0:
            Trace.save_all([json.loads(zlib.decompress(part)) for part in events], options.trace)
    received = prepared.plan.bytes_received()[transport.rank]
    return LoadReport("cooperative", readers.count, received, len(prepared.plan.rounds), digests)
