"""Numbers and switches that a rule file gives by keys of Hugging Face's config.json.

What the caller gives takes precedence over config.json, and that over the file's own defaults. A number may be a sum
of products of keys, also divided: `"num_heads * head_dim + 8"`, `"hidden_size // num_heads"`. A default may be
such a text, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.errors import FormatError, UsageError
from ms_ckpt_ext.storage.reader import read_json

CONFIG_NAME = "config.json"
_MOST = 1 << 62
_DIGITS = 30
"""Most digits of a number that is parsed: more than `_MOST` has."""


class Config(NamedTuple):
    """The contents of a config.json, and its path; "" when there is none."""

    values: Mapping[str, Any]
    path: str


def read_config(path: Optional[str], needed: bool = False) -> Config:
    """Read the config.json of a path: the file itself, or one in the folder; empty without a path, or if none is there.

    Raises:
        UsageError: there is none, and it is `needed`.
        FormatError: it is not JSON, or no object.
        StorageError: it cannot be read.
    """
    if path is not None and not path.endswith(".json"):
        path = os.path.join(path, CONFIG_NAME)
        if not os.path.isfile(path) and needed:
            raise UsageError(f"there is no {path!r}: give Hugging Face's config.json, or a folder that has one")
        path = path if os.path.isfile(path) else None
    if path is None:
        return Config({}, "")
    values = read_json(path, "the configuration")
    if not isinstance(values, dict):
        raise FormatError(f"the configuration {path!r} is no JSON object, but {type(values).__name__}")
    return Config(values, path)


class Sizes:
    """The values of the keys in a rule file.

    Attributes:
        config: where most of them come from.
    """

    def __init__(self, given: Mapping[str, Any], config: Config, defaults: Mapping[str, Any]) -> None:
        self._given, self.config, self._defaults = given, config, defaults

    def value(self, key: str) -> Any:
        """The value of a key. Raises UsageError when it has none."""
        if key in self._given:
            return self._given[key]
        found = self.config.values.get(key)
        if found is not None:
            return found
        if key not in self._defaults:
            where = f"{self.config.path!r} does not have" if self.config.path else "no config.json was found to have"
            raise UsageError(
                f"{key!r}, which {where}: name the folder or file of Hugging Face's config.json, or give the number"
            )
        default = self._defaults[key]
        if not isinstance(default, str):
            return default
        others = {name: other for name, other in self._defaults.items() if name != key}
        return Sizes(self._given, self.config, others).number(default)

    def number(self, text: Any) -> int:
        """An int, or a sum of products of ints and keys, divided or not. Raises UsageError for anything else."""
        if isinstance(text, bool) or not isinstance(text, (int, str)):
            raise UsageError(f"{text!r:.60}, which is no whole number and no key of config.json")
        if isinstance(text, int):
            return _bounded(text, str(text))
        return _bounded(sum(map(self._term, text.split("+"))), text)

    def _term(self, text: str) -> int:
        found, *divisors = map(self._product, text.split("//"))
        for divisor in divisors:
            if not divisor:
                raise UsageError(f"{text.strip()!r}, which divides by zero")
            found //= divisor
        return found

    def _product(self, text: str) -> int:
        found = 1
        for factor in text.split("*"):
            found = _bounded(found * self._factor(factor.strip()), text)
        return found

    def _factor(self, text: str) -> int:
        if text.isdecimal():
            return int(text) if len(text) <= _DIGITS else _MOST + 1
        if not text.isidentifier():
            raise UsageError(
                f"{text!r}, which is no key of config.json: a sum of products of keys and numbers is meant"
            )
        found = self.value(text)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found <= _MOST:
            raise UsageError(f"{text!r}, which is {found!r:.60} where a whole number is needed")
        return found


def _bounded(number: int, text: str) -> int:
    """`number`, if a size can be that large. Raises UsageError otherwise."""
    if number > _MOST:
        raise UsageError(f"{text.strip()[:60]!r}, which is more than any size")
    return number
