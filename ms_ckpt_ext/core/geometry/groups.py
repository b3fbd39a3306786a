"""What a parameter is for: a weight, an optimizer state, or a training scalar, told by its name.

MindSpore names an optimizer state after its weight, `Parameter.clone(prefix=…)`: `adam_m.layers.0.weight`. Prefixes
that are no words of a network always mean that; the others only where the rest is a parameter itself (`linear` is a
state of FTRL, and a likely name of a layer).
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import lru_cache
from typing import Optional

WEIGHTS, STATES, SCALARS = "weights", "optimizer states", "scalars"
GROUPS = (WEIGHTS, STATES, SCALARS)
# From `mindspore/nn/optim`, `mindspore/experimental/optim` and `mindspore/mint/optim` of MindSpore 2.10.
_CLEAR = {"adam_m", "adam_v", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "moment", "moment1", "moment2"} | {
    "moments",
    "momentum_buf",
    "lamb_m",
    "lamb_v",
    "vhat",
    "mean_grad",
    "mean_square",
    "accum_update",
}
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")
_AMBIGUOUS = {"accum", "ax", "ax_", "linear", "prev", "stat", "step_size"}


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbered parts of names by their number.

    >>> sorted(["layers.10.w", "layers.9.w"], key=natural)
    ['layers.9.w', 'layers.10.w']
    """
    return [*map(_natural_part, name.split("."))]


@lru_cache(maxsize=4096)
def _natural_part(part: str) -> tuple[int, str]:
    number = number_in(part)
    return (-1, part) if number is None else (number, "")


def number_in(part: str) -> Optional[int]:
    """The number that a part of a name is, as layers are numbered; None where it is none.

    >>> number_in("12"), number_in("012"), number_in("w"), number_in("1" * 5000)
    (12, None, None, None)
    """
    return int(part) if _NUMBER.fullmatch(part) else None


def group_of(name: str, names: Container[str]) -> str:
    """Weight or optimizer state, given the names of all parameters.

    >>> group_of("adam_m.w", {"w", "adam_m.w"}), group_of("linear.weight", {"linear.weight"})
    ('optimizer states', 'weights')
    """
    prefix, _, rest = name.partition(".")
    if rest and (prefix in _CLEAR or (prefix in _AMBIGUOUS and rest in names)):
        return STATES
    return WEIGHTS
