"""Parameters by other names: what `choice_func` and `name_map` mean, for every job and load that takes them.

1. `choice_func` is asked about every name of the checkpoint: keep it (True), leave it out (False), or a new name.
2. `name_map` gives a name of the result what a name of step 1 holds, in place of whatever has that name by itself.
   Several names may share a source, and a source keeps its own name too: tied weights need both.

The result is a `Catalog` like any other, so nothing behind it knows that names were changed. Conversions work file by
file and read `name_map` the other way round, from the input's name to the output's: see `engine.files.convert`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, Optional, TypeVar, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import UnlistedTensor, called
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, some

Choice = Callable[[str], Union[bool, str]]
_LISTED = 5
_Named = TypeVar("_Named", SourceTensor, UnlistedTensor)


class Naming(NamedTuple):
    """How the parameters of a checkpoint are to be called.

    Attributes:
        choice: name in the checkpoint -> True (keep), False or None (leave out) or a str (new name); None keeps all.
        name_map: name in the result -> name after the choice.
        truthy: what a choice returns counts by its truth, as stock MindSpore has it, unless it is a str.
        scalars: the choice is asked about training scalars as well; about what differs by rank it always is.
        aside: names in the checkpoint that are not asked for; the map may speak of them.
    """

    choice: Optional[Choice] = None
    name_map: Mapping[str, str] = MappingProxyType({})
    truthy: bool = False
    scalars: bool = True
    aside: frozenset[str] = frozenset()

    def of(self, catalog: Catalog) -> Catalog:
        """The checkpoint under the new names.

        Raises:
            ArgumentTypeError: the choice function returned something other than bool or str.
            UsageError: two parameters, or a parameter and a scalar, get the same name; or nothing is left.
        """
        taken: dict[str, str] = {}
        outside = self.choice if self.scalars else None
        tensors = self._chosen(self.choice, catalog.tensors, taken)
        extras = self._chosen(outside, catalog.extras, taken)
        unproven = self._chosen(outside, catalog.unproven, taken)
        own = self._chosen(self.choice, catalog.own, taken)
        if any(_groups(catalog)) and not any((tensors, extras, unproven, own)):
            raise UsageError(
                "choice_func, or the prefixes or globs in its place, dropped every parameter; nothing would be left"
            )
        _tell_dropped(catalog, taken.values())
        chosen = ((chosen_name(self.choice, name, self.truthy), where) for name, where in catalog.absent.items())
        absent = {name: where for name, where in chosen if name is not None}
        known = {*tensors, *extras, *unproven, *own, *absent, *self._aside()}
        warn_unknown(self.name_map.values(), known, "the checkpoint")
        named = catalog._replace(
            tensors=_mapped(tensors, self.name_map),
            extras=_mapped(extras, self.name_map),
            unproven=_mapped(unproven, self.name_map),
            own=_mapped(own, self.name_map),
        )
        absent = {
            **{name: ranks for name, ranks in absent.items() if name not in self.name_map},
            **{name: absent[source] for name, source in self.name_map.items() if source in absent},
        }
        return named._replace(absent=absent, mapped=frozenset(self.name_map.values()))

    def _aside(self) -> set[str]:
        chosen = (chosen_name(self.choice, name, self.truthy) for name in self.aside) if self.name_map else ()
        return {name for name in chosen if name is not None}

    def _chosen(
        self, choice: Optional[Choice], tensors: Mapping[str, _Named], taken: dict[str, str]
    ) -> dict[str, _Named]:
        """One group under its new names. `taken` is new name -> old one over all groups, and is added to."""
        found: dict[str, _Named] = {}
        for name, tensor in tensors.items():
            new = chosen_name(choice, name, self.truthy)
            if new is None:
                continue
            before = taken.setdefault(new, name)
            if before != name:
                raise UsageError(
                    f"choice_func gives both {before!r} and {name!r} the name {new!r}; names must stay unique"
                )
            found[new] = called(tensor, new)
        return found


def chosen_name(choice: Optional[Choice], name: str, truthy: bool = False) -> Optional[str]:
    """The name that a choice function gives a parameter; None when it drops it.

    Raises ArgumentTypeError when it gives something else, or fails.
    """
    try:
        chosen: Any = True if choice is None else choice(name)
    except Exception as error:
        raise ArgumentTypeError(f"choice_func fails at {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(chosen, (bool, str)) and not truthy and chosen is not None and not _is_numpy_bool(chosen):
        raise ArgumentTypeError(
            f"choice_func must return a bool (keep or drop) or a str (the new name), but returned "
            f"{type(chosen).__name__} for parameter {name!r}"
        )
    return chosen if isinstance(chosen, str) else name if chosen else None


def _is_numpy_bool(value: Any) -> bool:
    """Whether a comparison by numpy gave this; without numpy, which most jobs do not import."""
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")


def _groups(catalog: Catalog) -> tuple[Mapping[str, Union[SourceTensor, UnlistedTensor]], ...]:
    return catalog.tensors, catalog.extras, catalog.unproven, catalog.own


def _tell_dropped(catalog: Catalog, kept: Iterable[str]) -> None:
    """Log what a choice left out: how many parameters and bytes, and some of their names."""
    names = set(kept)
    dropped = {n: held for group in _groups(catalog) for n, held in group.items() if n not in names}
    if dropped:
        nbytes = sum(map(catalog.nbytes, dropped.values()))
        log.info("choice_func leaves out %d parameters, %d bytes: %s", len(dropped), nbytes, some(dropped))


def warn_unknown(sources: Iterable[str], known: Iterable[str], which: str) -> None:
    """Log names in a name map that the checkpoint lacks."""
    missing = sorted(set(sources) - set(known))
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        log.warning("name_map speaks of parameters that %s does not hold: %s%s", which, missing[:_LISTED], more)


def _mapped(held: Mapping[str, _Named], name_map: Mapping[str, str]) -> dict[str, _Named]:
    """A group with what the map adds; a mapped name whose source is missing is dropped."""
    kept = {name: tensor for name, tensor in held.items() if name not in name_map}
    kept.update({name: called(held[source], name) for name, source in name_map.items() if source in held})
    return kept
