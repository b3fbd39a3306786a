"""A checkpoint into the Cells of all ranks at once: survey, match, agree, exchange, compare.

Collective: every rank of the job calls it. An error on one rank, whatever it was, is raised on all of them; before the
first round nothing is changed.

1. All ranks meet (`meeting`), and look at the checkpoint together: its files are listed, and each header is read, once.
   A caller from `engine.resume.newest` has done so already.
2. `fill_from` does the rest: what the files hold, by names in the network; which Parameter takes what; the plan,
   the same on all ranks; the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Match, Matches
from ms_ckpt_ext.bridge.memory import ParameterSink, bytes_to_come, kept_on_host
from ms_ckpt_ext.bridge.request import Filled, LoadRequest, half_done, tell_loaded
from ms_ckpt_ext.bridge.settle import boxes, matched, open_names
from ms_ckpt_ext.bridge.world import require_views_of_bytes
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load import profiles, session
from ms_ckpt_ext.engine.load.hosts import host_key
from ms_ckpt_ext.engine.load.options import LoadOptions, LoadReport
from ms_ckpt_ext.engine.load.session import Prepared, Want
from ms_ckpt_ext.engine.load.survey import Survey, survey
from ms_ckpt_ext.engine.load.taking import Taking, all_side_by_side
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError, LoadError
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_index
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.transport.agree import agree, on_all, share_status, share_values
from ms_ckpt_ext.transport.base import Transport
from ms_ckpt_ext.transport.select import HOST_VARIABLE, select_transport

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import Digest, SliceBytes
    from ms_ckpt_ext.engine.source.renaming import Naming
    from ms_ckpt_ext.engine.unlisted.dealt import Together
    from ms_ckpt_ext.formats.discovery.mindformers import Folder


class SharedSource(NamedTuple):
    """A checkpoint that ranks look at together.

    Attributes:
        look: lists its files on this host.
        strategy: the strategy that cut it; None for a merged one.
        access: how its files are opened.
        expected: files that were named one by one, by key: some host must see each.
        naming: how parameters are called according to a folder of MindFormers; None: as the request says.
    """

    look: Callable[[], Listing]
    strategy: Optional[Strategy] = None
    access: Access = PLAIN
    expected: Mapping[str, str] = MappingProxyType({})
    naming: Optional[Callable[[Optional[Folder]], Optional[Naming]]] = None

    def stored(self, seen: Survey) -> Catalog:
        """What the ranks saw. Raises DiscoveryError for an expected file that none of them saw."""
        for key, path in self.expected.items():
            if key not in seen.indexes:
                raise DiscoveryError(
                    f"no host sees the file of rank {key} in checkpoint_filenames, {path!r} (asked: "
                    f"{', '.join(seen.hosts)}); check the path, or copy it to one of the hosts"
                )
        return seen.catalog(self.strategy, self.access)


def host_name(options: LoadOptions) -> str:
    """The key of this host among those of the job."""
    return host_key(options.host or os.environ.get(HOST_VARIABLE, ""))


def fill_together(request: LoadRequest, source: SharedSource) -> Filled:
    """Fill the networks of all ranks.

    Raises:
        DisagreementError, PeerError, TransportError: see `errors`.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    with meeting(request.options.timeout) as transport:
        agree(transport, {"source strategy": repr(source.strategy and sorted(source.strategy.layouts.items()))})
        read = partial(read_index, access=source.access)
        seen = survey(transport, source.look, read, host_name(request.options))
        if source.naming is not None:
            request = request._replace(naming=source.naming(seen.folder))
        return fill_from(transport, request, seen, on_all(transport, lambda: source.stored(seen)))


def fill_from(transport: Transport[Any], request: LoadRequest, seen: Survey, stored: Catalog) -> Filled:
    """Fill the networks of all ranks from a checkpoint that they looked at together.

    Args:
        stored: what `seen` holds. The layouts that cut it are the same on all ranks.

    Raises: as `fill_together`.
    """
    catalog, found = _settled(transport, request, seen, stored)
    ready = _prepared(transport, request, seen, catalog, found)
    on_all(transport, lambda: _prove(transport.rank, request, ready, found.matches))
    if request.options.verify == "full":
        from ms_ckpt_ext.engine.integrity.recorded import audit

        audit(transport, catalog, [d.tensor for d in ready.demands], seen.by_number, request.workers)
    report = _load(transport, request, ready, found.matches)
    tell_loaded(found, catalog)
    return Filled(found.missing, found.unused, report)


def _settled(transport: Transport[Any], request: LoadRequest, seen: Survey, stored: Catalog) -> tuple[Catalog, Matches]:
    """The source, after comparing what any rank wants of it, and what every Parameter of this rank takes of it."""

    @cache
    def look() -> Together:
        from ms_ckpt_ext.engine.unlisted.dealt import Together

        return Together(transport, stored, seen.by_number)

    compare = partial(_compared, transport, seen, look)
    if stored.strategy is not None:  # else nothing is cut
        _check_slices(stored, look(), request.allow_equal_slices, tell=transport.rank == 0)
    network, manner, options = request.network, request.manner, request.options
    catalog = on_all(transport, lambda: request.named(stored, compare))
    taking = Taking(catalog, request.target, request.rank, transport.size)
    found = on_all(transport, lambda: matched(network, taking, manner))
    opened: list[list[str]] = share_values(transport, open_names(found), [str])
    wanted = sorted(set(chain.from_iterable(opened)))
    catalog = compare(catalog, wanted)
    if options.verify == "full" and (seen.sees is None or options.mode != "direct"):
        from ms_ckpt_ext.engine.integrity.recorded import settled

        catalog = settled(catalog)
    taking = Taking(catalog, request.target, request.rank, transport.size)
    found = on_all(transport, lambda: boxes(network, found, taking, taking.one_of, manner))
    own = (all_side_by_side(catalog, name, transport.size) for name in wanted if name in catalog.own)
    tensors = {**catalog.tensors, **{key: tensor for each in own for key, tensor in each.items()}}
    return catalog._replace(tensors=tensors), found


def _check_slices(stored: Catalog, look: Together, allow_equal: bool, tell: bool) -> None:
    """Check that slices are slices and copies are copies; one rank is to `tell` what is odd."""
    from ms_ckpt_ext.engine.unlisted.tied import warn_unlike
    from ms_ckpt_ext.engine.unlisted.whole_slices import refuse_gathered

    refuse_gathered(stored, look, allow_equal)
    warn_unlike(stored, look, tell)


def _compared(
    transport: Transport[Any], seen: Survey, look: Callable[[], Together], catalog: Catalog, names: Iterable[str]
) -> Catalog:
    """`alike.compared` by all ranks together, which give the same names."""
    held = [name for name in names if name in catalog.unproven]
    if held:
        from ms_ckpt_ext.engine.unlisted.alike import compared
        from ms_ckpt_ext.engine.unlisted.dealt import on_record_together

        stored = [catalog.unproven[name].stored_name for name in held]
        on_record = on_record_together(transport, catalog, seen.by_number, stored)
        catalog = compared(catalog, held, look(), on_record)
    if transport.rank == 0 and not catalog.all_there:
        from ms_ckpt_ext.engine.unlisted.proven import tell_unseen

        tell_unseen(catalog)
    return catalog


def join(timeout: float, refused: Optional[CheckpointError] = None) -> Transport[Any]:
    """All ranks meet; the caller closes the transport. Arguments and errors are those of `meeting`."""
    require_views_of_bytes()
    transport = select_transport(timeout=timeout)
    try:
        share_status(transport, refused)
    except BaseException:
        transport.close()
        raise
    return transport


@contextmanager
def meeting(timeout: float, refused: Optional[CheckpointError] = None) -> Iterator[Transport[Any]]:
    """All ranks meet, and leave together.

    Args:
        timeout: seconds to wait for a rank that does not come, here and in every exchange.
        refused: why this rank cannot take part: raised on it, and told to the others, who raise PeerError.

    Raises PeerError, TransportError, or what was refused; see also `world.require_views_of_bytes`.
    """
    transport = join(timeout, refused)
    try:
        yield transport
    finally:
        transport.close()


def give_up(error: CheckpointError, timeout: float) -> NoReturn:
    """Instead of a load, on a rank that cannot take part: the others are told why. Raises `error`."""
    with meeting(timeout, error):
        raise error


def _prepared(
    transport: Transport[Any], request: LoadRequest, seen: Survey, catalog: Catalog, found: Matches
) -> Prepared:
    target = request.target
    facts = {
        "rules": repr(request.rules),
        "target strategy": repr(target and target.devices_per_stage),  # a layout dict covers one stage only
        "name_map": repr(sorted(request.naming.name_map.items()) if request.naming else []),
        "choice_func": repr([(*catalog.tensors,), (*catalog.extras,)]),  # a function is known by what it left
    }
    traits = transport.traits
    asked = request.options.hardware
    hardware = on_all(transport, lambda: profiles.chosen(asked, traits.product, traits.on_device).hardware)
    facts["hardware"] = repr(hardware)
    wants = {match.name: Want(match.offer.tensor.meta.name, match.offer.layout) for match in found.matches}
    to_come = bytes_to_come([match.parameter for match in found.matches])
    return session.prepare(transport, seen, catalog, wants, request.options, hardware, facts, to_come)


def _prove(rank: int, request: LoadRequest, ready: Prepared, matches: Sequence[Match]) -> None:
    """Find altered encrypted files before anything is changed."""
    if not ready.catalog.authenticated:
        return
    if ready.cooperative:
        from ms_ckpt_ext.engine.integrity.authenticate import prove_chunks

        prove_chunks(ready.plan, rank, ready.catalog, request.options.threads)
    else:
        from ms_ckpt_ext.bridge.network import prove_matches

        prove_matches(matches, ready.catalog, request.workers, request.limits)


def _load(transport: Transport[Any], request: LoadRequest, ready: Prepared, matches: Sequence[Match]) -> LoadReport:
    options = request.options
    try:
        with ready.catalog.readers() as readers:
            if ready.cooperative:
                report = _exchange(transport, ready, matches, readers, options)
            else:
                digests = on_all(transport, lambda: _fill(request, ready, matches, readers))
                report = LoadReport("direct", readers.count, digests=digests)
            on_all(transport, readers.verify)
        if options.verify != "none":
            from ms_ckpt_ext.engine.load.replicas import compare_replicas

            compare_replicas(transport, ready.demands, report.digests)
    except LoadError:
        raise
    except Exception as error:
        raise half_done(error, [match.parameter.name for match in matches]) from error
    log.info("loaded %d parameters: %s", len(matches), report)
    return report


def _fill(request: LoadRequest, ready: Prepared, matches: Sequence[Match], readers: ReaderPool) -> dict[int, Digest]:
    """A direct load, and digests of what it filled if they are wanted."""
    from ms_ckpt_ext.bridge.network import fill_matches

    if request.options.verify == "none":
        fill_matches(matches, ready.catalog, readers, request.workers, request.limits)
        return {}
    from ms_ckpt_ext.engine.load.replicas import Digester

    numbers = {id(match): number for number, match in _wanted(ready, matches)}
    with Digester() as digester:

        def filled(match: Match, contents: SliceBytes) -> None:
            if id(match) in numbers:
                digester.add(numbers[id(match)], contents)

        fill_matches(matches, ready.catalog, readers, request.workers, request.limits, filled)
        return digester.wait()


def _wanted(ready: Prepared, matches: Sequence[Match]) -> list[tuple[int, Match]]:
    """The demands of this rank by number; a parameter without elements has none."""
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
    sink_of = sinks_of(transport, [match.parameter for match in matches])
    sinks = on_all(transport, lambda: {number: sink_of(match) for number, match in _wanted(ready, matches)})
    return session.exchange(transport, ready, mover_of(transport), sinks, readers, options)


def mover_of(transport: Transport[Any]) -> Any:
    """What cuts staged bytes: on the device, or in host memory."""
    if not transport.traits.on_device:
        from ms_ckpt_ext.engine.load.slabs import HostMover

        return HostMover()
    from ms_ckpt_ext.bridge.npu.cutting import DeviceMover

    return DeviceMover(transport)


def sinks_of(transport: Transport[Any], parameters: Sequence[Any], tell: bool = True) -> Callable[[Match], Any]:
    """A function that makes the sink of one of these: on the device, or in host memory. `tell`: log what is cast."""
    if not transport.traits.on_device:
        return partial(ParameterSink, tell=tell)
    from ms_ckpt_ext.bridge.npu.cutting import DeviceSink, KeptSink

    kept = kept_on_host(parameters)

    def sink_of(match: Match) -> Any:
        return KeptSink(match) if id(match.parameter) in kept else DeviceSink(match, transport)

    return sink_of
