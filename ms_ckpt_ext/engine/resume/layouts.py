"""The layouts of the job that saved a checkpoint: noted with it, or where training jobs keep their strategy files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import layout_from_json
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.resume.candidates import Candidate
from ms_ckpt_ext.engine.resume.records import strategy_folder
from ms_ckpt_ext.errors import CheckpointError, StrategyError
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
