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
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

import numpy as np

from ms_ckpt_ext.bridge import world
from ms_ckpt_ext.bridge.match import (
    Match,
    Matches,
    Offer,
    check_cell,
    nbytes_of,
    offer_of,
    offers_to,
)
from ms_ckpt_ext.bridge.memory import (
    contents_of,
    give,
    kept_on_host,
    mark_loaded,
    own_memory,
    tensor_of,
)
from ms_ckpt_ext.bridge.request import Filled, LoadRequest, half_done, tell_loaded
from ms_ckpt_ext.bridge.settle import boxes, matched, open_names
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.load.options import LoadReport
from ms_ckpt_ext.engine.load.taking import Taking
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink
from ms_ckpt_ext.transport.base import Bytes

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import SliceBytes

_LEAST_TILE = 1 << 20
"""The least bytes that a thread reads at once, unless a slab is shorter."""
_ROUNDED = 64
"""Bytes of a slab that a stretch may take beyond its own."""


def fill(request: LoadRequest, catalog: Catalog) -> Filled:
    """Fill the Parameters of a network with this rank's slices, without communication between ranks.

    Args:
        catalog: the checkpoint by its names in the network, see `LoadRequest.read`.

    Raises:
        CoverageError: the checkpoint should have a Parameter, and does not; nothing was changed.
        LayoutMismatchError: shapes or dtypes do not fit; nothing was changed.
        LoadError: reading failed on the way; `changed` names the Parameters that may hold new bytes.
        MissingDependencyError: see `world.require_views_of_bytes`.
    """
    world.require_views_of_bytes()
    catalog, found = _settled(request, catalog)
    prove_matches(found.matches, catalog, request.workers, request.limits)
    with catalog.readers() as readers:
        fill_matches(found.matches, catalog, readers, request.workers, request.limits)
        readers.verify()
    tell_loaded(found, catalog)
    return Filled(found.missing, found.unused, LoadReport("direct", readers.count))


def _settled(request: LoadRequest, catalog: Catalog) -> tuple[Catalog, Matches]:
    """The source after the comparisons it needs, made by this rank alone, and what every Parameter takes of it."""

    def taking(catalog: Catalog) -> Taking:
        return Taking(catalog, request.target, request.rank, world.world_size())

    before = taking(catalog)
    found = matched(request.network, before, request.manner)
    catalog = _compared(catalog, before.needs_comparing(open_names(found)))
    if not catalog.all_there:
        from ms_ckpt_ext.engine.unlisted.proven import tell_unseen

        tell_unseen(catalog)
    after = taking(catalog)
    return catalog, boxes(request.network, found, after, after.require_own, request.manner)


def _compared(catalog: Catalog, names: Collection[str]) -> Catalog:
    """`alike.compared` by this rank alone."""
    if not names:
        return catalog
    from ms_ckpt_ext.engine.unlisted.alike import compared

    return compared(catalog, names)


def network_dict(request: LoadRequest, catalog: Catalog) -> dict[str, Any]:
    """This rank's slices of everything the checkpoint has, as `{name: Parameter}`; the network is left alone.

    Text is a str, as in `mindspore.load_checkpoint`.
    """
    check_cell(request.network)
    strategy, rank = request.target, request.rank
    catalog.require(catalog.absent if strategy is None else strategy.names_of(rank))
    taking = Taking(catalog, strategy, rank, world.world_size())
    catalog = _compared(catalog, taking.needs_comparing([*catalog.unproven]))
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
    if offer.tensor.meta.dtype.name == "STR":
        from ms_ckpt_ext.engine.source.values import decode_text

        return decode_text(contents.tobytes())
    return ms.Parameter(tensor_of(contents, offer), name=name)


def prove_matches(matches: Sequence[Match], catalog: Catalog, workers: int, limits: Limits) -> None:
    """Decrypt what the matches want, for its tags only. Raises as `authenticate.prove_tasks`."""
    if catalog.authenticated:
        from ms_ckpt_ext.engine.integrity import authenticate

        authenticate.prove_tasks(_tasks([match.offer for match in matches]), len(matches), catalog, workers, limits)


def fill_matches(
    matches: Sequence[Match],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    filled: Optional[Callable[[Match, SliceBytes], None]] = None,
) -> None:
    """Read every match's slice into its Parameter. Raises LoadError, which also names what changed before.

    `filled` is called for every Parameter that has all its bytes, from any thread, while others are still read.
    """
    kept = kept_on_host([match.parameter for match in matches])
    in_place: list[tuple[Match, Bytes]] = []
    staged: list[Match] = []
    uploaded: list[Match] = []
    for match in matches:
        stays = id(match.parameter) in kept
        memory = _same_memory(match, stays)
        if memory is not None:
            in_place.append((match, memory))
        else:
            (staged if stays or match.offer.dtype == ms.qint4x2 else uploaded).append(match)
    try:
        wanted = [(match.offer, memory) for match, memory in in_place]

        def landed(number: int) -> None:
            match, _ = in_place[number]
            if filled is not None:
                filled(match, contents_of(match.parameter))

        _read(wanted, catalog, readers, workers, limits, landed)
    except Exception as error:
        raise half_done(error, [match.parameter.name for match, _ in in_place]) from error
    done = []
    for match, _ in in_place:
        mark_loaded(match.parameter)
        done.append(match.parameter.name)
    try:
        _fill_staged(staged, catalog, readers, workers, limits, done, filled)
        if uploaded:
            _upload(uploaded, catalog, readers, workers, limits, done, filled)
    except Exception as error:
        raise half_done(error, done) from error


_Filled = Callable[[Match, "SliceBytes"], None]


def _fill_staged(
    matches: Sequence[Match],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    done: list[str],
    filled: Optional[_Filled],
) -> None:
    """Through buffers that become the data of Parameters; `done` gets the names of those that changed."""
    for group in _groups(matches, limits):
        buffers = [np.empty(nbytes_of(match.offer), np.uint8) for match in group]
        _read([(match.offer, buffer) for match, buffer in zip(group, buffers)], catalog, readers, workers, limits)
        for match, buffer in zip(group, buffers):
            done.append(match.parameter.name)
            give(match, buffer)
            if filled is not None:
                filled(match, contents_of(match.parameter))


def _upload(
    matches: Sequence[Match],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    done: list[str],
    filled: Optional[_Filled],
) -> None:
    """Into Parameters on the device: one slab is read while another goes up. `done` as above."""
    from ms_ckpt_ext.bridge.npu.uploads import Uploads, in_slabs

    room = 2 * limits.tile
    most = max(room // max(1, workers), min(room, _LEAST_TILE))
    uploads = Uploads(min(room, sum(nbytes_of(match.offer) + _ROUNDED for match in matches)))
    try:
        for group in in_slabs(matches, room, most):
            slab = uploads.slab()
            wanted = [(tile.offer, slab[at : at + nbytes_of(tile.offer)]) for tile, at in group]
            _read(wanted, catalog, readers, workers, limits)
            done += [tile.match.parameter.name for tile, _ in group if not tile.start]
            uploads.send(slab, group)
            for tile, _ in group:
                if tile.last and filled is not None:
                    filled(tile.match, contents_of(tile.match.parameter))
    finally:
        uploads.finish()


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


def _read(
    wanted: Sequence[tuple[Offer, Bytes]],
    catalog: Catalog,
    readers: ReaderPool,
    workers: int,
    limits: Limits,
    whole: Callable[[int], None] = lambda _number: None,
) -> None:
    """`whole` is called with the number of every offer of which the last byte has landed."""
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
    worker.run(schedule(tasks, catalog.stored, limits), readers, sinks, workers, landed, limits)


def _tasks(offers: Sequence[Offer]) -> list[Task]:
    """Every offer, whole and in order, into the sink of its number."""
    return [
        Task(offer.tensor, (Target(offer.region, (Landing(number, (Extent(0, nbytes_of(offer)),)),)),))
        for number, offer in enumerate(offers)
        if offer.region is not None
    ]
