"""Names with placeholders: `layers.{layer}.w`, or `layers.{}.w`, where a placeholder stands for digits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Optional

from ms_ckpt_ext.errors import UsageError

_PLACEHOLDER = re.compile(r"\{(\w*)\}")


class Pattern:
    """A name with placeholders. Those without a name are numbered from the left.

    >>> Pattern("layers.{}.experts.{expert}.w").match("layers.3.experts.12.w")
    {'_0': '3', 'expert': '12'}
    >>> Pattern("blocks.{}.w").fill({"_0": "3"})
    'blocks.3.w'

    Raises:
        UsageError: at birth, when a placeholder stands twice.
    """

    def __init__(self, text: str) -> None:
        pieces = _PLACEHOLDER.split(text)
        self.text = text
        self.keys: list[str] = []
        plain = 0
        for key in pieces[1::2]:
            self.keys.append(key or f"_{plain}")
            plain += not key
        if len(set(self.keys)) != len(self.keys):
            raise UsageError(f"{text!r} names a placeholder twice")
        self._literals = pieces[::2]
        body = re.escape(self._literals[0])
        for key, literal in zip(self.keys, self._literals[1:]):
            body += rf"(?P<{key}>\d+)" + re.escape(literal)
        self._match = re.compile(body)

    def match(self, name: str) -> Optional[dict[str, str]]:
        """Placeholder -> digits, or None when `name` is another one."""
        found = self._match.fullmatch(name)
        return None if found is None else found.groupdict()

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with digits put in. Raises UsageError for a placeholder without a value."""
        absent = [key for key in self.keys if key not in values]
        if absent:
            raise UsageError(f"{self.text!r} has the placeholder {absent[0].lstrip('_')!r}, which its sources have not")
        return self._literals[0] + "".join(values[k] + text for k, text in zip(self.keys, self._literals[1:]))
