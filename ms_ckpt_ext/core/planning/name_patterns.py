"""Names with placeholders: `layers.{layer}.w`, or `layers.{}.w`, where a placeholder stands for digits.

`{layer<61}` stands for numbers below 61 only, and `{3<=layer<61}` for those from 3 on. `{*}` stands for any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Optional

from ms_ckpt_ext.errors import UsageError

_PLACEHOLDER = re.compile(r"\{(?:(\d+)<=)?(\w*|\*)(?:<(\d+))?\}")
ANY = "*"
"""The key of the placeholder that stands for any text."""
_DIGITS = 18
"""Of a number that a placeholder stands for."""


class Pattern:
    """A name with placeholders. Those without a name are numbered from the left.

    >>> Pattern("layers.{}.experts.{expert}.w").match("layers.3.experts.12.w")
    {'_0': '3', 'expert': '12'}
    >>> Pattern("blocks.{}.w").fill({"_0": "3"})
    'blocks.3.w'

    Raises:
        UsageError: at birth, when a placeholder stands twice, or where one number ends and the next begins is not told.
    """

    def __init__(self, text: str) -> None:
        pieces = _PLACEHOLDER.split(text)
        self.text = text
        self.keys: list[str] = []
        plain = 0
        for key in pieces[2::4]:
            self.keys.append(key or f"_{plain}")
            plain += not key
        if len(set(self.keys)) != len(self.keys):
            raise UsageError(f"{text!r} names a placeholder twice")
        self._literals = pieces[::4]
        self._refuse_run_together()
        bounds = zip(self.keys, pieces[1::4], pieces[3::4])
        self._bounds = {
            key: (int(low or 0), None if high is None else int(high)) for key, low, high in bounds if low or high
        }
        body = re.escape(self._literals[0])
        for key, literal in zip(self.keys, self._literals[1:]):
            body += (r"(?P<_any>.+)" if key == ANY else rf"(?P<{key}>[0-9]{{1,{_DIGITS}}})") + re.escape(literal)
        self._match = re.compile(body)

    def _refuse_run_together(self) -> None:
        """Numbers with nothing or with digits between them have many readings, and trying all takes long."""
        for one, between, other in zip(self.keys, self._literals[1:], self.keys[1:]):
            if ANY not in (one, other) and (not between or between.isdecimal()):
                raise UsageError(
                    f"{self.text!r}: where the number {{{one.lstrip('_')}}} ends and {{{other.lstrip('_')}}} begins is "
                    "not told; put something other than digits between them"
                )

    def match(self, name: str) -> Optional[dict[str, str]]:
        """Placeholder -> what it stands for, or None when `name` is another one."""
        found = self._match.fullmatch(name)
        if found is None or not all(self._within(key, int(found[key])) for key in self._bounds):
            return None
        return {ANY if key == "_any" else key: text for key, text in found.groupdict().items()}

    def _within(self, key: str, number: int) -> bool:
        low, high = self._bounds[key]
        return low <= number and (high is None or number < high)

    def count(self) -> int:
        """How many names `every` gives."""
        bounds = [self._bounds.get(key, (0, None)) for key in self.keys]
        return prod(0 if high is None else max(0, high - low) for low, high in bounds)

    def every(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name, its numbers) for all numbers that the placeholders stand for; nothing where one has no end.

        >>> [name for name, _ in Pattern("blocks.{1<=n<3}.w").every()]
        ['blocks.1.w', 'blocks.2.w']
        """
        bounds = [self._bounds.get(key, (0, None)) for key in self.keys]
        ranges = [range(low, high) for low, high in bounds if high is not None]
        if len(ranges) == len(bounds):
            for numbers in product(*(map(str, each) for each in ranges)):
                yield self.fill(dict(zip(self.keys, numbers))), numbers

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with values put in. Raises UsageError for a placeholder without a value."""
        absent = [key for key in self.keys if key not in values]
        if absent:
            raise UsageError(
                f"{self.text!r} has the placeholder {absent[0].lstrip('_')!r}, which its sources do not have"
            )
        return self._literals[0] + "".join(values[k] + text for k, text in zip(self.keys, self._literals[1:]))
