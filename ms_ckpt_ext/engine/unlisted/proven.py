"""A checkpoint of which one copy stands for all: what no strategy lists is compared, and what differs is refused.

What must be alike depends on the job: for a merge all of it, for rules what they take, for a dictionary what is read of
it, and for a re-cut for other ranks what they keep (`engine.unlisted.keeping`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Callable, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import Group, UnlistedTensor, ranks_of
from ms_ckpt_ext.errors import LayoutMismatchError, name_ranks, some

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule

Compare = Callable[[Catalog, Iterable[str]], Catalog]
"""Compares unproven names, as `engine.unlisted.alike.compared` does."""
REMEDY = (
    "Give its layout: a strategy saved with strategy_ckpt_config={'only_trainable_params': False} or after "
    "AutoParallel.disable_strategy_file_only_for_trainable_params(), or, beside the strategy file, the network's "
    "layouts by name (a list: [file, layouts]). Or leave it out by choice_func"
)


def refuse_own(catalog: Catalog, names: Iterable[str], purpose: str) -> None:
    """Raise LayoutMismatchError when ranks hold different things under one of these names."""
    differing = [catalog.own[name] for name in names if name in catalog.own]
    if differing:
        held, more = differing[0], f" (and {len(differing) - 1} more like it)" if differing[1:] else ""
        origin = catalog.strategy.origin if catalog.strategy else "the strategy"
        why = f"the ranks' files differ in it: {held.differences()}"
        if held.unseen:
            why = (
                f"too few ranks' files are given to tell whether all hold the same of it: {held.differences()}; "
                f"give the file of {name_ranks(held.unseen)} as well"
            )
        raise LayoutMismatchError(
            f"parameter {held.name!r}{more} is not in {origin}, and {why}. So {purpose}: nothing tells which slice of "
            f"it each rank has, if it is one. {REMEDY}"
        )


def merged(catalog: Catalog) -> Catalog:
    """A catalog in which everything outside the strategy is proven to be alike.

    Raises:
        LayoutMismatchError: something differs by rank.
        FormatError, StorageError: a file cannot be read.
    """
    found = judged(catalog)
    refuse_own(found, found.own, "it cannot be put together")
    return found


def judged(catalog: Catalog) -> Catalog:
    """The catalog with everything outside the strategy compared, and `doubted` where too few files are given to tell.

    Raises FormatError or StorageError when a file cannot be read.
    """
    return doubted(_compared(catalog, catalog.unproven))


def _compared(catalog: Catalog, names: Iterable[str]) -> Catalog:
    """`engine.unlisted.alike.compared`, which is imported when there is something to compare."""
    if not catalog.unproven:
        return catalog
    from ms_ckpt_ext.engine.unlisted.alike import compared

    return compared(catalog, names)


def doubted(catalog: Catalog) -> Catalog:
    """The catalog with tensors moved to its `own` that cannot be compared between ranks, as too few files are given.

    A rank whose file is not there may hold another slice. Single values, text and small tables with one axis are
    assumed to be training scalars, of which one stands for all; a warning names the tables.
    """
    if catalog.all_there:
        return catalog
    unseen = {name: tensor for name, tensor in catalog.extras.items() if unseen_ranks(catalog, ranks_of(tensor))}
    _tell_unseen(catalog, [n for n, t in unseen.items() if _is_table(catalog, t) and not _is_single(catalog, n)])
    own = {
        name: _doubt(catalog, tensor)
        for name, tensor in unseen.items()
        if not _is_table(catalog, tensor) and not _is_single(catalog, name)
    }
    return catalog._replace(
        own={**catalog.own, **own}, extras={name: held for name, held in catalog.extras.items() if name not in own}
    )


def tell_unseen(catalog: Catalog) -> None:
    """Warn of tensors assumed to be alike though too few files are given to compare; for loads, which check shapes."""
    found = (n for n, t in catalog.extras.items() if not _is_single(catalog, n))
    _tell_unseen(catalog, [name for name in found if unseen_ranks(catalog, ranks_of(catalog.extras[name]))])


def _tell_unseen(catalog: Catalog, names: Sequence[str]) -> None:
    if names and catalog.strategy is not None:
        log.warning(
            "%d tensors of %d bytes are not in %s, and too few ranks' files are given to tell whether all ranks hold "
            "the same; what one holds is taken for all: %s",
            len(names),
            sum(catalog.nbytes(catalog.extras[name]) for name in names),
            catalog.strategy.origin,
            some(names),
        )


def _is_table(catalog: Catalog, tensor: SourceTensor) -> bool:
    from ms_ckpt_ext.engine.unlisted.alike import SMALL

    return len(tensor.meta.shape) < 2 and catalog.nbytes(tensor) <= SMALL


def _doubt(catalog: Catalog, tensor: SourceTensor) -> UnlistedTensor:
    """A tensor whose known copies are alike, marked as one that may differ."""
    ranks = ranks_of(tensor)
    file = next(iter(tensor.placements[0].holders.values()))[0]
    groups = (Group(f"{tensor.meta.dtype.name}{list(tensor.meta.shape)}", ranks),)
    return UnlistedTensor(tensor.meta.name, tensor.stored_name, {ranks[0]: file}, groups, unseen_ranks(catalog, ranks))


def unseen_ranks(catalog: Catalog, holders: Sequence[int]) -> tuple[int, ...]:
    """Ranks without a file, in the stages of a tensor's holders, whose files would show more about it.

    () when the holders differ in every device axis along which it could be cut, or all files of their stages are there.
    """
    strategy = catalog.strategy
    if strategy is None:
        return ()
    stages = dict.fromkeys(map(strategy.stage_of, holders))
    absent = [rank for stage in stages for rank in strategy.ranks_of(stage) if rank not in catalog.ranks]
    if not absent:
        return ()
    from ms_ckpt_ext.core.geometry.neighbours import axes_of, representatives, unseen_axes

    if not unseen_axes(holders, strategy.devices_per_stage, axes_of(strategy.layouts)):
        return ()
    every = sorted({*holders, *absent})
    standing = representatives(every, strategy.devices_per_stage, axes_of(strategy.layouts))
    return tuple(rank for rank in standing.whole if rank not in catalog.ranks) or tuple(absent)


def ruled(catalog: Catalog, rules: Sequence[Rule], compare: Optional[Compare] = None) -> Catalog:
    """The checkpoint as weight rules present it: `Catalog.ruled`, also for parameters that the strategy does not list.

    Text outside the strategy keeps its name, and so do single values that a pattern matches, which is logged; one
    that a rule names literally is taken.

    Args:
        compare: the comparison, such as one that ranks share; by default `engine.unlisted.alike.compared`.

    Raises:
        LayoutMismatchError: a parameter that a rule takes differs by rank.
        others: as `Catalog.ruled`, and FormatError and StorageError when a file cannot be read.
    """
    if not rules or not catalog.outside:
        return catalog.ruled(rules)
    from ms_ckpt_ext.core.planning.apply_rules import sources_among

    named = {source for rule in rules for source in rule.sources}
    met = sources_among(catalog.outside, rules)
    taken = [name for name in met if not _is_text(catalog, name) and (name in named or not _is_single(catalog, name))]
    kept = [name for name in met if name not in taken]
    if kept:
        log.warning(
            "single values outside the strategy keep their names, though a rule's pattern meets them: %s", some(kept)
        )
    catalog = (compare or _compared)(catalog, taken)
    refuse_own(catalog, taken, "no rule can take it")
    tensors = {**catalog.tensors, **{name: catalog.extras[name] for name in taken}}
    extras = {name: tensor for name, tensor in catalog.extras.items() if name not in tensors}
    return catalog._replace(tensors=tensors, extras=extras).ruled(rules)


def _is_single(catalog: Catalog, name: str) -> bool:
    held = catalog.extras.get(name) or catalog.unproven.get(name) or catalog.own[name]
    return prod(catalog.kind(held)[1]) == 1


def _is_text(catalog: Catalog, name: str) -> bool:
    held = catalog.extras.get(name) or catalog.unproven.get(name) or catalog.own[name]
    return catalog.kind(held)[0].name == "STR"
