"""What a rank has under a strategy: boxes of parameters, for files and for running jobs alike."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor, whole_box
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError


class RankBox(NamedTuple):
    """A parameter that a rank has under a name, and the box of it; None for all of one without elements."""

    name: str
    tensor: SourceTensor
    region: Optional[Region]


def slice_of(name: str, tensor: SourceTensor, layout: Layout, local: int) -> RankBox:
    """What a rank has of a parameter, by its number within the stage. Without elements, the slice has its shape only.

    Raises LayoutMismatchError: the parameter cannot be cut so.
    """
    shape = tensor.meta.shape
    layout = layout.over(len(shape))
    if all(shape):
        return RankBox(name, tensor, layout.region(local, shape))
    return RankBox(name, tensor._replace(meta=tensor.meta._replace(shape=layout.slice_shape(shape))), None)


def rank_boxes(catalog: Catalog, strategy: Optional[Strategy], rank: int) -> list[RankBox]:
    """All that `strategy` gives a rank, as far as the checkpoint has it.

    Raises:
        LayoutMismatchError, UsageError: the strategy does not fit, or has nothing in common with the checkpoint.
    """
    found = listed_boxes(catalog, strategy, rank)
    if strategy is not None and not found:
        raise nothing_listed(strategy, rank)
    return found


def nothing_listed(strategy: Strategy, rank: int) -> UsageError:
    """The error of a strategy that has nothing in common with a checkpoint."""
    return UsageError(
        f"{strategy.origin} gives rank {rank} no parameter that the checkpoint holds; "
        "check that strategy and checkpoint belong to the same model, and name_map if you use one"
    )


def listed_boxes(catalog: Catalog, strategy: Optional[Strategy], rank: int) -> list[RankBox]:
    """`rank_boxes`, where that may be nothing."""
    if strategy is None:
        return [RankBox(name, tensor, whole_box(tensor)) for name, tensor in catalog.tensors.items()]
    found = []
    names = strategy.names_of(rank)
    if catalog.own:
        from ms_ckpt_ext.engine.unlisted.proven import refuse_own

        refuse_own(catalog, names, f"it cannot be cut as {strategy.origin} says")
    for name in names:
        tensor = catalog.tensors.get(name) or catalog.extras.get(name)
        if tensor is not None and not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            found.append(box_under(strategy, rank, name, tensor))
    return found


def box_under(strategy: Strategy, rank: int, name: str, tensor: SourceTensor) -> RankBox:
    """What a rank has of a parameter by the layout of a name. Raises LayoutMismatchError: it cannot be cut so."""
    layout = strategy.layout(name, rank)
    assert layout is not None  # the strategy gives the rank this name
    try:
        return slice_of(name, tensor, layout, rank % strategy.devices_per_stage)
    except LayoutMismatchError as error:
        raise LayoutMismatchError(f"parameter {name!r} under {strategy.origin}: {error}") from error


def is_cut(tensor: SourceTensor) -> bool:
    """Whether no file holds all of a parameter, by its layout."""
    return any(all(prod(placement.parts) > 1 for placement in each.placements) for each in tensor.stored())
