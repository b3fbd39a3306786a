"""A checkpoint into a Cell: each rank reads the bytes of its own slices, into the memory of its own Parameters.

1. Match: which Parameter takes which box of which source parameter; shapes and dtypes are checked for all of them
   before the first byte is read.
2. Read: on the CPU a Parameter's host memory is its only memory, so bytes of the right dtype are read straight into
   it. Anything else is read into a buffer of the source's dtype.
3. Set: buffers become tensors, are cast as MindSpore casts, and are given to their Parameters.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge import world
from ms_ckpt_ext.bridge.match import (
    Match,
    Matches,
    Offer,
    check_cell,
    nbytes_of,
    offer_of,
    offers_to,
    told_passed,
)
from ms_ckpt_ext.bridge.memory import (
    contents_of,
    give,
    kept_on_host,
    mark_loaded,
    on_device,
    own_memory,
    pinned,
    tensor_of,
)
from ms_ckpt_ext.bridge.settle import Manner, boxes, matched, open_names
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.integrity import authenticate
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.replicas import SliceBytes
from ms_ckpt_ext.engine.load.session import LoadReport
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.engine.source.values import TEXT, decode_text
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.engine.unlisted.proven import Compare, ruled, tell_unseen
from ms_ckpt_ext.engine.unlisted.taking import Taking
from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices
from ms_ckpt_ext.errors import LoadError
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink
from ms_ckpt_ext.transport.base import Bytes

_SHOWN = 20


class LoadRequest(NamedTuple):
    """What is loaded into whose network, and how; one rank's.

    Attributes:
        network: the Cell to fill.
        target: layouts of this job; None for one device.
        rank: this rank.
        manner: how Parameters are matched.
        rules: weight rules that make the network's parameters of what the files hold.
        naming: how these are called in the network.
        allow_equal_slices: slices that are all equal are meant, see `engine.unlisted.whole_slices`.
        options: how all ranks load together.
        workers, limits: threads and buffers of a rank that reads its own bytes.
    """

    network: Any
    target: Optional[Strategy]
    rank: int
    manner: Manner
    rules: tuple[Rule, ...] = ()
    naming: Naming = Naming()
    allow_equal_slices: bool = False
    options: LoadOptions = LoadOptions()
    workers: int = 1
    limits: Limits = Limits()

    def named(self, stored: Catalog, compare: Compare = compared) -> Catalog:
        """What is stored, with the rules applied, by its names in the network; `compare` as in `proven.ruled`."""
        return self.naming.of(ruled(stored, self.rules, compare))

    def read(self, listing: Listing, strategy: Optional[Strategy], access: Access) -> Catalog:
        """A checkpoint by its names in the network, its headers read by this rank. Raises as `read_slices`."""
        return self.named(read_slices(listing, strategy, access, self.allow_equal_slices))


class Filled(NamedTuple):
    """What a load ended with, on one rank.

    Attributes:
        missing: Parameters that got nothing.
        unused: names in the checkpoint that went nowhere.
        report: what this rank read and received.
    """

    missing: list[str]
    unused: list[str]
    report: LoadReport


def fill(request: LoadRequest, catalog: Catalog) -> Filled:
    """Fill the Parameters of a network with this rank's slices, without a word to other ranks.

    Args:
        catalog: the checkpoint by its names in the network, see `LoadRequest.read`.

    Raises:
        CoverageError: the checkpoint should have a Parameter, and has not; nothing was changed.
        LayoutMismatchError: shapes or dtypes do not fit; nothing was changed.
        LoadError: reading failed on the way; `changed` names the Parameters that may hold new bytes.
    """
    catalog, found = _settled(request, catalog)
    prove_matches(found.matches, catalog, request.workers, request.limits)
    with catalog.readers() as readers:
        fill_matches(found.matches, catalog, readers, request.workers, request.limits)
        readers.verify()
    tell_loaded(found, catalog)
    return Filled(found.missing, found.unused, LoadReport("direct", readers.count))


def _settled(request: LoadRequest, catalog: Catalog) -> tuple[Catalog, Matches]:
    """The source with what had to be compared compared, by this rank alone, and what every Parameter takes of it."""

    def taking(catalog: Catalog) -> Taking:
        return Taking(catalog, request.target, request.rank, world.world_size())

    before = taking(catalog)
    found = matched(request.network, before, request.manner)
    catalog = compared(catalog, before.needs_comparing(open_names(found)))
    tell_unseen(catalog)
    after = taking(catalog)
    return catalog, boxes(request.network, found, after, after.require_own, request.manner)


def tell_loaded(found: Matches, catalog: Catalog) -> None:
    """Log which Parameters got something from outside the strategy, and which got nothing."""
    outside = sorted(match.parameter.name for match in found.matches if match.name not in catalog.tensors)
    if outside:
        more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
        log.info("loaded as well, from outside the strategy: %s%s", outside[:_SHOWN], more)
    if found.missing:
        log.warning(
            "%d parameters of the network are not in the checkpoint and were not loaded: %s%s",
            len(found.missing),
            found.missing,
            told_passed(found),
        )


def network_dict(request: LoadRequest, catalog: Catalog) -> dict[str, Any]:
    """This rank's slices of everything the checkpoint has, as `{name: Parameter}`; the network is left alone.

    Text is a str, as `mindspore.load_checkpoint` has it.
    """
    check_cell(request.network)
    strategy, rank = request.target, request.rank
    catalog.require(catalog.absent if strategy is None else strategy.names_of(rank))
    taking = Taking(catalog, strategy, rank, world.world_size())
    catalog = compared(catalog, taking.needs_comparing([*catalog.unproven]))
    taking = Taking(catalog, strategy, rank, world.world_size())
    taking.require_common()
    taking.refuse_others(catalog.own)
    own = {name: offer_of(catalog, taking.require_own(name)) for name in (*catalog.own, *catalog.unproven)}
    offers = {**offers_to(taking), **own}
    buffers = {name: np.empty(nbytes_of(offer), np.uint8) for name, offer in offers.items()}
    with catalog.readers() as readers:
        wanted = [(offer, buffers[name]) for name, offer in offers.items()]
        _read(wanted, catalog, readers, request.workers, request.limits)
        readers.verify()
    return {name: _parameter(name, buffers[name], offer) for name, offer in offers.items()}


def _parameter(name: str, contents: Bytes, offer: Offer) -> Any:
    if offer.tensor.meta.dtype.name == TEXT:
        return decode_text(contents.tobytes())
    return ms.Parameter(tensor_of(contents, offer), name=name)


def prove_matches(matches: Sequence[Match], catalog: Catalog, workers: int, limits: Limits) -> None:
    """Decrypt what the matches want, for its tags only. Raises as `proof.prove_tasks`."""
    authenticate.prove_tasks(_tasks([match.offer for match in matches]), len(matches), catalog, workers, limits)


def fill_matches(
    matches: Sequence[Match],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    filled: Callable[[Match, SliceBytes], None] = lambda _match, _contents: None,
) -> None:
    """Read every match's slice into its Parameter. Raises LoadError, also for what was changed before.

    `filled` is told of every Parameter that has all its bytes, by any thread, while others are still read.
    """
    kept = kept_on_host([match.parameter for match in matches])
    in_place: list[tuple[Match, Bytes]] = []
    staged: list[Match] = []
    for match in matches:
        memory = _same_memory(match, id(match.parameter) in kept)
        if memory is None:
            staged.append(match)
        else:
            in_place.append((match, memory))
    try:
        wanted = [(match.offer, memory) for match, memory in in_place]

        def landed(number: int) -> None:
            match, memory = in_place[number]
            filled(match, SliceBytes(str(match.parameter.dtype), iter((memory,))))

        _read(wanted, catalog, readers, workers, limits, landed)
    except Exception as error:
        raise half_done(error, [match.parameter.name for match, _ in in_place]) from error
    done = []
    for match, _ in in_place:
        mark_loaded(match.parameter)
        done.append(match.parameter.name)
    for group in _groups(staged, limits):
        buffers = [_buffer(nbytes_of(match.offer), id(match.parameter) in kept) for match in group]
        try:
            _read([(match.offer, buffer) for match, buffer in zip(group, buffers)], catalog, readers, workers, limits)
            for match, buffer in zip(group, buffers):
                done.append(match.parameter.name)
                give(match, buffer, id(match.parameter) in kept)
                filled(match, contents_of(match.parameter))
            if on_device():
                ms.runtime.current_stream().synchronize()  # uploads read the buffers until then
        except Exception as error:
            raise half_done(error, done) from error


def _buffer(nbytes: int, kept: bool) -> Bytes:
    """What a slice is read into on its way to a Parameter."""
    return pinned(nbytes) if on_device() and not kept and nbytes else np.empty(nbytes, np.uint8)


def _same_memory(match: Match, kept: bool) -> Optional[Bytes]:
    """The Parameter's memory, when it takes the checkpoint's bytes as they are."""
    if match.parameter.dtype != match.offer.dtype:
        return None
    return own_memory(match.parameter, math.prod(match.offer.shape), kept)


def _groups(matches: Sequence[Match], limits: Limits) -> list[list[Match]]:
    """Parameters whose buffers exist at the same time: together a few tiles, or one that is larger."""
    groups: list[list[Match]] = []
    held = 0
    for match in matches:
        nbytes = nbytes_of(match.offer)
        if not groups or held + nbytes > 4 * limits.tile:
            groups.append([])
            held = 0
        groups[-1].append(match)
        held += nbytes
    return groups


def half_done(error: Exception, changed: Sequence[str]) -> LoadError:
    """The error of a load that stopped after it began to change Parameters."""
    listed = ", ".join(map(repr, changed[:5])) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return LoadError(
        f"{error}\nThe load stopped on the way: {len(changed)} parameters may already hold new bytes "
        f"({listed or 'none'}); load again before using the network",
        tuple(changed),
    )


def _read(
    wanted: Sequence[tuple[Offer, Bytes]],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    whole: Callable[[int], None] = lambda _number: None,
) -> None:
    """`whole` is told the number of every offer of which the last byte has landed."""
    sinks = [MemorySink(array) for _, array in wanted]
    left = [array.size for _, array in wanted]
    lock = threading.Lock()

    def landed(number: int, nbytes: int) -> None:
        with lock:
            left[number] -= nbytes
            last = not left[number]
        if last:
            whole(number)

    tasks = _tasks([offer for offer, _ in wanted])
    worker.run(schedule(tasks, catalog.stored, limits), readers, sinks, workers, landed)


def _tasks(offers: Sequence[Offer]) -> list[Task]:
    """Every offer, whole and in order, into the sink of its number."""
    return [
        Task(offer.tensor, (Target(offer.region, (Landing(number, (Extent(0, nbytes_of(offer)),)),)),))
        for number, offer in enumerate(offers)
        if offer.region is not None
    ]
