"""Names that differ by a wrapper's prefix: `dense.weight` in the network, `backbone.dense.weight` in the checkpoint.

1. A stored name may stand for a name of the network that it ends in, from a dot on; the rest is its prefix. What
   another Parameter takes under its own name stands for no other.
2. States of an optimizer end as the weights do that they belong to. They are told by the word that optimizers put
   first (`adam_m.`), or by their form: where `P` + `t` and `t` are both stored and end in the same name of the
   network, for half of what is below `P` or more, all below `P` belongs to what lies beside it. No state stands for a
   weight. Where it is so for less than half, weights may be lost, or some names be alike by chance: an error.
3. The one prefix under which every name is found is the wrapper's. Another prefix that serves as many as half of the
   names is another reading of the same checkpoint, and an error.
4. Where no prefix serves all, each name must have a single reading, and the names of one Cell, or of the numbered
   Cells of one list, the same prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from ms_ckpt_ext.errors import LayoutMismatchError

_STATE = re.compile(
    r"adam_[mv]|lamb_[mv]|muon_m|moments?\d*|momentum(_buf\w*)?|(max_)?exp_(avg|inf)\w*|vhat|accum(_update)?|accu_grads"
    r"|mean_(grad|square)|grad_(accumulation|res_momentum|proj_init)|dn_init|weights_clone|delta_weight"
    r"|step_size|ax_|pma_weight_\w+"
)
"""What the optimizers of MindSpore 2.10 and MindFormers put before a weight's name, where no Cell is likely to be
called so; `linear`, `prev`, `stat` and `ax` are told by their form alone."""
_RUN_IN = ("mu_", "eta_")
"""Words of ASGD's states, which run into a weight's name: told where that is there."""
_NUMBER = re.compile(r"(?:^|(?<=\.))\d+\.")
_DEEPEST = 99
"""Most dots of a stored name that is looked at: no Cell lies so deep, and every dot costs a look."""
_SHOWN = 4


class Suffixes(NamedTuple):
    """What suffixes tell.

    Attributes:
        found: name in the network -> name in the checkpoint.
        passed: name in the network that got nothing -> a name in the checkpoint that ends so, but is not meant.
    """

    found: Mapping[str, str]
    passed: Mapping[str, str]


def match_suffixes(
    missing: Sequence[str], named: Collection[str], held: Mapping[str, Hashable], mapped: Collection[str] = ()
) -> Suffixes:
    """Find names of a network in a checkpoint that has them behind a prefix.

    Args:
        missing: names in the network that the checkpoint lacks.
        named: names in the network that it has.
        held: name in the checkpoint -> what tells its contents from others; two names may share theirs.
        mapped: those of `named` that a name map brought there.

    Raises:
        LayoutMismatchError: a name has several readings.

    >>> stored = ["backbone.0.w", "backbone.10.w", "adam_m.backbone.0.w"]
    >>> match_suffixes(["0.w"], [], dict.fromkeys(stored, 0)).found
    {'0.w': 'backbone.0.w'}
    """
    readings = _readings({*missing, *named}, held)
    states, doubtful = _mirrors(readings, held)
    used = {held[name] for name in named}
    usable: dict[str, list[str]] = {}
    passed: dict[str, str] = {}
    is_state = lru_cache(None)(partial(_is_state, states=states))
    for name in missing:
        prefixes = [stored[: -len(name)] for stored in readings.get(name, ()) if held[stored] not in used]
        weights = [prefix for prefix in prefixes if not is_state(prefix) and not _runs_in(prefix + name, held)]
        if weights:
            usable[name] = weights
        elif prefixes:
            passed[name] = prefixes[0] + name
    found = _under_one(usable) or _under_several(usable)
    for name, stored in found.items():
        for head in _heads(stored[: -len(name)]):
            if head in doubtful:
                raise _doubted(name, stored, head, doubtful[head])
    cells = {_cell(name) for name in named if name not in mapped} - {""}
    strays = {name: stored for name, stored in found.items() if _cell(name) in cells}
    return Suffixes({n: s for n, s in found.items() if n not in strays}, {**passed, **strays})


def _readings(names: Collection[str], held: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Name in the network -> stored names that end in it, from a dot on."""
    found: dict[str, list[str]] = {}
    for stored in held:
        if stored.count(".") > _DEEPEST:
            continue
        for name in _tails(stored):
            if name in names:
                found.setdefault(name, []).append(stored)
    return found


def _tails(name: str) -> Iterator[str]:
    """What stands behind each of its dots, shortest first."""
    at = name.rfind(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.rfind(".", 0, at)


def _mirrors(readings: Mapping[str, Sequence[str]], held: Mapping[str, Hashable]) -> tuple[set[str], dict[str, str]]:
    """Prefixes of which half of what is below, or more, is there without them too; and those of which less is, each
    with one that is."""
    shortest: dict[str, int] = {}
    for name, found in readings.items():
        for stored in found:
            shortest[stored] = min(len(name), shortest.get(stored, len(name)))
    mirrored, below, example = Counter[str](), Counter[str](), dict[str, str]()
    for stored, prefix, tail in _splits(shortest):
        if tail in held and held[tail] != held[stored]:
            mirrored[prefix] += 1
            example[prefix] = tail
    for _, prefix, _ in _splits(shortest) if mirrored else ():
        if prefix in mirrored:
            below[prefix] += 1
    states = {prefix for prefix, count in mirrored.items() if count * 2 >= below[prefix]}
    return states, {prefix: tail for prefix, tail in example.items() if prefix not in states}


def _splits(shortest: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """(stored name, prefix, tail) at every dot that leaves a tail as long as a name of the network, or longer."""
    for stored, least in shortest.items():
        for tail in _tails(stored):
            if len(tail) >= least:
                yield stored, stored[: -len(tail)], tail


def _is_state(prefix: str, states: Collection[str]) -> bool:
    return any(map(_STATE.fullmatch, prefix.split(".")[:-1])) or any(head in states for head in _heads(prefix))


def _runs_in(stored: str, held: Mapping[str, Hashable]) -> bool:
    return any(stored.startswith(word) and stored[len(word) :] in held for word in _RUN_IN)


def _heads(prefix: str) -> Iterator[str]:
    """Up to each of its dots."""
    return (prefix[: match.end()] for match in re.finditer(r"\.", prefix))


def _under_one(usable: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Every name behind the same prefix; empty where none, or more than one, serves them all."""
    serves = Counter(prefix for prefixes in usable.values() for prefix in prefixes)
    common = [prefix for prefix, count in serves.items() if count == len(usable)]
    if len(common) != 1:
        return {}
    (prefix,) = common
    found = {name: prefix + name for name in usable}
    claimed = set(found.values())
    for name, prefixes in usable.items():
        others = [other for other in prefixes if other + name not in claimed and serves[other] * 2 >= len(usable)]
        if others:
            raise _several(name, [prefix, *others])
    return found


def _under_several(usable: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Every name behind the only prefix it is found under; a stored name stands for the longest that it ends in."""
    longest: dict[str, str] = {}
    for name in sorted(usable, key=len):
        longest.update((prefix + name, name) for prefix in usable[name])
    found: dict[str, str] = {}
    prefix_of: dict[str, tuple[str, str]] = {}
    for name, prefixes in usable.items():
        own = [prefix for prefix in prefixes if longest[prefix + name] == name]
        if len(own) > 1:
            raise _several(name, own)
        for prefix in own:
            found[name] = prefix + name
            sibling, other = prefix_of.setdefault(_cell(name) or name, (name, prefix))
            if other != prefix:
                raise LayoutMismatchError(
                    f"parameters {sibling!r} and {name!r} belong to one Cell or list, but the checkpoint has them as "
                    f"{other + sibling!r} and {found[name]!r}, which is not one place: a weight may be missing. "
                    f"{_remedy(name, found[name])}"
                )
    return found


def _cell(name: str) -> str:
    """The Cell that a Parameter belongs to, or the list of Cells, told by their numbers; "" for the network itself.

    >>> _cell("head.dense.w"), _cell("layers.3.norm.w"), _cell("0.w"), _cell("w")
    ('head.dense', 'layers.#', '#', '')
    """
    number = _NUMBER.search(name)
    return name.rpartition(".")[0] if number is None else f"{name[: number.start()]}#"


def _several(name: str, prefixes: Sequence[str]) -> LayoutMismatchError:
    more = f" and {len(prefixes) - _SHOWN} more" if len(prefixes) > _SHOWN else ""
    listed = ", ".join(repr(prefix + name) for prefix in prefixes[:_SHOWN])
    return LayoutMismatchError(
        f"the checkpoint has no parameter {name!r} but several that end so, and which one is meant is not clear: "
        f"{listed}{more}. {_remedy(name, prefixes[0] + name)}"
    )


def _doubted(name: str, stored: str, prefix: str, tail: str) -> LayoutMismatchError:
    return LayoutMismatchError(
        f"parameter {name!r} would be {stored!r} of the checkpoint, but that has both {tail!r} and {prefix + tail!r}: "
        f"whether what begins with {prefix!r} are the weights, copies or states of them is not clear. "
        f"{_remedy(name, stored)}"
    )


def _remedy(name: str, stored: str) -> str:
    return (
        f"Say so by name_map, such as {{{name!r}: {stored!r}}}, or leave the others out by choice_func; "
        "strict_load=True takes nothing by the end of its name"
    )
