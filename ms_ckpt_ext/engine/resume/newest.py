"""The newest checkpoint that is whole, chosen by all ranks together.

1. One rank per host looks at the directory; what they see is combined, so all ranks have the same list.
2. Newest first (`engine.resume.trial_order`): the files must agree with the records, the layouts be known and every
   rank's file be there. Each header is read by one rank. All ranks learn what is wrong with a checkpoint, and the next
   one is tried.
3. One that is whole, but cannot be told apart from another whole one, is not taken: the user must say which is meant.
4. The training scalars are read by one rank each and shared.

Collective: all ranks call it, and all return the same or raise.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load.hosts import told_apart
from ms_ckpt_ext.engine.load.survey import Survey, survey
from ms_ckpt_ext.engine.resume import candidates, sightings
from ms_ckpt_ext.engine.resume.candidates import Candidate, check_noted, check_ranks
from ms_ckpt_ext.engine.resume.scalars import Value, read_scalars
from ms_ckpt_ext.engine.resume.sightings import check_alike, entries, find_layouts
from ms_ckpt_ext.engine.resume.trial_order import Order, prefix_of
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import (
    CheckpointError,
    DisagreementError,
    DiscoveryError,
    FormatError,
    PeerError,
    TransportError,
    name_ranks,
    storage_error,
)
from ms_ckpt_ext.formats.discovery.saves import unlike
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_index
from ms_ckpt_ext.transport.agree import agree, share_texts, share_values, told_by_all
from ms_ckpt_ext.transport.base import Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.core.exchange.demand import Sees
    from ms_ckpt_ext.formats.discovery.mindformers import Folder


_COMMON = {str: {bool, int, float, str}}
"""The form of what `read_common` returns."""


class Skipped(NamedTuple):
    """A checkpoint that was newer than the chosen one, and why it was not taken."""

    name: str
    reason: str


def first_absent(catalog: Catalog) -> str:
    """Where the first parameter that no file holds should be; "" when there is none."""
    return next((f"parameter {name!r} should be in {where}" for name, where in catalog.absent.items()), "")


@dataclass(frozen=True)
class ResumeRequest:
    """Where to look, and for what.

    Attributes:
        directory: path on this host.
        host: key of this rank's host, see `engine.load.hosts`.
        strategy: layouts of the job that saved, if they were given; None to find them with the checkpoint.
        kind: "safetensors", "ckpt" or None.
        access: how files are opened.
        digests: compare every tensor with the digests on record: reads everything once.
        prefix: of the saves that count; None for all.
        lacks: returns what the load needs and a checkpoint's files lack, in words; "" if nothing. Ranks may differ.
        peers: ranks say which of them still hold their state; see `bridge.peers`.
    """

    directory: str
    host: str
    strategy: Optional[Strategy] = None
    kind: Optional[str] = None
    access: Access = PLAIN
    digests: bool = False
    prefix: Optional[str] = None
    lacks: Callable[[Catalog], str] = first_absent
    peers: bool = False

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks."""
        asked = {"format": self.kind, "digests": self.digests, "prefix": self.prefix, "alive": self.peers}
        return {**{name: repr(value) for name, value in asked.items()}, "strategy": _text(self.strategy)}


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that all ranks agree on.

    Attributes:
        candidate: which it is.
        seen: its files, and what their headers say: all that a load needs to know of them.
        catalog: the same as parameters.
        strategy: the layouts that cut it; None for whole parameters.
        scalars: single values and texts that it holds outside the strategy.
        own: those that differ between ranks, by name and rank.
    """

    candidate: Candidate
    seen: Survey
    catalog: Catalog
    strategy: Optional[Strategy]
    scalars: Mapping[str, Value]
    own: Mapping[str, Mapping[int, Value]]


def choose_checkpoint(transport: Transport[Any], wanted: ResumeRequest) -> tuple[Optional[Chosen], tuple[Skipped, ...]]:
    """The newest complete checkpoint, None when there is none; and what was skipped.

    Raises:
        DiscoveryError: several whole checkpoints are equally new.
        DisagreementError: ranks look for different things, or ranks of one host in different directories.
        PeerError, TransportError: another rank failed, or is gone.
    """
    agree(transport, wanted.facts())
    probe = _agree_on_directories(transport, wanted)
    order = _look_together(transport, wanted, probe)
    skipped: dict[str, Skipped] = {}

    def whole(candidate: Candidate) -> Optional[Chosen]:
        if candidate.title in skipped:
            return None
        try:
            return _try(transport, wanted, candidate, probe)
        except _Unfit as unfit:
            _skip(transport, wanted, skipped, candidate.title, str(unfit))
            return None

    for candidate in order:
        chosen = whole(candidate)
        if chosen is None:
            continue
        rivals = [rival.title for rival in order.equals(candidate) if whole(rival) is not None]
        if rivals:
            raise DiscoveryError(
                f"{', '.join(map(repr, [candidate.title, *rivals]))} in {wanted.directory!r} are whole and equally "
                "new, and nothing tells which is meant: give prefix, format or the folder in it, or move the others "
                "away"
            )
        for title, reason in order.remarks(candidate):
            _skip(transport, wanted, skipped, title, reason)
        if transport.rank == 0:
            _tell(candidate)
        return chosen, tuple(skipped.values())
    return None, tuple(skipped.values())


def _skip(
    transport: Transport[Any], wanted: ResumeRequest, skipped: dict[str, Skipped], title: str, reason: str
) -> None:
    if title not in skipped:
        skipped[title] = Skipped(title, reason)
        if transport.rank == 0:
            log.warning("checkpoint %r in %r is skipped: %s", title, wanted.directory, reason)


def _tell(candidate: Candidate) -> None:
    """Log what is assumed about the chosen checkpoint."""
    names = {} if candidate.parts else {number: held.file for number, held in candidate.files.items()}
    differing = unlike(names) if names else None
    if differing is not None:
        log.warning("%r and %r of different ranks are taken for files of one save", *differing)
    silent = candidates.unnoted(candidate)
    if silent:
        told = name_ranks(silent)
        log.warning("%s did not record files of %r; these are whole by their headers", told, candidate.title)
    if candidate.alike is not None:
        told = "%r has no records, and is whole by its headers; the job is taken to be that of %r"
        log.warning(told, candidate.title, candidate.alike.title)


class _Unfit(Exception):
    """Why a checkpoint cannot be taken; the same on all ranks."""


def _agree_on_directories(transport: Transport[Any], wanted: ResumeRequest) -> bool:
    """Whether this rank is the one that looks for its host."""
    told: list[list[str]] = share_values(transport, [wanted.host, _real(wanted.directory)], (str, str))
    places = list(zip(told_apart([host for host, _ in told]), (place for _, place in told)))
    for host in dict.fromkeys(host for host, _ in places):
        ranks = [rank for rank, place in enumerate(places) if place[0] == host]
        odd = [rank for rank in ranks if places[rank] != places[ranks[0]]]
        if odd:
            raise DisagreementError(
                f"the ranks were started with different inputs: on host {host!r}, checkpoint_dir of {name_ranks(odd)} "
                f"is {places[odd[0]][1]!r}, that of rank {ranks[0]} is {places[ranks[0]][1]!r}; "
                "give all ranks of a host the same directory"
            )
    hosts = [host for host, _ in places]
    return hosts.index(hosts[transport.rank]) == transport.rank


def _real(directory: str) -> str:
    return os.path.realpath(directory)


def _look_together(transport: Transport[Any], wanted: ResumeRequest, probe: bool) -> Order:
    def look() -> list[Any]:
        try:
            places = sightings.look(wanted.directory, wanted.kind) if probe else []
        except OSError as problem:
            if isinstance(problem, CheckpointError):
                raise
            raise storage_error("look for checkpoints in", wanted.directory, problem) from problem
        return [sightings.folder_to_json(place) for place in places]

    def read(told: list[Any]) -> list[sightings.CheckpointFolder]:
        return [sightings.folder_from_json(raw) for raw in told]

    found = candidates.candidates(told_by_all(transport, look, [sightings.FOLDER_FORM], read))
    return Order(c for c in found if wanted.prefix is None or (not c.merged and prefix_of(c.name) == wanted.prefix))


def _try(transport: Transport[Any], wanted: ResumeRequest, candidate: Candidate, probe: bool) -> Chosen:
    try:
        check_noted(candidate)
        given = None if candidate.merged or candidate.parts else wanted.strategy
        folder = candidate.place(wanted.directory)
        strategy = given or find_layouts(transport, candidate, folder, probe)
        if strategy is None and candidate.job:
            check_alike(transport, candidate, folder, probe)
        files = check_ranks(candidate, strategy)
    except CheckpointError as error:
        if isinstance(error, TransportError):
            raise
        raise _Unfit(str(error)) from error

    def look() -> Listing:
        return candidate.listing(wanted.directory, files, wanted.kind)

    seen, catalog = _read_headers(transport, wanted, look, strategy)
    if wanted.digests:
        _compare_digests(transport, catalog, seen.by_number)
    scalars = read_scalars(transport, catalog, seen.by_number, seen.sharded)
    common = _common(transport, seen.folder)
    _tell_apart(transport, candidate, common, scalars.alike)
    return Chosen(candidate, seen, catalog, strategy, {**common, **scalars.alike}, scalars.own)


def _tell_apart(
    transport: Transport[Any], candidate: Candidate, common: Mapping[str, Value], held: Mapping[str, Value]
) -> None:
    """Warn where MindFormers' `common.json` and the files disagree; the files count, as in MindFormers."""
    for name in common.keys() & held.keys() if transport.rank == 0 else ():
        if not np.array_equal(np.asarray(common[name]), np.asarray(held[name]).reshape(())):
            told = candidate.title, name, common[name], held[name]
            log.warning("%r: common.json says that %s is %s, and the files, which count, hold %s", *told)


def _text(strategy: Optional[Strategy]) -> str:
    return "" if strategy is None else json.dumps(sorted(entries(strategy)))


def _read_headers(
    transport: Transport[Any], wanted: ResumeRequest, look: Callable[[], Listing], strategy: Optional[Strategy]
) -> tuple[Survey, Catalog]:
    """Read all headers, and check that they fit the layouts and that nothing is missing."""
    problem, result = "", None
    try:
        seen = survey(transport, look, partial(read_index, access=wanted.access), wanted.host)
        catalog = seen.catalog(strategy, wanted.access)
        problem = wanted.lacks(catalog) or _uncovered(catalog)
        result = seen, catalog
    except PeerError:
        pass  # the peer sends its problem below; if it is gone, that shows below too
    except TransportError:
        raise
    except CheckpointError as error:
        problem = str(error)
    told = share_texts(transport, problem)
    if result is None or any(told):
        raise _Unfit(next(filter(None, told), "its headers could not be read"))
    return result


def _uncovered(catalog: Catalog) -> str:
    """The first parameter that lacks a slice in every place where it could be whole; "" when there is none."""
    for name, tensor in catalog.tensors.items():
        lacking = [[cell for cell in p.expected if not p.holders.get(cell)] for p in tensor.placements]
        if lacking and all(lacking):
            ranks = sorted(rank for cell in lacking[0] for rank in tensor.placements[0].expected[cell])
            return f"no file holds the slices of parameter {name!r} that {name_ranks(ranks)} should have saved"
    return ""


def _common(transport: Transport[Any], folder: Optional[Folder]) -> dict[str, Value]:
    """The training scalars of a MindFormers folder."""
    if folder is None:
        return {}
    from ms_ckpt_ext.formats.discovery.mindformers import read_common

    mine: dict[str, Any] = {}
    with contextlib.suppress(FormatError):  # it was readable a moment ago, when the checkpoint was chosen
        mine = dict(read_common(folder.path))
    told: dict[str, Any] = next(filter(None, share_values(transport, mine, _COMMON)), {})
    return {name: value if isinstance(value, str) else np.asarray(value) for name, value in told.items()}


def _compare_digests(transport: Transport[Any], catalog: Catalog, sees: Optional[Sees]) -> None:
    """Compare every file with its manifest, on ranks that see it. A file that is in no manifest passes."""
    from ms_ckpt_ext.engine.integrity.recorded import damaged_files

    found = damaged_files(transport, catalog, sees, 1)
    if found:
        raise _Unfit("; ".join(map(str, found[:3])))
