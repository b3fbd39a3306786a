"""MindSpore's deprecated way to choose parameters: by the beginnings of their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional, Union

from ms_ckpt_ext.api.arguments import checked_naming
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.source.renaming import Choice, Naming

Prefix = Union[str, list[str], tuple[str, ...], None]


def as_stock(
    specify: Prefix, filters: Prefix, choice_func: Optional[Choice], name_map: Optional[Mapping[str, str]]
) -> Optional[Naming]:
    """Names as MindSpore's loads choose them: prefixes before `choice_func`; its result counts by its truth.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments.
    """
    return checked_naming(_prefixes(specify, filters) or choice_func, name_map, truthy=True)


def _prefixes(specify: Prefix, filters: Prefix) -> Optional[Choice]:
    """MindSpore's deprecated arguments as a choice function; None when neither is given."""
    keep, drop = _prefix(specify, "specify_prefix"), _prefix(filters, "filter_prefix")
    if not keep and not drop:
        return None
    return lambda name: (not keep or name.startswith(keep)) and not name.startswith(drop or ("\0",))


def _prefix(value: Prefix, argument: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (str, list, tuple)) or not all(isinstance(each, str) for each in value):
        raise ArgumentTypeError(f"{argument} must be a str, or a list or tuple of them, got {value!r}")
    listed = (value,) if isinstance(value, str) else tuple(value)
    if not listed or "" in listed:
        raise UsageError(f"{argument} must not be empty nor hold an empty str; pass None for no condition")
    return listed
