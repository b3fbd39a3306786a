"""How names are spread over parts: by the plain rule, which is spelled out here, at any number of names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.engine.files import merge as jobs


def one_by_one(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Largest first, each to the first of the groups with the least so far."""
    groups: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        min(groups, key=lambda group: sum(sizes[n] for n in group)).append(name)
    return groups


def one_more_each_time(sizes: Mapping[str, int], count: int, most: int) -> list[list[str]]:
    """The first number of groups of which none but that of a single name is above the limit."""
    groups = one_by_one(sizes, count)
    while any(len(group) > 1 and sum(sizes[n] for n in group) > most for group in groups):
        groups = one_by_one(sizes, len(groups) + 1)
    return groups


SIZES = st.one_of(st.lists(st.integers(0, 12), min_size=1, max_size=14), st.lists(st.integers(0, 3), min_size=1))


@given(SIZES.map(lambda sizes: {f"w{number}": size for number, size in enumerate(sizes)}), st.integers(1, 20))
def test_the_same_parts_as_one_by_one(sizes: dict[str, int], most: int) -> None:
    count = min(max(math.ceil(sum(sizes.values()) / most), 1), len(sizes))
    assert jobs._balanced(sizes, count) == one_by_one(sizes, count)
    assert jobs._limited(sizes, count, most) == one_more_each_time(sizes, count, most)
    assert jobs._limited(sizes, 1, most) == one_more_each_time(sizes, 1, most)


class Counting(dict[str, int]):
    """Sizes that count how often all names are gone through: once by every try."""

    passes = 0

    def __iter__(self) -> Iterator[str]:
        self.passes += 1
        return super().__iter__()


def test_many_parts_are_found_in_few_steps() -> None:
    """Four of every five names need a part of their own, 800 more parts than their bytes ask for."""
    sizes = Counting((f"w{number}", 6 if number % 5 else 1) for number in range(2000))
    groups = jobs._limited(sizes, math.ceil(sum(sizes.values()) / 10), 10)
    assert 1 < sizes.passes <= 2 * math.log2(len(sizes)) + 1
    assert len(groups) == 1600 and sorted(n for group in groups for n in group) == sorted(sizes)
