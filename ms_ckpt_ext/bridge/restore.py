"""The newest complete checkpoint of a directory into the networks of all ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import check_cell, is_parallel, match_parameters, offers_of
from ms_ckpt_ext.bridge.together import SharedSource, fill_together, give_up, meeting
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.bridge.world import own_rank
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.core.planning.weight_rules import Rule
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.session import LoadReport
from ms_ckpt_ext.engine.resume.newest import Chosen, ResumeRequest, Skipped, choose_checkpoint
from ms_ckpt_ext.engine.resume.scalars import Value
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.outside import alike
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.engine.unlisted.proven import ruled
from ms_ckpt_ext.engine.unlisted.taking import Taking
from ms_ckpt_ext.errors import CheckpointError, CoverageError, UsageError
from ms_ckpt_ext.transport.select import HOST_VARIABLE

__all__ = ["Filled", "both", "fill_newest", "give_up", "host_name", "layouts_of", "own_rank"]


class Filled(NamedTuple):
    """A checkpoint that was chosen and loaded."""

    chosen: Chosen
    missing: list[str]
    unused: list[str]
    report: LoadReport


class _Both(ms.nn.Cell):
    """A network and its optimizer as one cell; names stay as they are."""

    def __init__(self, network: Any, optimizer: Any) -> None:
        super().__init__(auto_prefix=False)
        self.network, self.optimizer = network, optimizer


def both(network: Any, optimizer: Any) -> Any:
    """A cell with the Parameters of both. Raises ArgumentTypeError unless they are Cells."""
    check_cell(network)
    if optimizer is None:
        return network
    check_cell(optimizer)
    return _Both(network, optimizer)


def host_name(options: LoadOptions) -> str:
    """What this host is called among the hosts of the job."""
    return options.host or os.environ.get(HOST_VARIABLE) or socket.gethostname()


def layouts_of(network: Any) -> Optional[Mapping[str, Any]]:
    """The layouts that MindSpore gave a network's Parameters; None where they are whole.

    Raises:
        UsageError: they are not known yet.
    """
    layouts: Mapping[str, Any] = network.parameter_layout_dict
    if not layouts and is_parallel(network):
        raise UsageError(
            "the network runs in parallel and is not compiled yet, so its layouts are not known: call "
            "network.compile(*inputs) or Model.build / infer_train_layout first, or give predict_strategy"
        )
    return layouts or None


def _lacks(
    network: Any,
    target: Optional[Strategy],
    rank: int,
    naming: Naming,
    rules: tuple[Rule, ...],
    strict: bool,
    catalog: Catalog,
) -> str:
    """What the network wants of the checkpoint and no file holds; "" if nothing. What nobody wants may be absent."""
    if not catalog.absent:
        return ""
    try:
        named = naming.of(ruled(catalog, rules, _uncompared))
        match_parameters(network, named, offers_of(named, target, rank), strict)
    except CoverageError as error:
        return str(error)
    except CheckpointError:
        return ""  # of the call, not of the files: the load will say it
    return ""


def _uncompared(catalog: Catalog, _names: Iterable[str]) -> Catalog:
    """What several files hold outside the strategy as if it were alike: whether it is there is all that is asked."""
    copies = {name: alike(held, catalog.files) for name, held in catalog.unproven.items()}
    return catalog._replace(extras={**catalog.extras, **copies}, unproven={})


def _own_scalars(chosen: Chosen, rank: int, stands: bool) -> dict[str, Value]:
    """Of the scalars that differ between ranks those of a rank that stands where it stood."""
    found = {name: values[rank] for name, values in chosen.own.items() if stands and rank in values}
    lost = sorted(chosen.own.keys() - found.keys())
    if lost:
        why = "this rank saved none" if stands else "the ranks of this job are not those of the one that saved"
        log.warning("scalars that differ by rank are not among those restored, for %s: %s", why, lost)
    return found


def fill_newest(
    network: Any,
    wanted: ResumeRequest,
    target: Optional[Strategy],
    rank: int,
    naming: Naming,
    rules: tuple[Rule, ...],
    strict: bool,
    allow_missing: bool,
    options: LoadOptions,
    workers: int,
    limits: Limits,
    allow_equal_slices: bool = False,
) -> tuple[Optional[Filled], tuple[Skipped, ...]]:
    """Choose and load, together; see `engine.resume.newest` and `together.fill_together`.

    Returns:
        What was loaded, None when there is no complete checkpoint; and those that were skipped.
    """
    wanted = replace(wanted, lacks=partial(_lacks, network, target, rank, naming, rules, strict))
    with meeting(options.timeout) as transport:
        chosen, skipped = choose_checkpoint(transport, wanted)
        if chosen is None:
            return None, skipped
        if chosen.own:
            stands = Taking(naming.of(chosen.catalog), target, rank, transport.size).stands
            chosen = replace(chosen, scalars={**chosen.scalars, **_own_scalars(chosen, rank, stands)})
        reports: list[LoadReport] = []
        listing = chosen.listing
        source = SharedSource(
            lambda: listing, chosen.strategy, wanted.access, rules, naming, allow_equal_slices=allow_equal_slices
        )
        missing, unused = fill_together(
            network,
            source,
            target,
            rank,
            strict,
            options,
            workers,
            limits,
            observe=reports.append,
            require_all=not allow_missing,
            transport=transport,
        )
    return Filled(chosen, missing, unused, reports[0]), skipped
