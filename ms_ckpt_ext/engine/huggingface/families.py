"""The rule files that come with the package (`configs/rules` in a checkout), or a user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms_ckpt_ext.engine.huggingface.rule_file import Family, family_of
from ms_ckpt_ext.engine.huggingface.sizes import Config
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage.reader import read_json

RULES_FOLDER = Path(__file__).resolve().parent / "rules"


def family_names() -> list[str]:
    """The families whose rules come with the package."""
    return sorted(path.stem for path in RULES_FOLDER.glob("*.json"))


def read_family(name: str, config: Config, given: Mapping[str, Any] = {}) -> Family:
    """The rules of a family, by its name or the path of a rule file, for one model.

    Args:
        config: of the model.
        given: key -> value, which takes precedence over `config`.

    Raises:
        UsageError: there is no such family, or the file is no rule file; says what is wrong.
        StorageError: the file cannot be read.
    """
    family = family_of(document_of(name), _path(name), config, given)
    unknown = [key for key in given if key not in family.switches and key not in config.values]
    if unknown and config.path:
        raise UsageError(
            f"{unknown[0]!r} is no key of {config.path!r}, nor one of the rule file {family.origin!r}, which has "
            f"{', '.join(family.switches) or 'none'}: check its spelling"
        )
    return family


def family_for(config: Config) -> str:
    """The name of the family that has the model's architecture. Raises UsageError when none or several have it."""
    architectures = config.values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(each, str) for each in architectures):
        raise UsageError(f"{config.path!r} says architectures {architectures!r:.60}, which should be a list of names")
    known = {name: document_of(name).get("architectures", ()) for name in family_names()}
    fitting = [name for name, has in known.items() if any(each in has for each in architectures)]
    if len(fitting) != 1:
        where = f"{config.path!r} says {architectures!r:.200}" if config.path else "there is no config.json to tell it"
        raise UsageError(
            f"which rules the model needs is not known: {where}. Give rules: one of {', '.join(known)}, the path of a "
            "rule file, or a list of weight rules"
        )
    return fitting[0]


def document_of(name: str) -> Any:
    """The contents of a rule file, unchecked. Raises as `read_family`."""
    path = _path(name)
    return read_json(path, "rule file", UsageError)


def _path(name: str) -> str:
    own = RULES_FOLDER / f"{name}.json"
    if os.sep not in name and os.path.isfile(own):
        return os.fspath(own)
    if not os.path.isfile(name):
        raise UsageError(
            f"no rules {name!r}: it is neither one of {', '.join(family_names())} nor the path of a rule file "
            f"(copy one of those in {os.fspath(RULES_FOLDER)!r} to begin with)"
        )
    return name
