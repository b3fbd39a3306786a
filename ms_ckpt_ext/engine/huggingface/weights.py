"""Which parameters of a training are exported: its weights, and nothing else.

A parameter that a rule names is a weight. Optimizer states are recognized by their prefix, training scalars by having
one value, and a rule file lists what else a family's training holds. Whatever remains is unclear, and refused: nobody
notices that an exported model lacks something until it answers nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Callable, NamedTuple, TypeVar

from ms_ckpt_ext.core.computing.rules import Scale
from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.geometry.groups import STATES, group_of
from ms_ckpt_ext.core.planning.apply_rules import sources_among
from ms_ckpt_ext.core.planning.io_units import Limits, cut
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.engine.huggingface.rule_file import Family
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, UsageError, some

_FLOATS = ("BF16", "F16", "F32", "F64")
_Held = TypeVar("_Held")


class Outgoing(NamedTuple):
    """Names of a training: `weights` are exported, `left` are not, and what `open` are is unknown."""

    weights: tuple[str, ...]
    left: tuple[str, ...]
    open: tuple[str, ...]


def sort_names(catalog: Catalog, rules: Sequence[Rule], leaves: Iterable[str]) -> Outgoing:
    """Sort the names that a checkpoint holds or should hold; `rules` are those for an export."""
    names = {*catalog.tensors, *catalog.outside, *catalog.absent}
    weights = set(sources_among(names, rules))
    patterns = [Pattern(leaf) for leaf in leaves]

    def is_left(name: str) -> bool:
        if group_of(name, names) == STATES or any(pattern.match(name) is not None for pattern in patterns):
            return True
        return _is_scalar(catalog, name)

    rest = sorted(names - weights)
    left = [name for name in rest if is_left(name)]
    return Outgoing(tuple(sorted(weights)), tuple(left), tuple(sorted({*rest} - {*left})))


def only(catalog: Catalog, wanted: Callable[[str], bool]) -> Catalog:
    """The checkpoint with only the parameters that are wanted."""

    def kept(group: Mapping[str, _Held]) -> dict[str, _Held]:
        return {name: held for name, held in group.items() if wanted(name)}

    return catalog._replace(
        tensors=kept(catalog.tensors),
        extras=kept(catalog.extras),
        unproven=kept(catalog.unproven),
        own=kept(catalog.own),
        absent=kept(catalog.absent),
    )


def _is_scalar(catalog: Catalog, name: str) -> bool:
    """Whether it is text, or has one value and is outside the strategy, or outside a network by its name."""
    held = catalog.tensors.get(name) or catalog.extras.get(name) or catalog.unproven.get(name) or catalog.own.get(name)
    if held is None:
        return False
    dtype, shape = catalog.kind(held)
    outside = name not in catalog.tensors or "." not in name
    return dtype.name == "STR" or (prod(shape) == 1 and outside)


def require_weights(found: Outgoing, catalog: Catalog, family: Family, back: Sequence[Rule]) -> None:
    """Raise unless every weight has a rule, and every rule of the family its weight.

    Raises:
        UsageError: no rule names some parameter, or any of them.
        CoverageError: a parameter of the model is missing.
    """
    if not found.weights:
        names = {*catalog.tensors, *catalog.outside}
        there = some(sorted(names))
        if any(Pattern(rule.target).match(name) is not None for rule in back for name in names):
            raise UsageError(
                f"the checkpoint already has the names that the rules lead to ({there}): export takes a training's "
                "checkpoint, and rules from Hugging Face's names to the training's, as every load does"
            )
        raise UsageError(
            f"no rule names a parameter of the checkpoint, which holds {there}: are the rules its model's?"
        )
    if found.open:
        raise UsageError(
            f"no rule names {len(found.open)} of the checkpoint's parameters: {some(found.open)}. {_hint(family)}; "
            "what is no weight is left out by exclude"
        )
    missing = family.missing(set(found.weights))
    if missing:
        raise CoverageError(
            f"the checkpoint lacks {len(missing)} of the model's parameters: {some(missing)}. Check that it is whole, "
            f"and that config.json is that of its model. {_hint(family)}"
        )


def _hint(family: Family) -> str:
    """What may be wrong with the rules."""
    if not family.origin:
        return "Add a rule for each"
    switches = f"has switches for other arrangements ({', '.join(family.switches)}), set by sizes"
    return f"The rule file {family.origin!r} {switches if family.switches else 'may lack a rule'}"


def require_shapes(catalog: Catalog, family: Family) -> None:
    """Raise LayoutMismatchError when an exported tensor does not have the shape that config.json gives it.

    Rules take numbers of heads and experts from there. Some of another model's fit as well, and would mix weights up.
    """
    by_end: dict[str, list[tuple[Pattern, Shape]]] = {}
    for pattern, shape in ((Pattern(name), shape) for name, shape in family.shapes):
        by_end.setdefault(_end(pattern.text), []).append((pattern, shape))
    for name, held in catalog.tensors.items():
        found = held.meta.shape
        near = by_end.get(_end(name), ())
        shape = next((shape for pattern, shape in near if pattern.match(name) is not None), found)
        if shape != found:
            raise LayoutMismatchError(
                f"{name!r} would have shape {list(found)}, and by config.json the model has {list(shape)}: is it the "
                "config.json of this training's model? Where the training pads it, use Crop"
            )


def _end(name: str) -> str:
    """The part of a name after its last number, or placeholder."""
    return name[next((at for at in range(len(name), 0, -1) if name[at - 1] == "}" or name[at - 1].isdecimal()), 0) :]


def without_ties(catalog: Catalog, family: Family) -> Catalog:
    """The tensors to export, with only the first of tied ones.

    Raises LayoutMismatchError when tied ones differ, and FormatError or StorageError when they cannot be read.
    """
    tied = {name: first for name, first in family.tied.items() if {name, first} <= catalog.tensors.keys()}
    for name, first in tied.items():
        if not same_bytes(catalog, name, first):
            raise LayoutMismatchError(
                f"config.json says tie_word_embeddings, but {name!r} and {first!r} differ in the checkpoint, so one of "
                "them would be lost: say tie_word_embeddings=False in sizes and in config.json, or leave one out"
            )
    return catalog._replace(tensors={name: held for name, held in catalog.tensors.items() if name not in tied})


def cast(catalog: Catalog, dtype: str, keeps: Iterable[str]) -> Catalog:
    """The checkpoint with floats in one dtype, rounded to nearest, except for names that keep theirs."""
    patterns = [Pattern(keep) for keep in keeps]

    def changes(name: str, held: SourceTensor) -> bool:
        stored = held.meta.dtype.name
        return stored in _FLOATS and stored != dtype and all(pattern.match(name) is None for pattern in patterns)

    tensors = {
        name: Scale(name, name, dtype=dtype).make(name, [[held]]) if changes(name, held) else held
        for name, held in catalog.tensors.items()
    }
    return catalog._replace(tensors=tensors)


def same_bytes(catalog: Catalog, one: str, other: str) -> bool:
    """Whether two tensors have the same bytes, compared tile by tile."""
    from ms_ckpt_ext.engine.copying.worker import Assembler

    first, second = catalog.tensors[one], catalog.tensors[other]
    if first.meta[1:] != second.meta[1:]:
        return False
    dtype, tile = first.meta.dtype, Limits().tile
    with catalog.readers() as readers:
        assembler = Assembler(readers, catalog.stored, Limits())
        for box in cut(Region.whole(first.meta.shape), 0, dtype, tile):
            import numpy as np

            pair = [np.empty(dtype.nbytes(box.size), np.uint8) for _ in range(2)]
            for tensor, into in zip((first, second), pair):
                assembler.read(tensor, box, into)
            if pair[0].tobytes() != pair[1].tobytes():
                return False
    return True
