"""Rules as data: those of a family of models by its name, or of a rule file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Optional, Union

from ms_ckpt_ext.api.arguments import PathLike, path_of
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.engine.huggingface.families import family_for, read_family
from ms_ckpt_ext.engine.huggingface.rule_file import Family
from ms_ckpt_ext.engine.huggingface.sizes import Config, read_config
from ms_ckpt_ext.errors import ArgumentTypeError

SizesLike = Mapping[str, Union[int, bool, None]]
"""Key of config.json, or switch of a rule file -> its value."""


def load_rules(
    rules: Optional[PathLike] = None, config: Optional[PathLike] = None, sizes: Optional[SizesLike] = None
) -> list[Rule]:
    """The weight rules of a family of models, from Hugging Face's names to those of MindFormers' training.

    Args:
        rules: the family's name ("llama", "qwen2", "qwen3", "qwen3-moe", "deepseek-v3"), or the path of a rule file.
            None for the family that has the architecture of `config`.
        config: Hugging Face's config.json, or a folder with one: numbers of heads, experts and layers.
        sizes: key of config.json -> number, and switch of the rule file -> value; they take precedence.

    Returns:
        The rules, in the order in which they apply.

    Raises:
        UsageError: no such family, or an invalid rule file; the message names file, rule and key.
        FormatError, StorageError: config.json or the rule file cannot be read.

    >>> from ms_ckpt_ext import load_rules
    >>> sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    >>> load_rules("qwen3", sizes=sizes)[0].target
    'embedding.word_embeddings.weight'
    """
    found = read_config(None if config is None else path_of(config, "config"), needed=True)
    return list(family_from(rules, found, sizes).rules)


def family_from(rules: Optional[PathLike], config: Config, sizes: Optional[SizesLike]) -> Family:
    """The family of `load_rules`. Raises as `load_rules`."""
    given = {} if sizes is None else sizes
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ArgumentTypeError(f"sizes must map keys of config.json to numbers, got {given!r:.60}")
    name = family_for(config) if rules is None else _named(rules)
    return read_family(name, config, given)


def _named(rules: Any) -> str:
    if not isinstance(rules, (str, os.PathLike)):
        raise ArgumentTypeError(f"rules must be a family's name or the path of a rule file, got {type(rules).__name__}")
    return os.fspath(rules)
