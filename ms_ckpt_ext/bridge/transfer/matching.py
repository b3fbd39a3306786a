"""Which Parameter of the target takes what of the source; settled before anything is moved.

By name, after the rules, `choice_func` and `name_map`; unless strict also by suffix, as a load does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Match, Offer, check_fit, offer_of, offers_to, suffixes, tell_suffixes
from ms_ckpt_ext.bridge.transfer.sides import SideHere
from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.pieces import locate
from ms_ckpt_ext.engine.load.taking import Takes, Taking
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.renaming import Naming, chosen_name
from ms_ckpt_ext.engine.transfer.wanted import WantedBox
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, some


class Matching(NamedTuple):
    """What goes where on one rank.

    Attributes:
        matches: Parameters that take something; a match's name is that of the source.
        missing: names of Parameters that take nothing.
        unused: names of the source that go nowhere.
    """

    matches: tuple[Match, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def wants(self, boxes: Mapping[str, Box]) -> dict[str, WantedBox]:
        """What the Parameters take of the source, by the Parameter's name."""
        return {match.parameter.name: _wanted(match, boxes.get(match.parameter.name)) for match in self.matches}

    def held(self, boxes: Mapping[str, Box], place: int) -> Matching:
        """Without the Parameters of which the source does not hold every part. `place`: of this rank in the layouts."""
        lost = {match.parameter.name for match in self.matches if not _is_held(match, boxes, place)}
        kept = tuple(match for match in self.matches if match.parameter.name not in lost)
        return self._replace(matches=kept, missing=(*self.missing, *sorted(lost)))


def _is_held(match: Match, boxes: Mapping[str, Box], place: int) -> bool:
    tensor = match.offer.tensor
    if not all(tensor.meta.shape):
        return True
    try:
        locate(tensor, _wanted(match, boxes.get(match.parameter.name)).region(tensor.meta.shape, place))
    except CoverageError:
        return False
    return True


def _wanted(match: Match, box: Optional[Box]) -> WantedBox:
    region: Optional[Region] = None if box is None else box.region
    where = match.offer.layout.over(len(match.offer.tensor.meta.shape)) if region is None else region
    return WantedBox(match.offer.tensor.meta.name, where)


def match_sides(
    catalog: Catalog,
    named: Catalog,
    side: SideHere,
    place: int,
    members: int,
    naming: Naming,
    strict: bool,
    exact: bool,
    differing: Mapping[str, str],
) -> Matching:
    """Pair the Parameters of this rank's target with what the source has.

    Args:
        catalog, named: the source, and the same under its names in the target.
        place, members: this rank's place among the ranks of the target, and how many they are.
        strict: every Parameter must take something, unless `choice_func` leaves it out.
        exact: no names by suffix.
        differing: names of the source that ranks hold with different contents -> which ranks, in words.

    Raises:
        CoverageError: strict, and the source has nothing for a Parameter.
        LayoutMismatchError: shapes or dtypes do not fit, or a Parameter would take what differs by rank.
    """
    offers = _offers(named, side, place, members)
    parameters = side.parameters
    stored = {name: name for name in parameters if name in offers}
    missing = [name for name in parameters if name not in offers]
    if missing and not exact:
        found = suffixes(missing, list(stored), offers, {})
        tell_suffixes(found)
        stored.update(found.found)
        missing = [name for name in missing if name not in stored]
    _refuse_differing(missing, differing, naming)
    if strict:
        _require({**catalog.tensors, **catalog.extras, **differing}, missing, naming)
    matches = []
    for name, source in stored.items():
        match = Match(parameters[name], source, _boxed(offers[source], named, side.boxes.get(name), name))
        check_fit(match, strict=False)
        matches.append(match)
    taken = {match.name for match in matches}
    return Matching(tuple(matches), tuple(missing), tuple(name for name in offers if name not in taken))


def _offers(named: Catalog, side: SideHere, place: int, members: int) -> dict[str, Offer]:
    """What the source has for this rank, by its name in the target; for boxes, all of it whole."""
    offers = offers_to(Taking(named, side.strategy, place, members))
    for name in side.boxes:
        tensor = named.tensors.get(name) or named.extras.get(name)
        if tensor is not None:
            whole = Layout((1,), ((),) * len(tensor.meta.shape))
            region = Region.whole(tensor.meta.shape) if all(tensor.meta.shape) else None
            offers[name] = offer_of(named, Takes(tensor, region, whole, tensor.meta.shape))
    return offers


def _boxed(offer: Offer, named: Catalog, box: Optional[Box], name: str) -> Offer:
    if box is None:
        return offer
    full = offer.full
    if box.global_shape != full:
        raise LayoutMismatchError(
            f"parameter {name!r} has global_shape {list(box.global_shape)} by its Box in the target, and full shape "
            f"{list(full)} in the source"
        )
    return offer._replace(region=box.region, shape=box.shape, doubt="its Box in the target says so")


def _refuse_differing(missing: Iterable[str], differing: Mapping[str, str], naming: Naming) -> None:
    """Raise LayoutMismatchError where a Parameter would take what every rank of the source has of its own."""
    called = {chosen_name(naming.choice, name): name for name in differing}
    for name in missing:
        source = called.get(naming.name_map.get(name, name))
        if source is not None:
            raise differs(source, differing[source], f"parameter {name!r} of the target")


def differs(name: str, told: str, who: str) -> LayoutMismatchError:
    """The error where `who` wants a name of which ranks of the source have different contents."""
    return LayoutMismatchError(
        f"{who} would take {name!r}, which no layout of the source lists, and the ranks that hold it have different "
        f"contents ({told}), so it is no copy of one value: give its layout (source_strategy=[…, {{name: layout}}], or "
        "a Box), or leave it out by choice_func"
    )


def _lacking(held: Iterable[str], missing: Sequence[str], naming: Naming) -> list[str]:
    """Of the Parameters that take nothing, those that nobody left out. `held`: names in the source."""
    left = {name for name in held if chosen_name(naming.choice, name) is None}
    return [name for name in missing if name not in left]


def _require(held: Iterable[str], missing: Sequence[str], naming: Naming) -> None:
    """Raise CoverageError for Parameters that take nothing though nobody left them out."""
    lacking = _lacking(held, missing, naming)
    if lacking:
        raise CoverageError(
            f"the source has nothing for {len(lacking)} parameters of the target: {some(lacking)}; give name_map where "
            "they go by other names, leave them out by choice_func, or strict=False to keep their values"
        )


def tell_missing(held: Iterable[str], found: Matching, naming: Naming) -> None:
    """Log which Parameters keep their values though nobody left them out."""
    lacking = _lacking(held, found.missing, naming)
    if lacking:
        log.warning(
            "%d parameters of the target are not in the source and keep their values: %s", len(lacking), lacking
        )


def tell_casts(matches: tuple[Match, ...]) -> None:
    """Log, once, which Parameters are cast on the way."""
    kinds: dict[tuple[str, str], list[Any]] = {}
    for match in matches:
        if match.parameter.dtype != match.offer.dtype:
            kinds.setdefault((str(match.offer.dtype), str(match.parameter.dtype)), []).append(match.parameter.name)
    for (source, target), names in kinds.items():
        log.warning("%d parameters are cast from %s to %s: %s", len(names), source, target, some(names))
