"""What ranks keep although the strategy of their job does not list it.

MindSpore's strategy files list trainable parameters only, unless told to list more: what a target does not list,
such as a frozen model or the number of the step, is wanted all the same.

1. A target with the source's ranks, each with the same slices of all that both list: every rank keeps what its own file
   holds. Nothing is compared.
2. Any other target: what is whole goes to every rank, and what lies outside the source's strategy counts as whole where
   the ranks' copies are alike, which is compared. With pipeline stages, a rank gets what lies in those stages of the
   source that hold parameters of its own stage; what no stage would get goes to all.
3. Where neither is possible, because it is cut in the source, or differs between ranks, that is an error: which slice
   of it a rank has is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.groups import STATES, group_of
from ms_ckpt_ext.core.geometry.ranks import same_cut
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor, whole_box
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.rank_boxes import RankBox, is_cut, slice_of
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, of_rank, ranks_of, tell_accumulated
from ms_ckpt_ext.engine.unlisted.alike import SMALL, compared
from ms_ckpt_ext.engine.unlisted.proven import REMEDY, doubted, refuse_own
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, some
from ms_ckpt_ext.formats.safetensors import DEDUPLICATED


class Keeping:
    """What the ranks of a target keep besides what its strategy lists.

    Args:
        catalog: the source.
        target: the strategy of the target; None for one device.
        states: keep optimizer states that the target does not list, though it lists their weights; otherwise such a
            target is assumed to have no optimizer.
        alone: the target's strategy may cover one pipeline stage only, as one rank is asked for: parameters with
            optimizer states in the source, neither of which it lists, are assumed to belong to other stages.

    Attributes:
        catalog: the source, after the comparisons that were needed.

    Raises:
        LayoutMismatchError: something is cut, or differs by rank, and which slice a rank has is unknown.
        FormatError, StorageError: a file cannot be read.
    """

    def __init__(self, catalog: Catalog, target: Optional[Strategy], states: bool = True, alone: bool = False) -> None:
        self._target = target
        # What a name map renamed is kept under its new name.
        self._listed = frozenset({*target.layouts, *catalog.mapped}) if target else frozenset()
        self._cut_by = _by_names(catalog)
        self._same = target is not None and self._cut_by is not None and same_cut(self._cut_by, target)
        self.catalog = compared(catalog, self._to_compare(catalog)) if self._same else doubted(compared(catalog))
        tell_accumulated(catalog.files)
        left_out = set() if states or target is None else self._left_out(alone)
        self._tensors = {n: t for n, t in self._unlisted(self.catalog.tensors) if n not in left_out}
        if not self._same:
            refuse_own(self.catalog, self.catalog.own, "it cannot be cut for other ranks")
        self._refuse_cut()
        self._reach = {} if self._same else self._stages_by_stage()
        self._stages = self._stages_outside() if self._same else {}
        self._boxes: dict[int, list[RankBox]] = {}

    def _unlisted(self, held: Mapping[str, SourceTensor]) -> Iterator[tuple[str, SourceTensor]]:
        return ((name, tensor) for name, tensor in held.items() if name not in self._listed)

    def _to_compare(self, catalog: Catalog) -> Iterator[str]:
        """What is compared though ranks keep their own: what the target lists, and what is not in every file."""
        assert self._target is not None
        for name, held in catalog.unproven.items():
            stages = {self._target.stage_of(rank) for rank in held.files}
            everywhere = len(held.files) == len(stages) * self._target.devices_per_stage
            if name in self._listed or not everywhere:
                yield name

    def _left_out(self, alone: bool) -> set[str]:
        """What the target has no use for; warns, naming it."""
        assert self._target is not None
        names = self.catalog.tensors.keys()
        states: dict[str, list[str]] = {}
        for name in names - self._listed:
            if group_of(name, names) == STATES:
                states.setdefault(name.partition(".")[2], []).append(name)
        idle = {name for weight, found in states.items() if weight in self._listed for name in found}
        self._tell(idle, "optimizer states of weights that it lists without them")
        trained = states.keys() - self._listed if alone else set()
        elsewhere = {name for weight in trained for name in (weight, *states[weight]) if name in names}
        self._tell(elsewhere, "trained parameters, which are of another pipeline stage where it is of one")
        return idle | elsewhere

    def _tell(self, names: Collection[str], what: str) -> None:
        if names:
            assert self._target is not None
            log.warning(
                "left out, for %s does not list them: %d parameters of %d bytes, %s: %s",
                self._target.origin,
                len(names),
                sum(self.catalog.nbytes(self.catalog.tensors[name]) for name in names),
                what,
                some(sorted(names)),
            )

    def _refuse_cut(self) -> None:
        if self._target is None or self._target.devices_per_stage == 1:
            return  # one device takes everything whole
        kept = self._tensors.items()  # tensors made by rules belong to no rank
        cut = [name for name, tensor in kept if is_cut(tensor) and (not self._same or tensor.recipe is not None)]
        if cut:
            origin = self.catalog.strategy.origin if self.catalog.strategy else "the source"
            more = f" (and {len(cut) - 1} more like it)" if cut[1:] else ""
            raise LayoutMismatchError(
                f"parameter {cut[0]!r}{more} is cut by {origin}, and {self._target.origin}, which is for other ranks "
                f"or slices, does not list it: nothing tells which slice of it a rank is to get. {REMEDY}"
            )

    def of(self, rank: int) -> list[RankBox]:
        """What a rank keeps, whole or, where the source's ranks are the target's, as its own file has it.

        Raises:
            CoverageError: something should be in the rank's own file, which is not there.
        """
        if self._target is None:
            return [RankBox(name, tensor, whole_box(tensor)) for name, tensor in self.catalog.extras.items()]
        if self._same:
            return [*self._own(rank)]
        stage = self._target.stage_of(rank)
        if stage not in self._boxes:
            self._boxes[stage] = [*self._for_stage(stage)]
        return self._boxes[stage]

    def _for_stage(self, stage: int) -> Iterator[RankBox]:
        for group in (self._tensors, self.catalog.extras):
            for name, tensor in self._unlisted(group):
                if self._reaches(tensor, stage):
                    yield RankBox(name, tensor, whole_box(tensor))

    def _stages_by_stage(self) -> dict[int, set[int]]:
        """Stage of the target -> stages of the source that hold its parameters."""
        found: dict[int, set[int]] = {}
        for name, stages in self._target.layouts.items() if self._target else ():
            tensor = self.catalog.tensors.get(name)
            for stage in stages if tensor else ():
                found.setdefault(stage, set()).update(self._stages_of(tensor))
        return found

    def _reaches(self, tensor: SourceTensor, stage: int) -> bool:
        held = self._stages_of(tensor)
        return not held.isdisjoint(self._reach.get(stage, ())) or not any(map(held.intersection, self._reach.values()))

    def _stages_of(self, tensor: Optional[SourceTensor]) -> set[int]:
        """Stages of the source that have a tensor."""
        strategy = self.catalog.strategy
        if tensor is None or strategy is None:
            return set()
        if tensor.recipe is not None:
            return set().union(*map(self._stages_of, tensor.stored()))
        listed = strategy.layouts.get(tensor.stored_name)
        return set(listed) if listed else {strategy.stage_of(rank) for rank in ranks_of(tensor)}

    def _stages_outside(self) -> dict[str, set[int]]:
        """Name outside the strategy -> stages of the source that have it."""
        assert self._target is not None
        held = {name: ranks_of(tensor) for name, tensor in self.catalog.extras.items()}
        held.update({name: tuple(h.files) for name, h in {**self.catalog.unproven, **self.catalog.own}.items()})
        return {name: set(map(self._target.stage_of, ranks)) for name, ranks in held.items()}

    def _own(self, rank: int) -> Iterator[RankBox]:
        """The unlisted tensors in a rank's own file."""
        assert self._target is not None and self._cut_by is not None
        for name, tensor in self._tensors.items():
            layout = self._cut_by.layout(name, rank)
            if layout is not None:
                yield slice_of(name, tensor, layout, rank % self._target.devices_per_stage)
            elif tensor.recipe is not None:
                yield RankBox(name, tensor, whole_box(tensor))
        for name, tensor in self._unlisted(self.catalog.extras):
            if rank in ranks_of(tensor) or self._from_another(rank, tensor):
                yield RankBox(name, tensor, whole_box(tensor))
        for name, held in {**self.catalog.unproven, **self.catalog.own}.items():
            if name in self._listed:
                continue
            if rank in held.files:
                tensor = of_rank(held, self.catalog.files, rank)
                yield RankBox(name, tensor, whole_box(tensor))
            else:
                self._refuse_lost(rank, held)

    def _from_another(self, rank: int, tensor: SourceTensor) -> bool:
        """Whether a rank whose own file lacks a tensor gets the one that others of its stage hold alike.

        A file that is there may have left it to others (`remove_redundancy`). What a missing file holds is unknown.
        Raises CoverageError.
        """
        assert self._target is not None
        if self._target.stage_of(rank) not in self._stages[tensor.meta.name]:
            return False
        if rank not in self.catalog.ranks and self.catalog.nbytes(tensor) > SMALL:
            raise self._lost(rank, tensor.meta.name)
        return True

    def _refuse_lost(self, rank: int, held: UnlistedTensor) -> None:
        """Raise CoverageError when a rank should have its own, but its file is missing, or left it to others."""
        assert self._target is not None
        if self._target.stage_of(rank) not in self._stages[held.name]:
            return
        file = self.catalog.ranks.get(rank)
        if file is None or self.catalog.files[file].metadata.get(DEDUPLICATED) == "True":
            raise self._lost(rank, held.name)

    def _lost(self, rank: int, name: str) -> CoverageError:
        origin = self.catalog.strategy.origin if self.catalog.strategy else "the strategy"
        return CoverageError(
            f"parameter {name!r} is not in {origin}, so rank {rank} keeps what its own file holds of it, and no "
            f"file of rank {rank} is given that holds it: give that file as well. {REMEDY}"
        )


def _by_names(catalog: Catalog) -> Optional[Strategy]:
    """The strategy of the source, with its parameters under their names in the catalog."""
    strategy = catalog.strategy
    if strategy is None:
        return None
    stored = {tensor.stored_name for tensor in catalog.tensors.values()}
    layouts = {name: stages for name, stages in strategy.layouts.items() if name not in stored}
    for name, tensor in catalog.tensors.items():
        if tensor.stored_name in strategy.layouts:
            layouts[name] = strategy.layouts[tensor.stored_name]
    return strategy._replace(layouts=layouts)
