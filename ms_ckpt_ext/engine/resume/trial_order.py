"""The order in which checkpoints of a directory are tried, and what is reported about it.

1. A *series* is what one saver left: saves of one prefix and format, in one folder or in folders whose names differ in
   numbers only (`step_100/`, `step_200/`; `iteration_00000010/`). It is ordered by folder, then by run (MindSpore
   numbers the prefix of every further run), then by epoch and step. A breakpoint belongs to the run that saved last
   before it. Time does not count here: one clock that is ahead would make an old step the newest.
2. Series are ordered by their newest saves: those whose names give an epoch and step, or that are recorded, before
   those with other numbers (`llama_7b`, `step_400`) and without any; then by time where any is recorded (as
   recorded, if all are; else as the files were modified), else by their numbers. So when the newest is torn, the next
   older one of the same saver follows, not another's.
3. Two series whose newest saves have the same epoch and step cannot be ordered by these. The recorded one comes
   first, else the one in the directory itself; if neither decides, it is an error, unless one of them is torn.
4. Where run, numbers and time disagree, or another prefix is passed over, both are named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Callable, NamedTuple, Optional

from ms_ckpt_ext.engine.resume.candidates import Candidate
from ms_ckpt_ext.errors import name_ranks
from ms_ckpt_ext.formats.discovery.saves import NUMBERS, STEP, Save, dated, save_of

_NUMBERS = re.compile(r"\d+")
_ITERATION = re.compile(r"^iteration_\d+$")
_RANK = re.compile(r"_?rank_\d*$")


class _Save(NamedTuple):
    """A candidate, and what its names say."""

    candidate: Candidate
    series: tuple[str, str, str]
    folders: tuple[int, ...]
    run: int
    save: Save

    @property
    def numbers(self) -> tuple[int, ...]:
        return (*self.folders, *self.save.step)

    @property
    def saved(self) -> Optional[float]:
        """When it was saved, from its records."""
        return max((record.saved for record in self.candidate.records), default=None)

    @property
    def step(self) -> Optional[int]:
        """The training's step, from its records."""
        return next((record.step for record in self.candidate.records), None)


def prefix_of(name: str) -> str:
    """What users call the prefix of a save.

    >>> prefix_of("net_1-1_50.ckpt"), prefix_of("qwen_rank_-1_20.ckpt"), prefix_of("best.ckpt")
    ('net', 'qwen', 'best')
    """
    return _RANK.sub("", save_of(os.path.basename(name)).prefix)


class Remark(NamedTuple):
    """A checkpoint that might be taken for newer than the chosen one, and why it was not taken."""

    title: str
    reason: str


class Order:
    """Candidates, the newest first."""

    def __init__(self, found: Iterable[Candidate]) -> None:
        series: dict[tuple[str, str, str], list[_Save]] = {}
        for save in map(_read, found):
            series.setdefault(save.series, []).append(save)
        ordered = [_related(sorted(_with_runs(saves), key=_place, reverse=True)) for saves in series.values()]
        by = _measure([saves[0] for saves in ordered])
        ordered.sort(key=lambda saves: (_dated(saves[0]), by(saves[0]), saves[0].candidate.title), reverse=True)
        self._saves = [save for saves in _preferred_first(ordered) for save in saves]
        self._by_title = {save.candidate.title: save for save in self._saves}

    def __iter__(self) -> Iterator[Candidate]:
        return (save.candidate for save in self._saves)

    def equals(self, candidate: Candidate) -> list[Candidate]:
        """Candidates that cannot be told apart from this one."""
        one = self._by_title[candidate.title]
        return [save.candidate for save in self._saves if _is_as_new(save, one) and _rank(save) == _rank(one)]

    def remarks(self, candidate: Candidate) -> list[Remark]:
        """Candidates after this one that might be taken for newer."""
        one = self._by_title[candidate.title]
        rest = self._saves[self._saves.index(one) + 1 :]
        heads = {save.series: save for save in reversed(rest) if save.series != one.series}
        found = [*_of_series(one, [save for save in rest if save.series == one.series])]
        found += [
            Remark(save.candidate.title, reason) for save in heads.values() if (reason := _passed_over(save, one))
        ]
        return found


def _read(candidate: Candidate) -> _Save:
    numbers = tuple(int(number) for number in _NUMBERS.findall(candidate.folder))
    one_model = candidate.merged or candidate.parts
    save = Save(candidate.name, 0, (), True) if one_model else save_of(candidate.name)
    series = (_NUMBERS.sub("#", candidate.folder), save.prefix, os.path.splitext(candidate.name)[1])
    return _Save(candidate, series, numbers, save.run, save)


def _place(save: _Save) -> tuple[tuple[int, ...], int, tuple[int, ...], bool]:
    """Sort key within a series, the newest last."""
    return save.folders, save.run, save.save.step, save.save.regular


def _with_runs(saves: Sequence[_Save]) -> list[_Save]:
    """A series, with breakpoints, whose names have no run, assigned to the runs that they ended."""

    def run(save: _Save) -> int:
        before = [
            (other.candidate.modified, other.run)
            for other in saves
            if other.save.regular and other.folders == save.folders
            if other.candidate.modified <= save.candidate.modified
        ]
        return max(before, default=(0.0, 0))[1]

    return [save if save.save.regular else save._replace(run=run(save)) for save in saves]


def _related(saves: Sequence[_Save]) -> list[_Save]:
    """A series, newest first, in which saves without records refer to recorded ones that are alike."""
    return [save._replace(candidate=_compared(save, saves)) for save in saves]


def _compared(save: _Save, series: Sequence[_Save]) -> Candidate:
    mine = save.candidate
    if mine.records or mine.merged or mine.parts:
        return mine
    for other in (other.candidate for other in series if other.folders == save.folders and other is not save):
        lacking = sorted(other.files.keys() - mine.files.keys())
        if lacking:
            return replace(mine, unlike=f"the files of {name_ranks(lacking)} are missing, which {other.title!r} has")
    recorded = [other for other in series if other.candidate.records and other.folders == save.folders]
    same_job = [other.candidate for other in recorded if other.run == save.run or other.candidate.whole]
    alike = next((other for other in same_job if _sizes(other) == _sizes(mine)), None)
    if alike is not None:
        return replace(mine, alike=alike)
    newest = next((other.candidate for other in recorded if len(other.candidate.files) > 1), None)
    if newest is None:
        return mine
    why = "its files differ in size from those" if newest in same_job else "it is of another run than that"
    return replace(
        mine, unlike=f"no layouts are on record for it, and {why} of {newest.title!r}: give train_strategy_filename"
    )


def _sizes(candidate: Candidate) -> dict[int, int]:
    return {rank: held.size for rank, held in candidate.files.items()}


def _dated(save: _Save) -> int:
    """How its age is known: from epoch and step, or a record, or other numbers; or not at all."""
    if save.candidate.records or _ITERATION.match(os.path.basename(save.candidate.folder)):
        return STEP
    by_name = dated(save.candidate.name) if save.save.step else 0
    return by_name or (NUMBERS if save.folders else 0)


def _measure(leaders: Sequence[_Save]) -> Callable[[_Save], tuple[float, ...]]:
    """The key by which the newest of several series are compared: time where any is recorded, else their numbers."""
    known = [save for save in leaders if _dated(save) == STEP]
    if known and all(save.saved is not None for save in known):
        return lambda save: (save.saved or 0.0,)
    if any(save.candidate.records for save in known):
        return lambda save: (save.candidate.modified,)
    return lambda save: save.numbers


def _rank(save: _Save) -> tuple[bool, bool]:
    """Sort key among equally new saves; the greatest is preferred."""
    return bool(save.candidate.records), not save.candidate.folder


def _preferred_first(ordered: Sequence[list[_Save]]) -> list[list[_Save]]:
    """The series, with those whose newest are equally new in order of preference; the others keep their places."""
    found = list(ordered)
    for at, saves in enumerate(found):
        same = [n for n in range(at, len(found)) if n == at or _is_as_new(found[n][0], saves[0])]
        for n, member in zip(same, sorted((found[n] for n in same), key=lambda held: _rank(held[0]), reverse=True)):
            found[n] = member
    return found


def _is_as_new(one: _Save, other: _Save) -> bool:
    """Whether neither names nor records tell which of two saves is newer."""
    if one is other or one.numbers != other.numbers:
        return False
    if one.series == other.series:
        return _place(one) == _place(other)
    return None in (one.step, other.step) or one.step == other.step


def _of_series(one: _Save, older: Sequence[_Save]) -> Iterator[Remark]:
    """Saves of the same series that would be newer by time, or by numbers."""
    runs = set()
    for save in older:
        title = save.candidate.title
        if save.saved is not None and one.saved is not None and save.saved > one.saved:
            yield Remark(
                title,
                f"it was recorded after {one.candidate.title!r}, but its epoch and step are smaller: the clock of a "
                "host was wrong, or the training went back",
            )
        elif save.folders == one.folders and save.run < one.run and save.run not in runs:
            runs.add(save.run)
            if save.save.step >= one.save.step:
                yield Remark(
                    title, f"its epoch and step are not smaller, but {one.candidate.title!r} is of a later run"
                )


def _passed_over(save: _Save, one: _Save) -> str:
    """Why another series' newest was not taken; "" where that needs no mention."""
    mine, theirs = one.candidate, save.candidate
    if _is_as_new(save, one):
        why = "it is recorded" if _rank(one)[0] > _rank(save)[0] else "it lies in the directory itself"
        return f"it is as new by its name as {mine.title!r}, which is taken because {why}"
    told = _dated(save) > 0
    newer = told and (save.numbers > one.numbers or theirs.modified > mine.modified)
    if newer or (told and theirs.folder == mine.folder and not theirs.merged):
        return f"{mine.title!r} is taken for newer; if this one is meant, give its prefix, format or folder"
    return ""
