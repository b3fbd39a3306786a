"""What every Parameter of a network takes, settled before a byte of it is read.

1. Parameters and names in the checkpoint are matched, as if everything that no strategy lists were alike.
2. What is wanted of that is compared: by the rank alone, or by all ranks together.
3. Each Parameter gets its box: what is alike as on every rank, what differs from the rank's own file.
"""

from __future__ import annotations

import re
from typing import Any, Callable, NamedTuple

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import (
    Match,
    Matches,
    check_cell,
    check_fit,
    fits,
    is_parallel,
    match_parameters,
    offer_of,
    offers_to,
    same_shape,
    told_passed,
)
from ms_ckpt_ext.bridge.memory import on_device
from ms_ckpt_ext.engine.load.taking import Takes, Taking
from ms_ckpt_ext.errors import LayoutMismatchError


class Manner(NamedTuple):
    """How Parameters are matched.

    Attributes:
        strict: no casts.
        exact: no names by suffix.
        require_all: a Parameter that the checkpoint has nothing for is an error.
        listed: only what both strategies list, or a map names, is taken, as MindSpore does with `checkpoint_filenames`.
    """

    strict: bool
    exact: bool
    require_all: bool = False
    listed: bool = False


def matched(network: Any, taking: Taking, manner: Manner) -> Matches:
    """Step 1.

    Raises:
        ArgumentTypeError, UsageError, UnsupportedError, LayoutMismatchError: as `match_parameters` and `Taking.all`.
        CoverageError: the checkpoint should have a Parameter, and does not.
    """
    check_cell(network)
    found = match_parameters(network, taking.catalog, offers_to(taking), manner.exact)
    taking.require_common(match.parameter.name for match in found.matches)
    if manner.listed:
        found = _listed(found, taking)
    _require(found, manner)
    return found


def _listed(found: Matches, taking: Taking) -> Matches:
    """Without what one of the strategies does not list; the log names it."""

    def is_listed(match: Match) -> bool:
        renamed = match.offer.tensor.stored_name != match.name
        return renamed or taking.lists(match.name, match.parameter.name)

    kept = [match for match in found.matches if is_listed(match)]
    left = [match for match in found.matches if not is_listed(match)]
    if left:
        log.warning(
            "%d parameters keep the network's values, as the strategies do not list them: %s; resume takes them, "
            "and so does this function with unified_safetensors_dir",
            len(left),
            [match.parameter.name for match in left],
        )
    return found._replace(
        matches=kept,
        missing=[*found.missing, *(match.parameter.name for match in left)],
        unused=[*found.unused, *(match.name for match in left)],
    )


def _require(found: Matches, manner: Manner) -> None:
    if manner.require_all and found.missing:
        raise LayoutMismatchError(
            f"the checkpoint has nothing for {len(found.missing)} parameters of the network, "
            f"{found.missing[:5]}{told_passed(found)}: give name_map where they go by other names, or "
            "allow_missing=True to keep their values"
        )


def open_names(found: Matches) -> list[str]:
    """What step 2 is about, by the names in the checkpoint."""
    return sorted({match.name for match in found.matches if match.offer.open})


def boxes(network: Any, found: Matches, taking: Taking, own: Callable[[str], Takes], manner: Manner) -> Matches:
    """Step 3; `own` gives what the rank takes of its own.

    Raises:
        LayoutMismatchError, CoverageError: a Parameter cannot be given what belongs to it; the message names it.
        UnsupportedError: a Parameter's memory is in a format of its own.
    """
    found = _of_this_stage(network, found, taking)
    _require(found, manner)
    found = _without_schedules(found)
    taking.refuse_others(match.name for match in found.matches)
    taking.refuse_unseen(match.name for match in found.matches)
    known = offers_to(taking)
    matches = []
    for each in found.matches:
        settled = each.offer.open and each.name not in taking.catalog.extras
        takes = own(each.name) if settled else taking.renamed(each.name, each.parameter.name)
        match = each._replace(offer=known[each.name] if takes is None else offer_of(taking.catalog, takes))
        mine = taking.alike_own(each.name) if each.offer.open and not fits(match) else None
        matches.append(match if mine is None else each._replace(offer=offer_of(taking.catalog, mine)))
        check_fit(matches[-1], manner.strict)
    if on_device():
        from ms_ckpt_ext.bridge.npu.formats import refuse_formats

        refuse_formats((match.parameter for match in matches), "network")
    return found._replace(matches=matches)


_SCHEDULE = re.compile(r"(?:.*\.)?learning_rate(?:_group_\d+)?")
"""What MindSpore's optimizers call a learning rate: a number, or a table with one for every step."""


def _without_schedules(found: Matches) -> Matches:
    """Without learning rates of another shape: the job has a new schedule, and the rest of its state is wanted."""
    other = {m.name: m for m in found.matches if _SCHEDULE.fullmatch(m.parameter.name) and not same_shape(m)}
    for match in other.values():
        log.warning(
            "parameter %r keeps the network's value: the checkpoint has one of shape %s, for another schedule, and the "
            "network's is %s",
            match.parameter.name,
            list(match.offer.shape),
            list(match.parameter.shape),
        )
    return found._replace(
        matches=[match for match in found.matches if match.name not in other],
        missing=[*found.missing, *(match.parameter.name for match in other.values())],
        unused=[*found.unused, *other],
    )


def _of_this_stage(network: Any, found: Matches, taking: Taking) -> Matches:
    """Without what differs by rank and is of other pipeline stages: in the source or, where the target describes one
    stage only, by what MindSpore has cut."""
    parallel = is_parallel(network)
    unknown = taking.partial and not taking.stands and parallel
    own = [match for match in found.matches if match.name in taking.catalog.own]
    idle = {m.name: m for m in own if taking.elsewhere(m.name) or (unknown and not m.parameter.sliced)}
    if idle:
        log.info("not loaded, for they differ by rank and are of other pipeline stages: %s", sorted(idle))
    missing = [match.parameter.name for match in idle.values() if not parallel or match.parameter.sliced]
    kept = [match for match in found.matches if match.name not in idle]
    return found._replace(matches=kept, missing=[*found.missing, *missing])
