"""Sources joined group by group along an axis, and how wide each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import gcd
from typing import Optional

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.recipes import Block, made_of, seen_as
from ms_ckpt_ext.core.planning.rule import Rule, shapes_of
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


def checked_shares(rule: Rule, shares: Optional[Sequence[int]]) -> Optional[tuple[int, ...]]:
    if shares is None:
        return None
    if (
        not isinstance(shares, Sequence)
        or len(shares) != len(rule.sources)
        or any(not isinstance(share, int) or isinstance(share, bool) or share < 1 for share in shares)
    ):
        raise UsageError(
            f"rule for {rule.target!r}: shares must be {len(rule.sources)} whole numbers from 1, one for every source, "
            f"got {shares!r}"
        )
    return tuple(shares)


def unsaid_shares(rule: Rule, shares: Optional[Shape]) -> str:
    several = len(rule.sources) > 1 and shares is None
    return "it does not say how wide its sources are: give shares=, one number a source" if several else ""


def unsaid_count(rule: Rule) -> str:
    return "a placeholder of its sources counts, and how far is not known: name them one by one" if rule.counts else ""


def widths_of(rule: Rule, name: str, width: int, shares: Optional[Shape]) -> list[int]:
    """A width divided by the shares of a rule's sources, equal where it has none.

    Raises LayoutMismatchError when it does not divide.
    """
    shares = shares or (1,) * len(rule.sources)
    least = gcd(*shares)
    unit, rest = divmod(width * least, sum(shares))
    if rest:
        raise LayoutMismatchError(f"{name!r}: {width} rows cannot be shared out as {list(shares)}")
    return [unit * (share // least) for share in shares]


def taken_apart(
    rule: Rule, name: str, shape: Shape, groups: int, axis: int, shares: Optional[Shape]
) -> list[list[Shape]]:
    """Shapes of what `joined_in_groups` joins to `shape`."""
    at = axis_of(name, axis, len(shape))
    if shape[at] % groups:
        raise LayoutMismatchError(f"{name!r}: axis {at} of {list(shape)} does not fall into {groups} equal groups")
    widths = widths_of(rule, name, shape[at] // groups, shares)
    return [[(*shape[:at], width * groups, *shape[at + 1 :])] for width in widths]


def require_shares(name: str, widths: Sequence[int], shares: Optional[Shape], tensors: Sequence[SourceTensor]) -> None:
    if shares is not None and [width * sum(shares) for width in widths] != [share * sum(widths) for share in shares]:
        raise LayoutMismatchError(f"{name!r}: {shapes_of(tensors)} are not as wide as the shares {list(shares)} say")


def joined_in_groups(
    name: str, tensors: Sequence[SourceTensor], groups: int, axis: int, shares: Optional[Shape] = None
) -> SourceTensor:
    """Sources cut into groups along an axis and joined group by group."""
    shape = tensors[0].meta.shape
    at = axis_of(name, axis, len(shape))
    outer, inner = shape[:at], shape[at + 1 :]
    for tensor in tensors:
        other = tensor.meta.shape
        if (other[:at], other[at + 1 :]) != (outer, inner) or other[at] % groups:
            raise LayoutMismatchError(
                f"{name!r}: {shapes_of(tensors)} cannot be joined along axis {at}"
                + (f" in {groups} equal groups" if groups > 1 else "")
            )
    rows = [tensor.meta.shape[at] // groups for tensor in tensors]
    require_shares(name, rows, shares, tensors)
    offsets = [0, *accumulate(rows)]
    blocks = []
    for tensor, width, offset in zip(tensors, rows, offsets):
        seen = seen_as(tensor, (*outer, groups, width, *inner))
        start = tuple(offset if number == at + 1 else 0 for number in range(len(shape) + 1))
        blocks.append(block_of(seen, tuple(range(len(shape) + 1)), start))
    return made_of(name, (*outer, groups * offsets[-1], *inner), (*outer, groups, offsets[-1], *inner), blocks)


def axis_of(name: str, axis: int, count: int) -> int:
    if not -count <= axis < count:
        raise LayoutMismatchError(f"{name!r}: there is no axis {axis} among {count}")
    return axis % count


def block_of(tensor: SourceTensor, axes: tuple[int, ...], start: Shape) -> Block:
    return Block(tensor, Region.whole(tensor.meta.shape), axes, start)
