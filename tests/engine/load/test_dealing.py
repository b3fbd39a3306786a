"""Work on files goes to whoever has the least of those who see the file, and that is found without asking everybody."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Optional

import pytest

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.engine.load.hosts import Work, deal

LARGE = 1 << 20
"""As much of one file is not put together with more of it."""


def by_asking_everybody(work: Sequence[Work], load: list[int], sees: Optional[Sees]) -> list[int]:
    ranks = [0] * len(work)
    for number, (file, nbytes) in sorted(enumerate(work), key=lambda each: -each[1].nbytes):
        able = range(len(load)) if sees is None else sorted(sees[file])
        ranks[number] = min(able, key=load.__getitem__)
        load[ranks[number]] += nbytes
    return ranks


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("everywhere", [True, False])
def test_each_goes_to_the_lowest_of_those_who_have_the_least(seed: int, everywhere: bool) -> None:
    chance = random.Random(seed)
    size, files = chance.randint(1, 12), 40
    work = [Work(file, LARGE * chance.randint(1, 4)) for file in range(files) for _ in range(chance.randint(1, 3))]
    groups = [frozenset(chance.sample(range(size), chance.randint(1, size))) for _ in range(4)]
    sees = None if everywhere else {file: chance.choice(groups) for file in range(files)}
    before = [chance.randint(0, 3) * LARGE for _ in range(size)]
    load, plain = list(before), list(before)
    assert deal(work, load, sees) == by_asking_everybody(work, plain, sees)
    assert load == plain


class Counting(list[int]):
    """A list that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, key: Any) -> Any:
        self.looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("hosts", [None, 1, 50])
def test_looks_grow_with_files_and_ranks_and_not_with_their_product(hosts: Optional[int]) -> None:
    size, files = 800, 3000
    each = size // (hosts or 1)
    sees = hosts and {file: frozenset(range(file % hosts * each, (file % hosts + 1) * each)) for file in range(files)}
    load = Counting([0] * size)
    deal([Work(file, 1) for file in range(files)], load, sees or None)
    assert max(load) - min(load) <= 1 and sum(load) == files
    assert load.looks < 10 * (files + size)
