"""A checkpoint into the Cells of all ranks at once: survey, match, agree, exchange, compare.

Collective: every rank of the job calls it. An error on one rank, whatever it was, is raised on all of them; before the
first round nothing is changed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, NoReturn, Optional, TypeVar

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Match
from ms_ckpt_ext.bridge.memory import ParameterSink
from ms_ckpt_ext.bridge.network import fill_matches, half_done, prove_matches, tell_loaded
from ms_ckpt_ext.bridge.settle import Manner, boxes, matched, open_names
from ms_ckpt_ext.core.geometry.layout import whole
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.core.planning.weight_rules import Rule
from ms_ckpt_ext.engine.integrity.authenticate import prove_chunks
from ms_ckpt_ext.engine.integrity.recorded import audit, settled
from ms_ckpt_ext.engine.load import profiles, session
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.replicas import Digest, Digester, SliceBytes, compare_replicas
from ms_ckpt_ext.engine.load.run_exchange import HostMover
from ms_ckpt_ext.engine.load.session import LoadReport, Prepared
from ms_ckpt_ext.engine.load.survey import Survey, pack, survey, unpack
from ms_ckpt_ext.engine.load.wants import Want
from ms_ckpt_ext.engine.source.catalog import Catalog, catalog_of, folder_catalog
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.engine.unlisted.dealt import Together, on_record_together
from ms_ckpt_ext.engine.unlisted.proven import Compare, ruled, tell_unseen
from ms_ckpt_ext.engine.unlisted.taking import Taking, all_side_by_side
from ms_ckpt_ext.engine.unlisted.tied import warn_unlike
from ms_ckpt_ext.engine.unlisted.whole_slices import refuse_gathered
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, LoadError
from ms_ckpt_ext.formats.discovery.mindformers import Folder
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_index
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.transport.agree import share_status
from ms_ckpt_ext.transport.base import Transport
from ms_ckpt_ext.transport.select import HOST_VARIABLE, select_transport

_T = TypeVar("_T")


class SharedSource(NamedTuple):
    """A checkpoint that ranks look at together.

    Attributes:
        look: lists its files on this host.
        strategy: the strategy that cut it; None for a merged one.
        access: how its files are opened.
        rules: weight rules that make the network's parameters of what the files hold.
        naming: how these are called in the network.
        expected: files that were named one by one, by key: some host must see each.
        allow_equal_slices: slices that are all equal are meant, see `engine.unlisted.whole_slices`.
        listed: see `settle.Manner`.
    """

    look: Callable[[], Listing]
    strategy: Optional[Strategy]
    access: Access = PLAIN
    rules: tuple[Rule, ...] = ()
    naming: Naming = Naming()
    expected: Mapping[str, str] = MappingProxyType({})
    allow_equal_slices: bool = False
    listed: bool = False

    def named(self, stored: Catalog, compare: Compare = compared) -> Catalog:
        """What is stored, with the rules applied, by its names in the network; `compare` as in `proven.ruled`."""
        return self.naming.of(ruled(stored, self.rules, compare))

    def stored(self, seen: Survey) -> Catalog:
        """What the ranks saw."""
        for key, path in self.expected.items():
            if key not in seen.indexes:
                raise DiscoveryError(
                    f"no host sees the file of rank {key} in checkpoint_filenames, {path!r} (asked: "
                    f"{', '.join(seen.hosts)}); check the path, or copy it to one of the hosts"
                )
        folder = None if seen.sharded or seen.names is not None else self._folder()
        if folder is not None:
            return folder_catalog(seen.indexes, folder, self.access)
        return catalog_of(seen.indexes, seen.sharded, seen.names, self.strategy, self.access)

    def _folder(self) -> Optional[Folder]:
        """What a folder of MindFormers says about itself; every host must see it."""
        try:
            return self.look().folder
        except DiscoveryError:
            return None


def fill_together(
    network: Any,
    source: SharedSource,
    target: Optional[Strategy],
    rank: int,
    strict: bool,
    options: LoadOptions,
    workers: int,
    limits: Limits,
    observe: Optional[Callable[[LoadReport], None]] = None,
    by_suffix: bool = True,
    require_all: bool = False,
    transport: Optional[Transport[Any]] = None,
) -> tuple[list[str], list[str]]:
    """Fill the networks of all ranks.

    Args:
        observe: is given the report of this rank.
        by_suffix: unless strict, match names by suffix, see `core.planning.suffixes`.
        require_all: a Parameter that the checkpoint has nothing for is a LayoutMismatchError, before any is changed.
        transport: where all ranks have met, see `meeting`; by default they meet here.

    Returns:
        (Parameters that got nothing, checkpoint names that went nowhere), of this rank.

    Raises:
        DisagreementError, PeerError, TransportError: see `errors`.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    with meeting(options.timeout) if transport is None else nullcontext(transport) as transport:
        host = options.host or os.environ.get(HOST_VARIABLE) or socket.gethostname()
        seen = survey(transport, source.look, partial(read_index, access=source.access), host)
        stored = _on_all(transport, lambda: source.stored(seen))
        look = Together(transport, stored, seen.by_number)
        refuse_gathered(stored, look, source.allow_equal_slices)
        warn_unlike(stored, look, tell=transport.rank == 0)

        def compare(held: Catalog, names: Iterable[str]) -> Catalog:
            return _compared(transport, held, list(names), look, seen)

        catalog = _on_all(transport, lambda: source.named(stored, compare))
        manner = Manner(strict, strict or not by_suffix, require_all, source.listed)
        found = _on_all(transport, lambda: matched(network, Taking(catalog, target, rank, transport.size), manner))
        shared = transport.share(pack(open_names(found)))
        wanted = sorted({name for names in shared for name in unpack(names)})
        catalog = compare(catalog, wanted)
        if options.verify == "full" and (seen.sees is None or options.mode != "direct"):
            catalog = settled(catalog)
        taking = Taking(catalog, target, rank, transport.size)
        found = _on_all(transport, lambda: boxes(network, found, taking, taking.one_of, manner))
        own = (all_side_by_side(catalog, name, transport.size) for name in wanted if name in catalog.own)
        catalog = catalog._replace(tensors={**catalog.tensors, **{k: t for each in own for k, t in each.items()}})
        matches = found.matches
        ready = _prepare(transport, seen, catalog, matches, source, target, options)
        _on_all(transport, lambda: _prove(transport.rank, ready, matches, options, workers, limits))
        if options.verify == "full":
            audit(transport, catalog, [demand.tensor for demand in ready.demands], seen.by_number, workers)
        report = _load(transport, ready, matches, options, workers, limits)
        if observe is not None:
            observe(report)
    tell_loaded(found, catalog)
    return found.missing, found.unused


def _compared(
    transport: Transport[Any], catalog: Catalog, names: Sequence[str], look: Together, seen: Survey
) -> Catalog:
    """`alike.compared` by all ranks together, which give the same names."""
    held = [catalog.unproven[name].stored_name for name in names if name in catalog.unproven]
    on_record = on_record_together(transport, catalog, seen.by_number, held)
    catalog = compared(catalog, names, look, on_record)
    if transport.rank == 0:
        tell_unseen(catalog)
    return catalog


@contextmanager
def meeting(timeout: float, refused: Optional[CheckpointError] = None) -> Iterator[Transport[Any]]:
    """All ranks meet, and leave together.

    Args:
        timeout: seconds to wait for who does not come, here and in every exchange.
        refused: why this rank cannot take part: raised on it, and told to the others, who raise PeerError.

    Raises PeerError, TransportError, or what was refused.
    """
    transport = select_transport(timeout=timeout)
    try:
        share_status(transport, refused)
        yield transport
    finally:
        transport.close()


def give_up(error: CheckpointError, timeout: float) -> NoReturn:
    """Instead of `fill_together`, on a rank that cannot take part: the others are told why. Raises `error`."""
    with meeting(timeout, error):
        raise error


def _on_all(transport: Transport[Any], step: Callable[[], _T]) -> _T:
    """Make a step of this rank's own; if it fails on any rank, all raise."""
    error: Optional[BaseException] = None
    result: Optional[_T] = None
    try:
        result = step()
    except Exception as problem:  # noqa: BLE001 - shared with all ranks before it is raised
        error = problem
    share_status(transport, error)
    return result  # type: ignore[return-value]


def _prepare(
    transport: Transport[Any],
    seen: Survey,
    catalog: Catalog,
    matches: Sequence[Match],
    source: SharedSource,
    target: Optional[Strategy],
    options: LoadOptions,
) -> Prepared:
    wants = {match.name: _want(match) for match in matches}
    facts = {"source strategy": repr(source.strategy and sorted(source.strategy.layouts.items()))}
    facts["rules"] = repr(source.rules)
    facts["target strategy"] = repr(target and target.devices_per_stage)  # a layout dict is of one stage only
    facts["name_map"] = repr(sorted(source.naming.name_map.items()))
    facts["choice_func"] = repr([(*catalog.tensors,), (*catalog.extras,)])  # a function is told by what it left
    hardware = profiles.profile(profiles.ASCEND if transport.traits.on_device else profiles.CPU).hardware
    return session.prepare(transport, seen, catalog, wants, options, hardware, facts)


def _want(match: Match) -> Want:
    tensor = match.offer.tensor
    cut = match.offer.region is not None and match.offer.shape != tensor.meta.shape
    return Want(tensor.meta.name, match.offer.layout if cut else whole(len(tensor.meta.shape)))


def _prove(
    rank: int, ready: Prepared, matches: Sequence[Match], options: LoadOptions, workers: int, limits: Limits
) -> None:
    """Find altered encrypted files while nothing is changed."""
    if ready.cooperative:
        prove_chunks(ready.plan, rank, ready.catalog, options.threads)
    else:
        prove_matches(matches, ready.catalog, workers, limits)


def _load(
    transport: Transport[Any],
    ready: Prepared,
    matches: Sequence[Match],
    options: LoadOptions,
    workers: int,
    limits: Limits,
) -> LoadReport:
    names = [match.parameter.name for match in matches]
    try:
        with ready.catalog.readers() as readers:
            if ready.cooperative:
                report = _exchange(transport, ready, matches, readers, options)
            else:
                digests = _on_all(transport, lambda: _fill(ready, matches, readers, options, workers, limits))
                report = LoadReport("direct", readers.count, digests=digests)
            _on_all(transport, readers.verify)
        if options.verify != "none":
            compare_replicas(transport, ready.demands, report.digests)
    except LoadError:
        raise
    except Exception as error:
        raise half_done(error, names) from error
    log.info("loaded %d parameters: %s", len(matches), report)
    return report


def _fill(
    ready: Prepared,
    matches: Sequence[Match],
    readers: ReaderPool,
    options: LoadOptions,
    workers: int,
    limits: Limits,
) -> dict[int, Digest]:
    """A direct load, and digests of what it filled if they are wanted."""
    if options.verify == "none":
        fill_matches(matches, ready.catalog, readers, workers, limits)
        return {}
    numbers = {id(match): number for number, match in _wanted(ready, matches)}
    with Digester() as digester:

        def filled(match: Match, contents: SliceBytes) -> None:
            if id(match) in numbers:
                digester.add(numbers[id(match)], contents)

        fill_matches(matches, ready.catalog, readers, workers, limits, filled)
        return digester.wait()


def _wanted(ready: Prepared, matches: Sequence[Match]) -> list[tuple[int, Match]]:
    """The demands of this rank by number; a parameter without elements is none."""
    numbers = {(demand.tensor.meta.name, demand.name): number for number, demand in enumerate(ready.demands)}
    keyed = [((match.offer.tensor.meta.name, match.name), match) for match in matches]
    return [(numbers[key], match) for key, match in keyed if key in numbers]


def _exchange(
    transport: Transport[Any],
    ready: Prepared,
    matches: Sequence[Match],
    readers: ReaderPool,
    options: LoadOptions,
) -> LoadReport:
    mover, sink_of = _landing(transport)
    sinks = _on_all(transport, lambda: {number: sink_of(match) for number, match in _wanted(ready, matches)})
    return session.exchange(transport, ready, mover, sinks, readers, options)


def _landing(transport: Transport[Any]) -> tuple[Any, Callable[[Match], Any]]:
    """What cuts staged bytes, and what makes the sink of a Parameter: on the device, or in host memory."""
    if not transport.traits.on_device:
        return HostMover(), ParameterSink
    from ms_ckpt_ext.bridge.ascend import DeviceMover, DeviceSink

    return DeviceMover(transport), partial(DeviceSink, transport=transport)
