"""The Parameters of a planned transfer as they are when it is run: other objects may have their names now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ms_ckpt_ext.bridge.match import Match, castable, fits
from ms_ckpt_ext.bridge.transfer.sides import plain
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


class PlannedParameter(NamedTuple):
    """What a Parameter of the source was when the transfer was planned."""

    dtype: str
    shape: Shape

    @classmethod
    def of(cls, parameter: Any) -> PlannedParameter:
        """What it is now."""
        return cls(str(parameter.dtype), tuple(parameter.shape))

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)}"


def present_source(name: str, held: Mapping[str, Any], planned: PlannedParameter) -> Any:
    """The Parameter that now has a name that the plan reads.

    Raises:
        UsageError: there is no longer one, or it has no contents.
        LayoutMismatchError: it has another shape or dtype.
    """
    parameter = _present(name, held, "source")
    if getattr(parameter, "is_meta", False):
        raise UsageError(f"parameter {name!r} of the source is a meta Parameter, which has no contents")
    now = PlannedParameter.of(parameter)
    if now != planned:
        raise LayoutMismatchError(f"parameter {name!r} of the source is {now} now, and was {planned} {_ADVICE}")
    return parameter


def present_target(match: Match, held: Mapping[str, Any]) -> Match:
    """A match with the Parameter that has its name now. Raises as `present_source`."""
    name = match.parameter.name
    found = match._replace(parameter=_present(name, held, "target"))
    if not fits(found) or not (found.parameter.dtype == match.offer.dtype or castable(found.parameter, match.offer)):
        now = PlannedParameter.of(found.parameter)
        raise LayoutMismatchError(
            f"parameter {name!r} of the target is {now} now, and took {match.offer.dtype} of shape "
            f"{list(match.offer.shape)} {_ADVICE}"
        )
    return found


def refuse_parted(source: Mapping[str, Any], target: Mapping[str, Any], stay: Mapping[str, str]) -> None:
    """Raise UsageError where a Parameter that both sides shared no longer is. `stay`: name in the target -> source."""
    for name, given in stay.items():
        if plain(_present(name, target, "target")) is not plain(_present(given, source, "source")):
            raise UsageError(f"parameter {name!r} of the target is not {given!r} of the source now, and was {_ADVICE}")


_ADVICE = "when the transfer was planned: nothing was moved; plan anew"


def _present(name: str, held: Mapping[str, Any], side: str) -> Any:
    if name not in held:
        raise UsageError(f"the {side} has no parameter {name!r} any more, which it had {_ADVICE}")
    return held[name]
