"""The newest complete checkpoint of a directory into the networks of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import check_cell, is_parallel, match_parameters, offers_of
from ms_ckpt_ext.bridge.request import Filled, LoadRequest
from ms_ckpt_ext.bridge.together import fill_from, meeting
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.engine.load.taking import Taking
from ms_ckpt_ext.engine.resume.newest import Chosen, ResumeRequest, Skipped, choose_checkpoint
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import alike
from ms_ckpt_ext.errors import CheckpointError, CoverageError, UsageError
from ms_ckpt_ext.transport.base import Transport

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.resume.scalars import Value

__all__ = ["Resumed", "both", "fill_chosen", "fill_newest", "layouts_of", "with_lacks"]


class Resumed(NamedTuple):
    """A checkpoint that was chosen, and what was loaded from it."""

    chosen: Chosen
    filled: Filled


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


def _lacks(request: LoadRequest, stored: Catalog) -> str:
    """What the network wants and no file of the checkpoint holds, in words; "" if nothing."""
    if not stored.absent:
        return ""
    try:
        named = request.named(stored, _uncompared)
        offers = offers_of(named, request.target, request.rank)
        match_parameters(request.network, named, offers, request.manner.exact)
    except CoverageError as error:
        return str(error)
    except CheckpointError:
        return ""  # an error of the call, not of the files: the load will report it
    return ""


def _uncompared(catalog: Catalog, _names: Iterable[str]) -> Catalog:
    """What several files hold outside the strategy as if it were alike: all that matters is whether it is there."""
    copies = {name: alike(held, catalog.files) for name, held in catalog.unproven.items()}
    return catalog._replace(extras={**catalog.extras, **copies}, unproven={})


def _own_scalars(chosen: Chosen, rank: int, stands: bool) -> dict[str, Value]:
    """Of the scalars that differ between ranks, those of this rank, if it `stands` where it stood at the save."""
    found = {name: values[rank] for name, values in chosen.own.items() if stands and rank in values}
    lost = sorted(chosen.own.keys() - found.keys())
    if lost:
        why = "this rank saved none" if stands else "the ranks of this job are not those of the one that saved"
        log.warning("scalars that differ by rank are not among those restored, for %s: %s", why, lost)
    return found


def fill_newest(request: LoadRequest, wanted: ResumeRequest) -> tuple[Optional[Resumed], tuple[Skipped, ...]]:
    """Choose and load, together; see `engine.resume.newest` and `together.fill_from`.

    Returns:
        What was loaded, None when there is no complete checkpoint; and the checkpoints that were skipped.
    """
    with meeting(request.options.timeout) as transport:
        chosen, skipped = choose_checkpoint(transport, with_lacks(wanted, request))
        return None if chosen is None else fill_chosen(transport, request, chosen), skipped


def with_lacks(wanted: ResumeRequest, request: LoadRequest) -> ResumeRequest:
    """What is looked for, passing over checkpoints that lack what the network wants."""
    return replace(wanted, lacks=partial(_lacks, request))


def fill_chosen(transport: Transport[Any], request: LoadRequest, chosen: Chosen) -> Resumed:
    """Load a checkpoint that all ranks chose. Raises as `together.fill_from`."""
    if chosen.own:
        named = chosen.catalog.called(request.naming)
        stands = Taking(named, request.target, request.rank, transport.size).stands
        chosen = replace(chosen, scalars={**chosen.scalars, **_own_scalars(chosen, request.rank, stands)})
    return Resumed(chosen, fill_from(transport, request, chosen.seen, chosen.catalog))
