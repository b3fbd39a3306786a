"""What every Parameter of a network takes, settled before a byte of it is read.

1. Parameters and names in the checkpoint are matched, as if everything that no strategy lists were alike.
2. What is wanted of that is compared: by the rank alone, or by all ranks together.
3. Each Parameter gets its box: what is alike as everywhere, what differs from the file of the very rank.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, NamedTuple

from ms_ckpt_ext.bridge.match import (
    Matches,
    check_cell,
    check_fit,
    is_parallel,
    match_parameters,
    offer_of,
    offers_to,
    told_passed,
)
from ms_ckpt_ext.engine.taking import Takes, Taking
from ms_ckpt_ext.errors import LayoutMismatchError

log = logging.getLogger("ms_ckpt_ext")


class Manner(NamedTuple):
    """How Parameters are matched.

    Attributes:
        strict: no casts.
        exact: no names by suffix.
        require_all: a Parameter that the checkpoint has nothing for is an error.
    """

    strict: bool
    exact: bool
    require_all: bool = False


def matched(network: Any, taking: Taking, manner: Manner) -> Matches:
    """Step 1.

    Raises:
        ArgumentTypeError, UsageError, UnsupportedError, LayoutMismatchError: as `match_parameters` and `Taking.all`.
        CoverageError: the checkpoint should have a Parameter, and has not.
    """
    check_cell(network)
    found = match_parameters(network, taking.catalog, offers_to(taking), manner.exact)
    _require(found, manner)
    return found


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

    Raises LayoutMismatchError, CoverageError: a Parameter cannot be given what is its, named.
    """
    found = _of_this_stage(network, found, taking)
    _require(found, manner)
    taking.refuse_others(match.name for match in found.matches)
    known = offers_to(taking)
    matches = []
    for each in found.matches:
        settled = each.offer.open and each.name not in taking.catalog.extras
        offer = offer_of(taking.catalog, own(each.name)) if settled else known[each.name]
        matches.append(each._replace(offer=offer))
        check_fit(matches[-1], manner.strict)
    return found._replace(matches=matches)


def _of_this_stage(network: Any, found: Matches, taking: Taking) -> Matches:
    """Without what differs by rank and is of other pipeline stages: in the source, or by what MindSpore has cut, where
    the target speaks of one stage only."""
    parallel = is_parallel(network)
    unknown = taking.partial and not taking.stands and parallel
    own = [match for match in found.matches if match.name in taking.catalog.own]
    idle = {m.name: m for m in own if taking.elsewhere(m.name) or (unknown and not m.parameter.sliced)}
    if idle:
        log.info("not loaded, for they differ by rank and are of other pipeline stages: %s", sorted(idle))
    missing = [match.parameter.name for match in idle.values() if not parallel or match.parameter.sliced]
    kept = [match for match in found.matches if match.name not in idle]
    return found._replace(matches=kept, missing=[*found.missing, *missing])
