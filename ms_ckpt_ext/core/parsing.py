"""JSON that others wrote: what can be wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any, Union


def from_json(text: Union[bytes, str]) -> Any:
    """What a text says. Raises ValueError when it is no JSON, or nested deeper than Python reads.

    >>> from_json(b'{"a": [1, 2]}')
    {'a': [1, 2]}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
