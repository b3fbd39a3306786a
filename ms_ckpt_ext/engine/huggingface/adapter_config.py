"""The configuration of a LoRA adapter, adapter_config.json: what its products are multiplied by.

Some of what PEFT trains is no sum of a weight and a product. It is refused, by the key that says so.
"""

from __future__ import annotations

import re
from math import isfinite, sqrt
from typing import Any, Optional

from ms_ckpt_ext.errors import FormatError, UsageError

_LITERAL = re.compile(r"\^?[\w.-]+")
ELSEWHERE = "merge it with PEFT (`merge_and_unload`), save the model, and give that"
_REFUSED = {
    "use_dora": "DoRA, which also scales the columns of every weight",
    "modules_to_save": "whole modules that were trained",
    "trainable_token_indices": "trained rows of an embedding",
    "lora_bias": "biases of its products",
    "layer_replication": "layers that stand several times",
    "target_parameters": "products for parameters that are no module's weight",
    "alora_invocation_tokens": "products that act behind some tokens only",
    "arrow_config": "a choice of products for every token",
    "megatron_config": "the slices of Megatron's parallel layers",
}
"""Key of the configuration -> what an adapter has where it is set."""
_USES = ("use_rslora",)
_STARTS = ("gaussian", "eva", "orthogonal")
"""Ways of `init_lora_weights` to begin a training that leave the weights of the model as they were."""


class AdapterConfig:
    """The contents of adapter_config.json.

    Raises FormatError when a value is none that PEFT writes; names file and key.
    """

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, dict):
            raise FormatError(f"the configuration {path!r} is no JSON object, but {type(values).__name__}")
        self._values, self.path = values, path

    def flag(self, key: str) -> bool:
        """A switch, false where it is not there."""
        value = self._values.get(key)
        if value not in (True, False, None):
            raise FormatError(f"{self.path!r} says {key} {value!r:.60}, which should be true or false")
        return bool(value)

    def check(self) -> None:
        """Raise UsageError for adapters that are more, or other, than products that are added to weights."""
        kind = self._values.get("peft_type", "LORA")
        if kind != "LORA":
            raise UsageError(f"{self.path!r} is of an adapter of type {kind!r:.60}, and only LORA can be added")
        for key, what in _REFUSED.items():
            if self._values.get(key):
                raise self._refused(key, what)
        for key in self._values:
            if str(key).startswith("use_") and key not in _USES and self._values[key]:
                raise self._refused(key, "a variant of LoRA that is not known here")
        if self._values.get("bias", "none") != "none":
            raise self._refused("bias", "trained biases")
        start = self._values.get("init_lora_weights")
        if not isinstance(start, bool) and start is not None and start not in _STARTS:
            raise self._refused("init_lora_weights", "a start from weights that were changed before the training")

    def _refused(self, key: str, what: str) -> UsageError:
        value = self._values[key]
        return UsageError(f"{self.path!r} says {key} {value!r:.60}: the adapter has {what}; {ELSEWHERE}")

    def rank(self, module: str) -> Optional[int]:
        """r of a module, where the configuration says it."""
        rank = self._of("rank_pattern", module, self._values.get("r"))
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise FormatError(
                f"{self.path!r} says r {rank!r:.60} for {module!r}, which should be a whole number from 1"
            )
        return rank

    def factor(self, module: str, rank: int) -> float:
        """What a module's product is multiplied by."""
        if "lora_alpha" not in self._values:
            raise FormatError(
                f"{self.path!r} has no lora_alpha, by which products are scaled: get it from the training"
            )
        alpha = self._of("alpha_pattern", module, self._values["lora_alpha"])
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not _is_finite(alpha):
            raise FormatError(f"{self.path!r} says lora_alpha {alpha!r:.60} for {module!r}, which should be a number")
        return float(alpha) / (sqrt(rank) if self.flag("use_rslora") else rank)

    def _of(self, key: str, module: str, default: Any) -> Any:
        """The value that the first pattern with the module's name has: the end of a name, or with ^ all of it."""
        patterns = self._values.get(key) or {}
        if not isinstance(patterns, dict):
            raise FormatError(f"{self.path!r} says {key} {patterns!r:.60}, which should be an object")
        for pattern, value in patterns.items():
            if not _LITERAL.fullmatch(pattern):
                raise UsageError(
                    f"{self.path!r} has {pattern!r:.80} in {key}, a regular expression, and only names of modules and "
                    f"ends of such are known here; {ELSEWHERE}"
                )
            if module == pattern[1:] if pattern.startswith("^") else f".{module}".endswith(f".{pattern}"):
                return value
        return default

    def targets(self) -> tuple[str, ...]:
        """The ends of names that target_modules lists; none where it is an expression, or modules are left out."""
        listed = self._values.get("target_modules")
        if not isinstance(listed, list) or self._values.get("exclude_modules"):
            return ()
        return tuple(each for each in listed if isinstance(each, str) and each)


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # a whole number that is none of floating point
        return False
