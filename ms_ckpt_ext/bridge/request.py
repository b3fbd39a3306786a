"""What is to be loaded into which network, and the outcome; the same for every way of loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Matches, told_passed
from ms_ckpt_ext.bridge.settle import Manner
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.load.options import LoadOptions, LoadReport
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import LoadError
from ms_ckpt_ext.formats.registry import Access

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Naming
    from ms_ckpt_ext.engine.unlisted.proven import Compare

_SHOWN = 20


class LoadRequest(NamedTuple):
    """What one rank loads into which network, and how.

    Attributes:
        network: the Cell to fill.
        target: layouts of this job; None for one device.
        rank: this rank.
        manner: how Parameters are matched.
        rules: weight rules that make the network's parameters from what the files hold.
        naming: how these are called in the network; None: as they are.
        allow_equal_slices: slices that are all equal are intended, see `engine.unlisted.whole_slices`.
        options: how all ranks load together.
        workers, limits: threads and buffers of a rank that reads its own bytes.
    """

    network: Any
    target: Optional[Strategy]
    rank: int
    manner: Manner
    rules: tuple[Rule, ...] = ()
    naming: Optional[Naming] = None
    allow_equal_slices: bool = False
    options: LoadOptions = LoadOptions()
    workers: int = 1
    limits: Limits = Limits()

    def named(self, stored: Catalog, compare: Optional[Compare] = None) -> Catalog:
        """What is stored, with the rules applied, by its names in the network; `compare` as in `proven.ruled`."""
        if self.rules:
            from ms_ckpt_ext.engine.unlisted.alike import compared
            from ms_ckpt_ext.engine.unlisted.proven import ruled

            stored = ruled(stored, self.rules, compare or compared)
        return stored.called(self.naming)

    def read(self, listing: Listing, strategy: Optional[Strategy], access: Access) -> Catalog:
        """A checkpoint by its names in the network, its headers read by this rank. Raises as `read_slices`."""
        from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices

        return self.named(read_slices(listing, strategy, access, self.allow_equal_slices))


class Filled(NamedTuple):
    """The outcome of a load, on one rank.

    Attributes:
        missing: Parameters that got nothing.
        unused: names in the checkpoint that went nowhere.
        report: what this rank read and received.
    """

    missing: list[str]
    unused: list[str]
    report: LoadReport


def tell_loaded(found: Matches, catalog: Catalog) -> None:
    """Log which Parameters got something from outside the strategy, and which got nothing."""
    outside = sorted(match.parameter.name for match in found.matches if match.name not in catalog.tensors)
    if outside:
        more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
        log.info("loaded as well, from outside the strategy: %s%s", outside[:_SHOWN], more)
    if found.missing:
        log.warning(
            "%d parameters of the network are not in the checkpoint and were not loaded: %s%s",
            len(found.missing),
            found.missing,
            told_passed(found),
        )


def half_done(error: Exception, changed: Sequence[str], what: str = "load", advice: str = "load again") -> LoadError:
    """The error of a load, or another job, that stopped after it began to change Parameters."""
    listed = ", ".join(map(repr, changed[:5])) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return LoadError(
        f"{error}\nThe {what} stopped on the way: {len(changed)} parameters may already hold new bytes "
        f"({listed or 'none'}); {advice} before using the network",
        tuple(changed),
    )
