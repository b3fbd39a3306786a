"""`ms-ckpt diff-strategy`: what changes for each parameter between two strategies."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ms_ckpt_ext.cli import options, words
from ms_ckpt_ext.cli.command import Answer, Command, Exit, takes_path

if TYPE_CHECKING:
    from ms_ckpt_ext.api.diff import Change, StrategyDiff
    from ms_ckpt_ext.core.geometry.describe import StrategyInfo


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("a", help="strategy file or directory"))
    takes_path(parser.add_argument("b", help="another one"))
    shapes = 'JSON file {"name": {"dtype": "F32", "shape": [2, 3]}}: adds shapes of slices, which strategies lack'
    takes_path(parser.add_argument("--shapes", metavar="FILE", help=shapes))
    options.add_filter(parser)
    parser.add_argument("--all", action="store_true", help="list every parameter that changes")


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.diff import diff_strategy

    found = diff_strategy(
        arguments.a, arguments.b, shapes=arguments.shapes, match=arguments.match, exclude=arguments.exclude
    )
    everything = arguments.all or bool(arguments.match or arguments.exclude)
    data = {"same": found.ok, **vars(found)}
    return Answer(data, _lines(found, everything), Exit.FINE if found.ok else Exit.DIFFERENT)


def _lines(found: StrategyDiff, everything: bool) -> Iterator[str]:
    yield f"{words.style('a', 'bold')}  {_told(found.a)}"
    yield f"{words.style('b', 'bold')}  {_told(found.b)}"
    yield ""
    if found.ok:
        yield f"Same: {words.count(found.unchanged, 'parameter')} with equal layouts."
        return
    moved = sum(not change.same_slices for change in found.changes)
    yield (
        f"{words.count(len(found.changes), 'parameter')} with another layout ({moved:,} with other slices), "
        f"{found.unchanged:,} unchanged, {len(found.only_a):,} only in a, {len(found.only_b):,} only in b"
    )
    yield from _changes(found, everything)
    for side, names in (("a", found.only_a), ("b", found.only_b)):
        if names:
            yield ""
            yield from words.listed([f"only in {side}"], [[name] for name in names], "", everything)


def _told(info: StrategyInfo) -> str:
    stages = f"{words.count(info.stages, 'pipeline stage')} of {words.count(info.devices_per_stage, 'device')}"
    return f"{info.origin}: {words.count(info.world, 'rank')}, {stages}, {words.count(info.parameters, 'parameter')}"


def _changes(found: StrategyDiff, everything: bool) -> Iterator[str]:
    """Parameters that change in the same way together, the most frequent way first."""
    alike: dict[tuple[str, str, str], list[Change]] = {}
    for change in found.changes:
        same = " (every rank's slice stays the same)" if change.same_slices else ""
        alike.setdefault((", ".join(change.what) + same, str(change.a), str(change.b)), []).append(change)
    for (what, before, after), changes in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield ""
        yield f"{words.style(words.count(len(changes), 'parameter'), 'bold')}: {what}"
        yield f"  a  {before}"
        yield f"  b  {after}"
        slices = {change.name: _slices(change) for change in changes}
        names = [f"{name}{told}" for name, told in words.folded(slices)]
        shown = names if everything else names[: words.MOST_LISTED]
        yield from (f"     {name}" for name in shown)
        if len(names) > len(shown):
            yield words.style(f"     … and {len(names) - len(shown):,} more (--all lists them)", "dim")


def _slices(change: Change) -> str:
    if change.shape is None:
        return ""
    before, after = (words.shape(side.slice_shape) for side in (change.a, change.b))
    return f"  {words.shape(change.shape)}, slices {before} -> {after}"


COMMAND = Command(
    name="diff-strategy",
    summary="show what changes for each parameter between two strategies",
    description=(
        "Compare two strategies: device matrix, split axes, optimizer shard, copies and pipeline stage of every\n"
        "parameter, and whether ranks hold other slices. Exit code 1 when anything changes."
    ),
    examples=(
        ("ms-ckpt diff-strategy strategy_8p.ckpt strategy_4p.ckpt", "what a resume on other devices changes"),
        ("ms-ckpt diff-strategy a.ckpt b.ckpt --shapes shapes.json --match 'layers.0.*'", "with shapes of slices"),
    ),
    configure=_configure,
    run=_run,
)
