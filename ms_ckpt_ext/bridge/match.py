"""Which Parameter takes what: names, boxes, shapes and dtypes, all settled before the first byte is read.

The rules are those of `mindspore.load_param_into_net`: by name, then (unless strict) by suffix; casts within floats and
within ints; Parameters that pipeline stages share are filled by their owner. Suffixes are matched more strictly here,
see `core.planning.suffixes`: stock takes the first name with that suffix, even that of an optimizer's moment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.array import INT4, DType, Region, Shape
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.load.taking import Takes, Taking
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, UnsupportedError

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.suffixes import Suffixes

_FAMILIES = (
    {ms.float16, ms.float32, ms.float64, ms.bfloat16},
    {ms.int8, ms.int16, ms.int32, ms.int64, ms.qint4x2},
)
"""MindSpore casts within a family on load (`load_param_into_net`), never between them."""


class Offer(NamedTuple):
    """What the checkpoint has for one name on this rank.

    Attributes:
        tensor, region, layout, full, open, doubt: see `engine.load.taking.Takes`.
        shape: of the region.
        dtype: MindSpore's, packed int4 included.
    """

    tensor: SourceTensor
    region: Optional[Region]
    shape: Shape
    dtype: Any
    layout: Layout
    full: Shape
    open: bool
    doubt: str


class Match(NamedTuple):
    """A Parameter and what goes into it."""

    parameter: Any
    name: str
    offer: Offer


def check_cell(network: Any) -> None:
    """Raise ArgumentTypeError unless `network` is a Cell."""
    if not isinstance(network, ms.nn.Cell):
        raise ArgumentTypeError(f"network must be a mindspore.nn.Cell or None, got {type(network).__name__}")


def offers_of(catalog: Catalog, strategy: Optional[Strategy], rank: int) -> dict[str, Offer]:
    """Everything the checkpoint has for `rank` under `strategy`, by its name in the network."""
    return offers_to(Taking(catalog, strategy, rank, 1))


def offers_to(taking: Taking) -> dict[str, Offer]:
    """Everything the checkpoint has for a rank, by its name in the network."""
    return {name: offer_of(taking.catalog, takes) for name, takes in taking.all().items()}


def offer_of(catalog: Catalog, takes: Takes) -> Offer:
    """What a rank takes, with MindSpore's dtype."""
    tensor, region, layout, full, is_open, doubt = takes
    packed = catalog.notes.get(tensor.stored_name) == INT4
    dtype = ms.qint4x2 if packed else mindspore_dtype(tensor.meta.dtype)
    return Offer(tensor, region, region.shape if region else tensor.meta.shape, dtype, layout, full, is_open, doubt)


_ATTRIBUTES = {"Bool": "bool_", "Float8E4M3FN": "float8_e4m3fn", "Float8E5M2": "float8_e5m2"}
"""MindSpore's dtypes whose attribute is not their name in lower case."""


def mindspore_dtype(dtype: DType) -> Any:
    """MindSpore's dtype of elements; None where it has none."""
    return getattr(ms, _ATTRIBUTES.get(dtype.mindspore, dtype.mindspore.lower()), None)


def nbytes_of(offer: Offer) -> int:
    """Bytes of this rank's slice, in the checkpoint's dtype."""
    return offer.tensor.meta.dtype.nbytes(math.prod(offer.shape))


class Matches(NamedTuple):
    """What goes where.

    Attributes:
        matches: Parameters that get something.
        missing: names of those that get nothing.
        unused: names in the checkpoint that go nowhere.
        passed: some of `missing` -> a name in the checkpoint with that suffix, which is not what is meant.
    """

    matches: list[Match]
    missing: list[str]
    unused: list[str]
    passed: Mapping[str, str]


def match_parameters(network: Any, catalog: Catalog, offers: Mapping[str, Offer], exact: bool) -> Matches:
    """Pair Parameters with what the catalog offers, by name, then (unless exact) by suffix.

    Raises:
        UnsupportedError: a Parameter is a MapParameter, or has a storage format of its own.
        LayoutMismatchError: a suffix has several readings.
        CoverageError: a Parameter gets nothing, or would get another's, as the name it matches is in no file.
    """
    named, missing = sort_parameters(network, offers)
    for parameter in named:
        if type(parameter).__name__ == "MapParameter":
            raise UnsupportedError(
                f"parameter {parameter.name!r} is a MapParameter, which cannot be resharded; load it with MindSpore",
                "network",
            )
        if parameter.param_info.storage_format:
            raise UnsupportedError(
                f"parameter {parameter.name!r} is made with storage_format={parameter.param_info.storage_format!r}; "
                "bytes of a checkpoint are in no such order: make it without, and convert it after the load",
                "network",
            )
    found = None if exact or not missing else suffixes(_names(missing), _names(named), offers, catalog.absent)
    catalog.require([*_names(missing), *(found.found.values() if found else ())])
    stored = {name: name for name in _names(named)}
    if found is not None:
        tell_suffixes(found)
        stored.update(found.found)
    filled = [(p, stored[p.name]) for p in (*named, *missing) if p.name in stored]
    matches = [Match(parameter, name, offers[name]) for parameter, name in filled]
    taken = {_stored(match.offer) for match in matches}
    return Matches(
        matches,
        [name for name in _names(missing) if name not in stored],
        [name for name, offer in offers.items() if _stored(offer) not in taken],
        found.passed if found else {},
    )


class Sorted(NamedTuple):
    """Parameters of a network whose names are held, and those whose names are not; the rest is filled in other ways."""

    named: list[Any]
    missing: list[Any]


def sort_parameters(network: Any, held: Container[str]) -> Sorted:
    """Sort the Parameters of a network by whether their names are held."""
    found = Sorted([], [])
    parallel = is_parallel(network)
    for _, parameter in network.parameters_and_names():
        name = parameter.name
        if parameter.param_info.is_pipeline_shared_param:
            continue
        if name in held:
            found.named.append(parameter)
        elif not name.startswith(ACCUMULATED_GRADIENT_PREFIX) and not (parallel and not parameter.sliced):
            found.missing.append(parameter)
    return found


def _names(parameters: Iterable[Any]) -> list[str]:
    return [parameter.name for parameter in parameters]


def suffixes(
    missing: Sequence[str], named: Sequence[str], offers: Mapping[str, Offer], absent: Iterable[str]
) -> Suffixes:
    """What missing names are called in the checkpoint, whether held or absent there. Raises as `match_suffixes`."""
    from ms_ckpt_ext.core.planning.suffixes import match_suffixes

    contents = {**{name: (name, 0) for name in absent}, **{name: _stored(offer) for name, offer in offers.items()}}
    mapped = [name for name in named if offers[name].tensor.stored_name != name]
    return match_suffixes(missing, named, contents, mapped)


def told_passed(found: Matches) -> str:
    """For a message: names with the suffix of a missing one, and why they were not taken; "" if there are none."""
    told = "; ".join(f"{stored!r} is no {name!r}" for name, stored in list(found.passed.items())[:3])
    return f" ({told}: a state of an optimizer, or of another Cell)" if told else ""


def tell_suffixes(found: Suffixes) -> None:
    """Log, once, what is loaded under another name."""
    prefixes = Counter(stored[: -len(name)] for name, stored in found.found.items())
    if prefixes:
        log.warning(
            "%d parameters are loaded from names that end as theirs do, behind %s: %s from %s, and so on",
            len(found.found),
            ", ".join(f"{prefix!r} ({count})" for prefix, count in prefixes.most_common()),
            *map(repr, next(iter(found.found.items()))),
        )


def _stored(offer: Offer) -> tuple[str, int]:
    """Equal for offers of the same contents: what a name map renames does not count as unused under its own name."""
    return offer.tensor.stored_name, id(offer.tensor.recipe)


def is_parallel(network: Any) -> bool:
    """Whether MindSpore cuts this network's Parameters when it is compiled."""
    mode = ms.context.get_auto_parallel_context("parallel_mode")
    wrappers = [type(cell).__name__ for cell in (network, *network.cells())]
    return mode in ("semi_auto_parallel", "auto_parallel") or "AutoParallel" in wrappers


def check_fit(match: Match, strict: bool) -> None:
    """Raise LayoutMismatchError unless the slice fits its Parameter in shape and dtype, casts included."""
    parameter, offer = match.parameter, match.offer
    if not fits(match):
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} has shape {list(parameter.shape)} in the network, but this rank's slice of "
            f"it in the checkpoint is {list(offer.shape)} (full shape {list(offer.full)}); "
            + (f"{offer.doubt}; " if offer.doubt else "")
            + "check predict_strategy, and compile the network before loading if it is parallel"
        )
    if offer.dtype is None:
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} is {offer.tensor.meta.dtype.name} in the checkpoint, which MindSpore has no "
            "dtype for; convert the checkpoint first"
        )
    if parameter.dtype != offer.dtype and (strict or not castable(parameter, offer)):
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} is {parameter.dtype} in the network and {offer.dtype} in the checkpoint; "
            + ("strict_load forbids a cast" if strict else "MindSpore casts within floats and within ints only")
        )


def fits(match: Match) -> bool:
    """Whether a Parameter takes the slice, in shape: as it is, or because it is not cut yet."""
    return same_shape(match) or _takes_slice(match)


def same_shape(match: Match) -> bool:
    """Whether the slice has the Parameter's shape, apart from trailing axes of length 1."""
    shape, stored = tuple(match.parameter.shape), match.offer.shape
    return shape == (stored[: len(shape)] if set(stored[len(shape) :]) <= {1} else stored)


def castable(one: Any, other: Any) -> bool:
    """Whether MindSpore casts between the dtypes of the two when it loads."""
    return any({one.dtype, other.dtype} <= family for family in _FAMILIES)


def _takes_slice(match: Match) -> bool:
    """A Parameter that still has its full shape and is not sliced yet takes the slice and its shape."""
    return not match.parameter.sliced and tuple(match.parameter.shape) == match.offer.full
