"""A checkpoint of which one copy stands for all: what no strategy lists is compared, and what differs is refused.

Merges need all of it alike, rules what they take, a dictionary what is read of it, and re-cuts for other ranks what
they keep (`engine.keeping`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Callable

from ms_ckpt_ext import log
from ms_ckpt_ext.core.neighbours import axes_of, unseen_axes
from ms_ckpt_ext.core.plan import SourceTensor
from ms_ckpt_ext.core.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.engine.alike import SMALL, compared
from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.engine.naming import some
from ms_ckpt_ext.errors import LayoutMismatchError, name_ranks

if TYPE_CHECKING:
    from ms_ckpt_ext.core.rules import Rule

Compare = Callable[[Catalog, Iterable[str]], Catalog]
"""Compares names that are unproven, as `engine.alike.compared` does."""
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
        raise LayoutMismatchError(
            f"parameter {held.name!r}{more} is not in {origin}, and the ranks' files differ in it: {held.told()}. "
            f"So {purpose}: nothing tells which slice of it each rank has, if it is one. {REMEDY}"
        )


def merged(catalog: Catalog) -> Catalog:
    """A catalog in which all that lies outside the strategy is proven to be alike.

    Raises:
        LayoutMismatchError: something differs by rank.
        FormatError, StorageError: a file cannot be read.
    """
    found = compared(catalog)
    refuse_own(found, found.own, "it cannot be put together")
    tell_unseen(found)
    tell_accumulated(found)
    return found


def tell_accumulated(catalog: Catalog) -> None:
    """Log which accumulated gradients no job takes along: they are zero between steps."""
    found = {
        name: entry.nbytes
        for index in catalog.files
        for name, entry in index.tensors.items()
        if name.startswith(ACCUMULATED_GRADIENT_PREFIX)
    }
    if found:
        told = len(found), sum(found.values()), some(sorted(found))
        log.info("left out: %d accumulated gradients of %d bytes in a rank's file, zero between steps: %s", *told)


def tell_unseen(catalog: Catalog) -> None:
    """Warn of what is taken for alike though files of ranks that may hold another slice of it are not there."""
    strategy = catalog.strategy
    if strategy is None or len(catalog.ranks) == strategy.world:
        return
    axes = axes_of(strategy.layouts)
    held = {name: ranks_of(tensor) for name, tensor in catalog.extras.items() if catalog.nbytes(tensor) > SMALL}
    unseen = {
        name: ranks
        for name, ranks in held.items()
        if not all(set(strategy.ranks_of(stage)) <= catalog.ranks.keys() for stage in map(strategy.stage_of, ranks))
        and unseen_axes(ranks, strategy.devices_per_stage, axes)
    }
    if unseen:
        log.warning(
            "%d tensors of %d bytes are not in %s, and too few ranks' files are given to tell whether all ranks hold "
            "the same; what %s holds is taken for all: %s",
            len(unseen),
            sum(catalog.nbytes(catalog.extras[name]) for name in unseen),
            strategy.origin,
            name_ranks(sorted({ranks[0] for ranks in unseen.values()})),
            some(unseen),
        )


def ruled(catalog: Catalog, rules: Sequence[Rule], compare: Compare = compared) -> Catalog:
    """The checkpoint as weight rules present it: `Catalog.ruled`, also of parameters that the strategy does not list.

    Single values and text outside the strategy keep their names.

    Args:
        compare: `engine.alike.compared`, or one that ranks share.

    Raises:
        LayoutMismatchError: a parameter that a rule takes differs by rank.
        others: as `Catalog.ruled`, and FormatError and StorageError when a file cannot be read.
    """
    if not rules or not catalog.outside:
        return catalog.ruled(rules)
    from ms_ckpt_ext.core.rules import sources_among

    taken = [name for name in sources_among(catalog.outside, rules) if not _is_single(catalog, name)]
    catalog = compare(catalog, taken)
    refuse_own(catalog, taken, "no rule can take it")
    tensors = {**catalog.tensors, **{name: catalog.extras[name] for name in taken}}
    extras = {name: tensor for name, tensor in catalog.extras.items() if name not in tensors}
    return catalog._replace(tensors=tensors, extras=extras).ruled(rules)


def _is_single(catalog: Catalog, name: str) -> bool:
    held = catalog.extras.get(name) or catalog.unproven.get(name) or catalog.own[name]
    dtype, shape = catalog.kind(held)
    return dtype.name == "STR" or prod(shape) == 1


def ranks_of(tensor: SourceTensor) -> tuple[int, ...]:
    """The ranks that hold a tensor which is whole wherever it is."""
    return next(iter(tensor.placements[0].expected.values()))
