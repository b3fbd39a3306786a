"""What a caller asks of a transfer, on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from ms_ckpt_ext.bridge.memory import on_device
from ms_ckpt_ext.bridge.transfer.distributed import own_boxes
from ms_ckpt_ext.bridge.transfer.sides import (
    SideHere,
    check_boxes,
    may_be_staged,
    named_parameters,
    side_of,
    split_boxes,
)
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.source.renaming import Naming

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule


class GivenSide(NamedTuple):
    """What this rank's caller gives of a side: Parameters, and layouts in any form; None where it has no part of it."""

    parameters: Any
    layouts: Any

    def side(self, argument: str, rank: int, ranks: Sequence[int], read: ReadStrategy) -> SideHere:
        """What it amounts to on a rank of the side. Raises as `side_of`, `refuse_formats` and `as_strategy`."""
        rest, boxes = split_boxes(self.layouts, f"{argument}_strategy")
        if rest is None and not boxes and isinstance(self.parameters, ms.nn.Cell):
            from ms_ckpt_ext.bridge.restore import layouts_of

            rest = layouts_of(self.parameters)
        strategy = read(rest, ranks.index(rank), f"{argument}_strategy")
        found = side_of(self.parameters, argument)
        assert found is not None
        if on_device():
            from ms_ckpt_ext.bridge.npu.formats import refuse_formats

            refuse_formats(found.values(), argument)
        boxes = {**own_boxes(named_parameters(self.parameters, argument), rank), **boxes}
        check_boxes(found, boxes, f"{argument}_strategy")
        return SideHere(found, strategy, boxes, may_be_staged(self.parameters, strategy, len(ranks)))


def given_side(parameters: Any, layouts: Any) -> Optional[GivenSide]:
    """A side as it is given; None where this rank has no Parameters of it."""
    return None if parameters is None else GivenSide(parameters, layouts)


ReadStrategy = Callable[[Any, int, str], Optional[Strategy]]
"""Reads layouts in any form, for the rank at a place; the last argument is what messages call them."""


class TransferRequest(NamedTuple):
    """What one rank wants moved, and how.

    Attributes:
        source, target: what this rank has of each; None where it has no part.
        read: reads layouts.
        source_ranks, target_ranks: the ranks of each side in the order of their places; None: those that have a part.
        strict: every Parameter of the target must take something, by its exact name.
        exact: no names by suffix, strict or not.
        rules, naming: as for a load.
        pairs: makes the naming from the names of both sides on all ranks; None where it is known.
        offload_source, load_target: Parameters of the source go to host memory after each run, those of the target come
            to the device before it.
        options: how the ranks exchange.
    """

    source: Optional[GivenSide]
    target: Optional[GivenSide]
    read: ReadStrategy
    source_ranks: Optional[tuple[int, ...]] = None
    target_ranks: Optional[tuple[int, ...]] = None
    strict: bool = True
    rules: tuple[Rule, ...] = ()
    naming: Naming = Naming()
    exact: bool = False
    pairs: Optional[Callable[[Sequence[str], Sequence[str]], Naming]] = None
    offload_source: bool = False
    load_target: bool = False
    options: LoadOptions = LoadOptions()

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks before anything is shared."""
        told = self.source_ranks, self.target_ranks, self.strict, self.offload_source, self.load_target
        return {
            "source_ranks, target_ranks, strict, offload_source, load_target": repr(told),
            "rules": repr(self.rules),
            "name_map": repr(sorted(self.naming.name_map.items())),
        }
