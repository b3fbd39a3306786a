"""The layouts of the job that saved a checkpoint: noted with it, or where training jobs keep their strategy files."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.geometry.groups import STATES, group_of
from ms_ckpt_ext.core.geometry.layout import layout_from_json
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.resume.candidates import Candidate
from ms_ckpt_ext.engine.resume.records import strategy_folder
from ms_ckpt_ext.errors import CheckpointError, StrategyError, name_ranks
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.table import STRATEGY_SUFFIXES
from ms_ckpt_ext.transport.agree import pack, unpack
from ms_ckpt_ext.transport.base import Transport

_FOLDERS = ("strategy", os.path.join("..", "strategy"))
"""Where MindFormers and most scripts keep them, seen from a checkpoint's folder."""


def find_layouts(transport: Transport[Any], candidate: Candidate, folder: str, probe: bool) -> Optional[Strategy]:
    """The layouts that cut a checkpoint, recorded with it or found beside it; None when it is whole. Collective.

    Args:
        transport: between the ranks, of which one per host is a `probe` and looks into files.
        candidate: in `folder` on this host.

    Raises:
        StrategyError: on all ranks: there are none, or they are damaged or contradict each other.
    """
    if candidate.whole:
        return None
    mine = _layouts_near(folder, candidate) if probe else _Found([], "", "", False)
    answers = [_Found(*unpack(answer)) for answer in transport.share(pack(mine))]
    answers = [answer for answer in answers if answer.recorded and answer.items] or answers
    origin = next((answer.origin for answer in answers if answer.items), "")
    if not origin:
        problem = next((answer.problem for answer in answers if answer.problem), "") or candidate.unlike
        if problem or len(candidate.files) > 1:
            raise StrategyError(problem or "no layouts of the job that saved it: give train_strategy_filename")
        return None
    items = [LayoutItem(name, stage, layout_from_json(raw)) for answer in answers for name, stage, raw in answer.items]
    return Strategy.from_items(items, origin)


def check_alike(transport: Transport[Any], candidate: Candidate, folder: str, probe: bool) -> None:
    """What was trained must be alike on all ranks that noted no layouts, for it is taken for whole. Collective.

    A network that MindSpore did not cut tells no layouts, whether its ranks hold the same or it cuts its slices itself.
    The digests on record tell. Statistics of a rank's own, which no optimizer has a state of, may differ.

    Args:
        as of `find_layouts`.

    Raises:
        StrategyError: on all ranks: a parameter with a state of an optimizer differs between ranks.
    """
    mine = _trained(folder, candidate) if probe else []
    told = {rank: digest for answer in transport.share(pack(mine)) for rank, digest in unpack(answer)}
    odd = [rank for rank in sorted(told) if told[rank] != told[min(told)]]
    if odd:
        raise StrategyError(
            f"{name_ranks(odd)} saved other values of what was trained than rank {min(told)}, and no layouts: these "
            "are slices, and nothing tells of what; give train_strategy_filename"
        )


def _trained(folder: str, candidate: Candidate) -> list[tuple[int, str]]:
    """(rank, one digest of all that a state of an optimizer is there for), of files on this host with digests."""
    from ms_ckpt_ext.engine.integrity.manifest import load_manifest

    found = []
    for rank, held in candidate.files.items():
        place, name = os.path.split(os.path.join(folder, *held.file.split("/")))
        manifest = None
        with suppress(CheckpointError):  # of a folder that cannot be read; its file is looked at later
            manifest = load_manifest(place)
        digests = manifest.files[name].tensors if manifest is not None and name in manifest.files else {}
        states = {each.partition(".")[2] for each in digests if group_of(each, digests) == STATES}
        trained = sorted((each, digests[each]) for each in states & digests.keys())
        if trained:
            found.append((rank, xxhash.xxh3_128_hexdigest(repr(trained).encode())))
    return found


class _Found(NamedTuple):
    """Layouts on one host: entries as JSON, where they are from, what was wrong, and whether they were recorded."""

    items: list[Any]
    origin: str
    problem: str
    recorded: bool


def _layouts_near(folder: str, candidate: Candidate) -> _Found:
    recorded = [strategy_folder(folder, home) for home in candidate.homes()] if candidate.job else []
    beside = [] if candidate.records else [os.path.join(folder, near) for near in _FOLDERS]
    noted = [*filter(os.path.isdir, recorded)]
    places = noted or [*filter(os.path.isdir, beside)][:1]
    items: dict[str, Any] = {}
    try:
        for place in places:
            items.update((json.dumps(item), item) for item in _items_in(place))
    except CheckpointError as error:
        return _Found([], "", str(error), bool(noted))
    origin = " and ".join(f"strategy directory {os.path.normpath(place)!r}" for place in places)
    return _Found(list(items.values()), origin, "", bool(noted))


def _items_in(folder: str) -> list[Any]:
    """The layouts of all files of a folder, each once: every rank of a stage may have saved the same."""
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    found: dict[str, Any] = {}
    for path in rank_folders.inside(Path(folder), Path.is_file):
        if path.suffix in STRATEGY_SUFFIXES:
            for item in entries(load_strategy(path)):
                found.setdefault(json.dumps(item), item)
    return list(found.values())


def entries(strategy: Strategy) -> list[Any]:
    """A strategy as JSON: an entry for every parameter and stage."""
    return [[name, stage, layout] for name, stages in strategy.layouts.items() for stage, layout in stages.items()]
