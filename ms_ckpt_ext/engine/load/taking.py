"""What a rank of a running job can take of a checkpoint: boxes under its strategy, and what no strategy says.

The network says what is wanted, so nothing is compared before that is known.

1. What the target's strategy lists is a box of the parameter, as for every job.
2. What it does not list, though the source's does, is the same slice as before where the rank stands where it stood: in
   a job of as many ranks, each with the slices that it saved. Elsewhere it is whole.
3. What the source's strategy does not list is one for all where the ranks' copies are alike. Where they differ, each
   rank takes its own, in a job whose ranks stand where they stood; for any other job that is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.geometry.layout import Layout, whole
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor, whole_box
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.rank_boxes import RankBox, box_under, is_cut, listed_boxes, nothing_listed, slice_of
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, called, of_rank, ranks_of, side_by_side
from ms_ckpt_ext.errors import CoverageError


class Takes(NamedTuple):
    """What a rank takes under one name.

    Attributes:
        tensor: the parameter.
        region: the box of it; None for one without elements.
        layout: of which that box is the rank's.
        full: shape that the parameter has before it is cut.
        open: whether it is this at all is known when the copies are compared.
        doubt: for a message, why the box may not be the slice that is wanted; "" where nothing speaks for that.
    """

    tensor: SourceTensor
    region: Optional[Region]
    layout: Layout
    full: Shape
    open: bool = False
    doubt: str = ""


class Taking:
    """What one rank takes.

    Args:
        catalog: the source, by the names of the network.
        target: None for one device.
        rank: which one.
        world: ranks of the job.

    Attributes:
        stands: whether the rank stands where it stood when the checkpoint was saved.
        partial: the target speaks of some pipeline stages of the job only, as the layouts of a network do.
    """

    def __init__(self, catalog: Catalog, target: Optional[Strategy], rank: int, world: int) -> None:
        self.catalog = catalog
        self._target, self._rank, self._world = target, rank, world
        self.stands = target is not None and _stands(catalog, target, rank, world)
        self.partial = target is not None and _partial(target, world)

    def all(self) -> dict[str, Takes]:
        """Everything there is for this rank, by name.

        Raises LayoutMismatchError: as `rank_boxes`.
        """
        known = self.catalog._replace(own={}, unproven={})
        found = {box.name: self._listed(box, box.name) for box in listed_boxes(known, self._target, self._rank)}
        for name, takes in (*self._unlisted(), *self._extras(), *self._open()):
            found.setdefault(name, takes)
        return found

    def require_common(self, wanted: Iterable[str] = ()) -> None:
        """Raise UsageError where the target lists nothing that there is, nor what goes by other names there."""
        if self._target is None:
            return
        listed = self._target.names_of(self._rank)
        there = (self.catalog.tensors, self.catalog.extras, self.catalog.own, self.catalog.unproven)
        if not any(name in held for name in listed for held in there) and not set(wanted) & set(listed):
            raise nothing_listed(self._target, self._rank)

    def renamed(self, name: str, wanted: str) -> Optional[Takes]:
        """A parameter that is `wanted` in the network, by the target's layout of that; None where it lists the name."""
        tensor = self.catalog.tensors.get(name) or self.catalog.extras.get(name)
        target = self._target
        if target is None or tensor is None or name in target.layouts or target.layout(wanted, self._rank) is None:
            return None
        return self._listed(box_under(target, self._rank, wanted, tensor), name)

    def lists(self, name: str, wanted: str) -> bool:
        """Whether both strategies list a parameter, the target's, where there is one, by its name in the network."""
        listed = self._target is None or name in self._target.layouts or wanted in self._target.layouts
        return name in self.catalog.tensors and listed

    def needs_comparing(self, names: Collection[str]) -> list[str]:
        """Of some names, those that are open, for a rank that reads its own file alone.

        Where it stands as it stood it takes the copy in its own file, unless a layout says that it is to be cut.
        """
        return [name for name in names if name in self.catalog.unproven and not self._plainly_own(name)]

    def own(self, name: str) -> Optional[Takes]:
        """What this rank takes under a name that is open, from its own file; None where it cannot."""
        held = self._held(name)
        if held is None or not self.stands or self._rank not in held.files:
            return None
        found = _whole(of_rank(held, self.catalog.files, self._rank), doubt=_OWN)
        return found._replace(full=self._full(name, found.full))

    def refuse_others(self, names: Iterable[str]) -> None:
        """Raise LayoutMismatchError for what differs by rank, the largest first, unless the rank stands as it stood."""
        if not self.stands:
            own = [name for name in names if name in self.catalog.own]
            own.sort(key=lambda name: -self.catalog.nbytes(self.catalog.own[name]))
            if own:
                from ms_ckpt_ext.engine.unlisted.proven import refuse_own

                refuse_own(self.catalog, own, "no rank of this job can take it")

    def refuse_unseen(self, names: Iterable[str]) -> None:
        """Raise LayoutMismatchError for what is alike as far as files are there, where the rank's own is not among
        them and no other tells. In a job of one rank the Parameter's shape tells."""
        if self._world == 1 or self.catalog.all_there:
            return
        from ms_ckpt_ext.engine.unlisted.proven import doubted, refuse_own

        doubts = doubted(self.catalog)
        lost = [name for name in names if name in doubts.own and name in self.catalog.extras]
        mine = [name for name in lost if self.stands and self._rank in ranks_of(self.catalog.extras[name])]
        refuse_own(doubts, [name for name in lost if name not in mine], "no rank of this job can take it")

    def one_of(self, name: str) -> Takes:
        """`own`, as a box of one parameter that holds what all ranks have side by side.

        Raises:
            LayoutMismatchError: the ranks differ in it, and do not stand where they stood.
            CoverageError: the rank's own file lacks it.
        """
        held = self.catalog.own[name]
        self.refuse_others([name])
        if self._rank not in held.files:
            raise self._lacks(held)
        for tensor in all_side_by_side(self.catalog, name, self._world).values():
            placement = tensor.placements[0]
            layout = Layout((self._world,), ((0,), *(() for _ in tensor.meta.shape[1:])))
            if layout.cells[self._rank] in placement.holders:
                region = layout.region(self._rank, tensor.meta.shape) if all(tensor.meta.shape) else None
                mine = held.entry(self.catalog.files, self._rank).shape
                return Takes(tensor, region, layout, self._full(name, mine), doubt=_OWN)
        raise self._lacks(held)

    def require_own(self, name: str) -> Takes:
        """`own`, or raise as `one_of`."""
        found = self.own(name)
        if found is None:
            self.refuse_others([name])
            raise self._lacks(self.catalog.own[name])
        return found

    def alike_own(self, name: str) -> Optional[Takes]:
        """What is alike on all ranks, for a rank that stands where it stood and whose own file has it.

        It may be a slice that equals the others by chance, such as zeros, which is not to be cut once more.
        """
        tensor = self.catalog.extras.get(name)
        if tensor is None or not self.stands or self._rank not in ranks_of(tensor):
            return None
        return _whole(tensor, doubt=_OWN)

    def elsewhere(self, name: str) -> bool:
        """Whether something that differs by rank is of other pipeline stages than that of a rank which stands where it
        stood."""
        held, source = self.catalog.own.get(name), self.catalog.strategy
        if held is None or source is None or not self.stands:
            return False
        return source.stage_of(self._rank) not in set(map(source.stage_of, held.files))

    def _lacks(self, held: UnlistedTensor) -> CoverageError:
        return CoverageError(
            f"parameter {held.name!r} is not in the source's strategy, and the ranks' files differ in it "
            f"({held.differences()}), so every rank takes its own; but the file of rank {self._rank} does not hold it: "
            "give the file that does, or leave it out by choice_func"
        )

    def _held(self, name: str) -> Optional[UnlistedTensor]:
        return self.catalog.own.get(name) or self.catalog.unproven.get(name)

    def _plainly_own(self, name: str) -> bool:
        layout = self._target.layout(name, self._rank) if self._target else None
        cut = layout is not None and max(layout.parts, default=1) > 1
        return not cut and self.own(name) is not None

    def _full(self, name: str, shape: Shape) -> Shape:
        """The whole of what the rank has a slice of, where the target's strategy lists it."""
        layout = self._target.layout(name, self._rank) if self._target else None
        layout = layout.over(len(shape)) if layout else None
        return shape if layout is None or len(layout.parts) != len(shape) else layout.full_shape(shape)

    def _listed(self, box: RankBox, stored: str) -> Takes:
        layout = self._target.layout(box.name, self._rank) if self._target else None
        ndim = len(box.tensor.meta.shape)
        full = (self.catalog.tensors.get(stored) or self.catalog.extras[stored]).meta.shape
        return Takes(box.tensor, box.region, layout.over(ndim) if layout else whole(ndim), full)

    def _unlisted(self) -> Iterator[tuple[str, Takes]]:
        """Parameters that the source's strategy lists, and the target's does not."""
        target = self._target
        if target is None:
            return
        for name, tensor in self.catalog.tensors.items():
            if name in target.layouts:
                continue
            source = self.catalog.strategy
            layout = source.layout(tensor.stored_name, self._rank) if source and self.stands else None
            if layout is not None:
                box = slice_of(name, tensor, layout, self._rank % target.devices_per_stage)
                yield name, Takes(box.tensor, box.region, layout.over(len(tensor.meta.shape)), tensor.meta.shape)
            elif not self.partial and (not self.stands or tensor.recipe is not None):
                yield name, _whole(tensor, doubt=_UNLISTED if is_cut(tensor) else "")

    def _extras(self) -> Iterator[tuple[str, Takes]]:
        return ((name, _whole(tensor)) for name, tensor in self.catalog.extras.items())

    def _open(self) -> Iterator[tuple[str, Takes]]:
        """What is to be compared, or known to differ: as the rank's own file has it, else as another one does."""
        for name, held in {**self.catalog.unproven, **self.catalog.own}.items():
            if not self.elsewhere(name):
                rank = self._rank if self._rank in held.files else next(iter(held.files))
                yield name, _whole(of_rank(held, self.catalog.files, rank), is_open=True)


def all_side_by_side(catalog: Catalog, name: str, world: int) -> dict[str, SourceTensor]:
    """What the ranks have of their own under a name, as parameters of a catalog: one for every dtype and shape."""
    found = side_by_side(catalog.own[name], catalog.files, world)
    keyed = {f"{name} (each rank's own{f', {n}' if n else ''})": tensor for n, (tensor, _) in enumerate(found)}
    return {key: called(tensor, key) for key, tensor in keyed.items()}


_OWN = "the source's strategy does not list it, so it is what the file of this very rank holds"
_UNLISTED = "predict_strategy does not list it, so nothing says how it is cut, and it is taken whole"


def _whole(tensor: SourceTensor, is_open: bool = False, doubt: str = "") -> Takes:
    return Takes(tensor, whole_box(tensor), whole(len(tensor.meta.shape)), tensor.meta.shape, is_open, doubt)


def _partial(target: Strategy, world: int) -> bool:
    stages = {stage for held in target.layouts.values() for stage in held}
    return len(stages) * target.devices_per_stage < world


def _stands(catalog: Catalog, target: Strategy, rank: int, world: int) -> bool:
    """Whether the source has as many ranks, and this one had the slices that the target gives it.

    Optimizer shards are left aside. False when nothing is listed by both, for then nothing tells.
    """
    source = catalog.strategy
    if source is None or (source.world, source.devices_per_stage) != (world, target.devices_per_stage):
        return False
    shared = {name: catalog.tensors[name] for name in target.names_of(rank) if name in catalog.tensors}
    pairs = {
        (source.layout(tensor.stored_name, rank), target.layout(name, rank), len(tensor.meta.shape))
        for name, tensor in shared.items()
        if tensor.recipe is None
    }
    return bool(pairs) and all(one and two and _same_cut(one, two, ndim) for one, two, ndim in pairs)


def _same_cut(one: Layout, two: Layout, ndim: int) -> bool:
    plain = [Layout(layout.dev_matrix, layout.tensor_map).over(ndim) for layout in (one, two)]
    return plain[0].parts == plain[1].parts and plain[0].cells == plain[1].cells
