"""Parameters by other names: what `choice_func` and `name_map` mean, for every job and load that takes them.

1. `choice_func` is asked about every name of the checkpoint: keep it (True), leave it out (False), or a new name.
2. `name_map` gives a name of the result what a name of step 1 holds, in place of whatever has that name by itself.
   Several names may share a source, and a source keeps its own name too: tied weights need both.

The result is a `Catalog` like any other, so nothing behind it knows that names were changed. Conversions work file by
file and read `name_map` the other way round, from the input's name to the output's: see `engine.conversion`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Callable, NamedTuple, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.core.plan import SourceTensor
from ms_ckpt_ext.engine.catalog import Catalog
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError

Choice = Callable[[str], Union[bool, str]]
_LISTED = 5


class Naming(NamedTuple):
    """How the parameters of a checkpoint are to be called.

    Attributes:
        choice: name in the checkpoint -> True (keep), False or None (leave out) or a str (new name); None keeps all.
        name_map: name in the result -> name after the choice.
        truthy: what a choice returns counts by its truth, as stock MindSpore has it, unless it is a str.
        scalars: the choice is asked about training scalars as well.
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
        if self.choice is None and not self.name_map:
            return catalog
        taken: dict[str, str] = {}
        tensors = self._chosen(self.choice, catalog.tensors, taken)
        extras = self._chosen(self.choice if self.scalars else None, catalog.extras, taken)
        if (catalog.tensors or catalog.extras) and not (tensors or extras):
            raise UsageError(
                "choice_func, or the prefixes or globs in its place, dropped every parameter; nothing would be left"
            )
        chosen = ((chosen_name(self.choice, name, self.truthy), where) for name, where in catalog.absent.items())
        absent = {name: where for name, where in chosen if name is not None}
        warn_unknown(self.name_map.values(), {*tensors, *extras, *absent, *self._aside()}, "the checkpoint")
        tensors, extras = _mapped(tensors, extras, self.name_map)
        absent = {
            **{name: ranks for name, ranks in absent.items() if name not in self.name_map},
            **{name: absent[source] for name, source in self.name_map.items() if source in absent},
        }
        return catalog._replace(tensors=tensors, extras=extras, absent=absent)

    def _aside(self) -> set[str]:
        chosen = (chosen_name(self.choice, name, self.truthy) for name in self.aside) if self.name_map else ()
        return {name for name in chosen if name is not None}

    def _chosen(
        self, choice: Optional[Choice], tensors: Mapping[str, SourceTensor], taken: dict[str, str]
    ) -> dict[str, SourceTensor]:
        """One group under its new names. `taken` is new name -> old one over all groups, and is added to."""
        found: dict[str, SourceTensor] = {}
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
    """The name that a choice function gives a parameter; None when it drops it. Raises ArgumentTypeError."""
    chosen: Any = True if choice is None else choice(name)
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


def called(tensor: SourceTensor, name: str) -> SourceTensor:
    """A parameter under a name; where it is stored stays."""
    return tensor if tensor.meta.name == name else tensor._replace(meta=tensor.meta._replace(name=name))


def warn_unknown(sources: Iterable[str], known: Iterable[str], which: str) -> None:
    """Log names in a name map that the checkpoint lacks."""
    missing = sorted(set(sources) - set(known))
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        log.warning("name_map speaks of parameters that %s does not hold: %s%s", which, missing[:_LISTED], more)


def _mapped(
    tensors: Mapping[str, SourceTensor], extras: Mapping[str, SourceTensor], name_map: Mapping[str, str]
) -> tuple[dict[str, SourceTensor], dict[str, SourceTensor]]:
    """Both groups with what the map adds; a name whose source is missing is nobody's, not its namesake's."""
    kept, kept_extras = ({n: t for n, t in held.items() if n not in name_map} for held in (tensors, extras))
    for target, source in name_map.items():
        if source in tensors:
            kept[target] = called(tensors[source], target)
        elif source in extras:
            kept_extras[target] = called(extras[source], target)
    return kept, kept_extras
