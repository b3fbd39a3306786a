"""What the names of checkpoint files say: of which save, run and rank they are, and which save is the newest.

    {prefix}-{epoch}_{step}                 `ModelCheckpoint`; its later runs in a folder are `{prefix}_1`, …
    {prefix}_rank_{N}-{epoch}_{step}        MindFormers; its later runs are `{prefix}_rank_{N}_1`, …
    {prefix}-{epoch}_{step}_breakpoint      `exception_save`, which counts runs by breakpoints alone
    {prefix}{N}, {prefix}{N}_part{stage}    `transform_checkpoints`

1. In every name the last two numbers are the save's, epoch and step, by MindSpore's own rule.
2. A number that is the rank's own in every rank folder is no part of the name: the ranks share what is left. One that
   is the same in all folders belongs to the prefix, as in `lora_rank_8`; inside a rank folder the rank is known.
3. The newest save has the largest numbers. It is undecided between two that are equally new, beside a save of a later
   run with smaller numbers, and between numbers that are epoch and step and others that are not: the user must choose.
   Of a breakpoint and a save of the same step, the save counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

_NUMBERS = re.compile(r"\d+")
_RANK = re.compile(r"(?<![^\W_])rank_(\d+)")
_STEP = re.compile(r"-(\d+)_(\d+)$")
_RUN = re.compile(r"(?<!rank)_(\d+)$")
_BREAKPOINT = "_breakpoint"
STEP, NUMBERS = 2, 1
"""How a name tells when a save was made: by epoch and step, or by numbers that may mean anything."""
_OWN = "*"
"""Stands for a rank's own number; left out of shared names, unless two of them would become equal."""
_SUFFIX = re.compile(r"\.(?:safetensors|ckpt)$")


class Save(NamedTuple):
    """What a checkpoint's name says.

    Attributes:
        prefix: its beginning, without the number of the run.
        run: 0 for the first in a folder.
        step: the last two numbers; fewer where there are fewer.
        regular: it was saved on schedule, not when an exception ended the run.
    """

    prefix: str
    run: int
    step: tuple[int, ...]
    regular: bool


def save_of(name: str) -> Save:
    """Parse a file's name, or what the ranks' names share.

    >>> save_of("net_1-3_1200.ckpt"), save_of("lora_rank_8-1_10.safetensors").prefix
    (Save(prefix='net', run=1, step=(3, 1200), regular=True), 'lora_rank_8')
    >>> save_of("net-1_12_breakpoint.ckpt"), save_of("step_400.ckpt").prefix
    (Save(prefix='net', run=0, step=(1, 12), regular=False), 'step_')
    """
    stem, regular = _stem(name)
    found = _STEP.search(stem)
    if found is None:
        last = list(_NUMBERS.finditer(stem))[-2:]
        prefix = stem[: last[0].start()] + "#" + stem[last[-1].end() :] if last else stem
        return Save(prefix.rstrip("#"), 0, tuple(int(number[0]) for number in last), regular)
    prefix = stem[: found.start()]
    run = _RUN.search(prefix)
    return Save(
        prefix[: run.start()] if run else prefix,
        int(run[1]) if run else 0,
        (int(found[1]), int(found[2])),
        regular,
    )


def _stem(name: str) -> tuple[str, bool]:
    """A name without its suffix and without the mark of a breakpoint, and whether it had no such mark."""
    stem = _SUFFIX.sub("", name)
    return (stem[: -len(_BREAKPOINT)], False) if stem.endswith(_BREAKPOINT) else (stem, True)


def grouped(files: Mapping[int, Iterable[str]]) -> dict[str, dict[int, str]]:
    """The files of rank folders by what their names have in common.

    Args:
        files: rank -> names of the files in its folder.

    Returns:
        shared name -> rank -> file. Names of one step that differ in another number, as those of pipeline
        stages may, are one group under the first name if no rank has two of them. So are the only files of all folders
        if no name has a number that dates it.
    """
    held = {rank: sorted(names) for rank, names in files.items() if names}
    marked: dict[str, dict[int, str]] = {}
    for (rank, name), shared in _shared(held).items():
        marked.setdefault(shared, {})[rank] = name
    marked = _joined(marked)
    if all(len(names) == 1 for names in held.values()) and not any(save_of(name).step for name in marked):
        marked = {name: {rank: only for rank, (only,) in held.items()} for name in [*marked][:1]}
    found: dict[str, dict[int, str]] = {}
    for shared, group in marked.items():
        plain = shared.replace(_OWN, "")
        found[shared if plain in found or (plain != shared and plain in marked) else plain] = group
    return found


def unlike(files: Mapping[int, str]) -> Optional[tuple[str, str]]:
    """Two names of ranks' files that differ in more than numbers; None when there are none."""
    first = next(iter(files.values()))
    other = next((name for name in files.values() if _NUMBERS.sub("", name) != _NUMBERS.sub("", first)), None)
    return None if other is None else (first, other)


def _joined(groups: Mapping[str, dict[int, str]]) -> dict[str, dict[int, str]]:
    """Join groups of one step whose names differ in numbers only, where no rank has two of them."""
    alike: dict[tuple[str, Optional[tuple[int, int]]], list[str]] = {}
    for name in groups:
        alike.setdefault((_NUMBERS.sub("#", name), step_of(name)), []).append(name)
    found: dict[str, dict[int, str]] = {}
    for (_, step), names in alike.items():
        ranks = [rank for name in names for rank in groups[name]]
        if step is None or len(set(ranks)) < len(ranks):
            found.update((name, groups[name]) for name in names)
        else:
            found[names[0]] = {rank: file for name in names for rank, file in groups[name].items()}
    return found


def _shared(held: Mapping[int, Sequence[str]]) -> dict[tuple[int, str], str]:
    """(rank, file) -> its name with a mark in place of the rank's numbers."""
    patterns: dict[str, list[tuple[int, str]]] = {}
    for rank, names in held.items():
        for name in names:
            patterns.setdefault(_NUMBERS.sub("#", name), []).append((rank, name))
    return {
        (rank, name): _without(name, own, rank)
        for members in patterns.values()
        for own in [_rank_places(members)]
        for rank, name in members
    }


def _rank_places(members: Sequence[tuple[int, str]]) -> list[int]:
    """Which numbers are the rank's, in names that differ in numbers only."""
    ranks = {rank for rank, _ in members}
    if len(ranks) < 2:
        return []
    first = members[0][1]
    matches = list(_NUMBERS.finditer(first))
    named = {at for at, number in enumerate(matches) if first[: number.start()].endswith("rank_")}
    epoch = _epoch_place(first, len(matches))
    numbers = [(rank, [int(number) for number in _NUMBERS.findall(name)]) for rank, name in members]
    places = []
    for at in range(len(matches)):
        own = {rank for rank, of in numbers if of[at] == rank}
        if at != epoch and (own == ranks if at in named else all(of[at] == rank for rank, of in numbers)):
            places.append(at)
    return places


def _epoch_place(name: str, count: int) -> int:
    """Which number of a name is certainly the epoch's; -1 when none is."""
    return count - 2 if _STEP.search(_stem(name)[0]) else -1


def _without(name: str, places: Sequence[int], rank: int) -> str:
    """A name with a mark in place of those numbers at these places that are the rank's."""
    numbers = list(_NUMBERS.finditer(name)) if places else []
    for at in reversed(places):
        number = numbers[at]
        if int(number[0]) == rank:
            name = name[: number.start()] + _OWN + name[number.end() :]
    return name


def names_rank(name: str) -> bool:
    """Whether a name states a rank, or seems to."""
    return _RANK.search(name) is not None


def grouped_flat(names: Iterable[str], ranked: bool = False) -> dict[str, dict[int, str]]:
    """The files of one folder, where only names state ranks: shared name -> rank -> file.

    `_rank_N` is a rank where 0 or several consecutive ones occur, or where ranks are known to have saved (`ranked`);
    else it belongs to the prefix, as in `lora_rank_8`.
    """
    families: dict[str, dict[int, str]] = {}
    found: dict[str, dict[int, str]] = {}
    for name in sorted(names):
        matches = list(_RANK.finditer(name))
        if not matches:
            found[name] = {0: name}
            continue
        shared = name[: matches[-1].start(1)] + name[matches[-1].end(1) :]
        family = families.setdefault(shared, {})
        if int(matches[-1][1]) in family:  # rank_1 and rank_01
            shared, family = name, families.setdefault(name, {})
        family[int(matches[-1][1])] = name
    for shared, family in families.items():
        ranks = sorted(family)
        if ranked or 0 in family or (len(ranks) > 1 and ranks[-1] - ranks[0] == len(ranks) - 1):
            found[shared] = family
        else:
            found.update({name: {0: name} for name in family.values()})
    return found


class Newest(NamedTuple):
    """The newest of several saves by their names.

    Attributes:
        equal: the newest; several where names do not decide.
        later_run: the newest of a later run, whose numbers are smaller; None when there is none.
        others: the newest of every other prefix.
    """

    equal: tuple[str, ...]
    later_run: Optional[str]
    others: tuple[str, ...]


def newest(names: Iterable[str]) -> Newest:
    """The newest of saves, by the names that ranks share; there must be at least one.

    Epoch and step are not compared with other numbers, such as those of `step_400` or `llama_7b`.
    """
    saves = {name: save_of(name) for name in names}

    def order(name: str) -> tuple[int, tuple[int, ...], bool]:
        return dated(name), saves[name].step, saves[name].regular

    ordered = sorted(saves, key=order, reverse=True)
    best = saves[ordered[0]]
    later = [
        name
        for name in ordered
        if (saves[name].prefix, saves[name].regular) == (best.prefix, True) and saves[name].run > best.run
    ]
    others = {saves[name].prefix: name for name in reversed(ordered) if saves[name].prefix != best.prefix}
    top = [name for name in ordered if order(name)[:2] == order(ordered[0])[:2]]
    top += [name for name in ordered if dated(name) == NUMBERS][:1] if is_step(ordered[0]) else []
    due = {saves[name].prefix for name in top if saves[name].regular}
    return Newest(
        tuple(name for name in top if saves[name].regular or saves[name].prefix not in due),
        max(later, key=lambda name: saves[name].run, default=None),
        tuple(reversed(others.values())),
    )


def dated(name: str) -> int:
    """What a name says about the time of a save: `STEP`, other `NUMBERS`, or nothing, 0."""
    return STEP if is_step(name) else NUMBERS if save_of(name).step else 0


def is_step(name: str) -> bool:
    """Whether a name ends in `-{epoch}_{step}`, as saves of a training do."""
    return step_of(name) is not None


def step_of(name: str) -> Optional[tuple[int, int]]:
    """Epoch and step of a name that ends in `-{epoch}_{step}`; None for another."""
    found = _STEP.search(_stem(name)[0])
    return (int(found[1]), int(found[2])) if found else None
