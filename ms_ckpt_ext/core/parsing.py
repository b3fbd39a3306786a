"""Values as others give them: integers and flags of callers, JSON of files."""

from __future__ import annotations

import json
import operator
from typing import Any, Optional, Union

from ms_ckpt_ext.errors import ArgumentTypeError, UsageError


def from_json(text: Union[bytes, str]) -> Any:
    """What a text says. Raises ValueError when it is no JSON, or nested deeper than Python reads.

    >>> from_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def integer(value: Any, argument: str, least: Optional[int] = None, kind: str = "an int") -> int:
    """An integer of any kind as an int. True and False are none.

    Raises:
        ArgumentTypeError: it is no integer; `argument` is what it is called, `kind` what it may be.
        UsageError: it is below `least`.
    """
    try:
        if type(value).__name__ in ("bool", "bool_"):  # Python's, and numpy's, which is not imported here
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{argument} must be {kind}, got {type(value).__name__} {value!r:.60}") from None
    if least is not None and number < least:
        raise UsageError(f"{argument} must be at least {least}, got {number}")
    return number


def true_or_false(value: Any, argument: str) -> bool:
    """True or False, numpy's included, as a bool. Raises ArgumentTypeError for anything else, whatever its truth."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ArgumentTypeError(f"{argument} must be True or False, got {value!r:.60}")
    return bool(value)
