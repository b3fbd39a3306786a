"""A checkpoint into a Cell: each rank reads the bytes of its own slices, into the memory of its own Parameters.

1. Match: which Parameter takes which box of which source parameter; shapes and dtypes are checked for all of them
   before the first byte is read.
2. Read: on the CPU a Parameter's host memory is its only memory, so bytes of the right dtype are read straight into
   it. Anything else is read into a buffer of the source's dtype.
3. Set: buffers become tensors, are cast as MindSpore casts, and are given to their Parameters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
from mindspore.common.np_dtype import bfloat16

from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.bridge.world import own_rank
from ms_ckpt_ext.core.dtype import DType
from ms_ckpt_ext.core.plan import SourceTensor
from ms_ckpt_ext.core.reads import Extent, Landing, Limits, Target, Task, schedule
from ms_ckpt_ext.core.region import Region
from ms_ckpt_ext.core.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.engine import pump
from ms_ckpt_ext.engine.catalog import INT4, Catalog
from ms_ckpt_ext.engine.jobs import rank_boxes
from ms_ckpt_ext.errors import ArgumentTypeError, CheckpointError, LayoutMismatchError, LoadError, UsageError
from ms_ckpt_ext.formats.registry import open_reader
from ms_ckpt_ext.storage.pool import ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink

__all__ = ["fill", "own_rank", "parameter_dict"]
log = logging.getLogger("ms_ckpt_ext")

_NUMPY: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "C128": np.complex128,
}
_FAMILIES = (
    {ms.float16, ms.float32, ms.float64, ms.bfloat16},
    {ms.int8, ms.int16, ms.int32, ms.int64, ms.qint4x2},
)
"""MindSpore casts within a family on load (`load_param_into_net`), never between them."""


class _Offer(NamedTuple):
    """What the checkpoint has for one name on this rank."""

    tensor: SourceTensor
    region: Optional[Region]
    shape: tuple[int, ...]
    dtype: Any
    """MindSpore dtype, packed int4 included."""


class _Match(NamedTuple):
    """A Parameter and what goes into it."""

    parameter: Any
    name: str
    offer: _Offer


def fill(
    network: Any,
    catalog: Catalog,
    strategy: Optional[Strategy],
    rank: int,
    name_map: Mapping[str, str],
    strict: bool,
    workers: int,
    limits: Limits,
) -> tuple[list[str], list[str]]:
    """Fill the Parameters of `network` with this rank's slices.

    Returns:
        (Parameters that got nothing, checkpoint names that went nowhere), as `load_param_into_net` gives them.

    Raises:
        LayoutMismatchError: shapes or dtypes do not fit; nothing was changed.
        LoadError: reading failed on the way; `changed` names the Parameters that may hold new bytes.
    """
    _check_cell(network)
    offers = _offers(catalog, strategy, rank, name_map)
    matches, missing, unused = _match(network, offers, strict)
    for match in matches:
        _check_fit(match, strict)
    _fill_matches(matches, catalog, workers, limits)
    if missing:
        log.warning("%d parameters of the network are not in the checkpoint and were not loaded: %s", len(missing), missing)
    return missing, unused


def parameter_dict(
    network: Any,
    catalog: Catalog,
    strategy: Optional[Strategy],
    rank: int,
    name_map: Mapping[str, str],
    workers: int,
    limits: Limits,
) -> dict[str, Any]:
    """This rank's slices of everything the checkpoint has, as `{name: Parameter}`; the network is left alone."""
    _check_cell(network)
    offers = _offers(catalog, strategy, rank, name_map)
    buffers = {name: np.empty(_nbytes(offer), np.uint8) for name, offer in offers.items()}
    _read([(offer, buffers[name]) for name, offer in offers.items()], catalog, workers, limits)
    return {name: ms.Parameter(_tensor(buffers[name], offer), name=name) for name, offer in offers.items()}


def _check_cell(network: Any) -> None:
    if not isinstance(network, ms.nn.Cell):
        raise ArgumentTypeError(f"network must be a mindspore.nn.Cell or None, got {type(network).__name__}")


def _offers(
    catalog: Catalog, strategy: Optional[Strategy], rank: int, name_map: Mapping[str, str]
) -> dict[str, _Offer]:
    offers = {}
    for name, tensor, region in rank_boxes(catalog, strategy, rank, name_map):
        offers[name] = _offer(catalog, tensor, region)
    for name, tensor in catalog.extras.items():
        whole = Region.whole(tensor.meta.shape) if all(tensor.meta.shape) else None
        offers.setdefault(name, _offer(catalog, tensor, whole))
    return offers


def _offer(catalog: Catalog, tensor: SourceTensor, region: Optional[Region]) -> _Offer:
    packed = catalog.notes.get(tensor.stored_name) == INT4
    dtype = ms.qint4x2 if packed else _mindspore_dtype(tensor.meta.dtype)
    return _Offer(tensor, region, region.shape if region else tensor.meta.shape, dtype)


def _mindspore_dtype(dtype: DType) -> Any:
    name = {"Bool": "bool_", "BFloat16": "bfloat16"}.get(dtype.mindspore, dtype.mindspore.lower())
    return getattr(ms, name, None)


def _nbytes(offer: _Offer) -> int:
    return offer.tensor.meta.dtype.nbytes(math.prod(offer.shape))


def _match(network: Any, offers: Mapping[str, _Offer], strict: bool) -> tuple[list[_Match], list[str], list[str]]:
    """Pair Parameters with offers, by name, then (unless strict) by a common prefix as MindSpore does."""
    matches, missing = [], []
    unused = dict.fromkeys(offers)
    waiting: dict[str, Any] = {}
    parallel = _is_parallel(network)
    for _, parameter in network.parameters_and_names():
        name = parameter.name
        if parameter.param_info.is_pipeline_shared_param:
            continue
        if name in offers:
            if isinstance(parameter, ms.common.parameter.MapParameter if hasattr(ms.common.parameter, "MapParameter") else ()):
                raise UsageError(f"parameter {name!r} is a MapParameter, which cannot be resharded; load it with MindSpore")
            matches.append(_Match(parameter, name, offers[name]))
            unused.pop(name, None)
        elif not name.startswith(ACCUMULATED_GRADIENT_PREFIX) and not (parallel and not parameter.sliced):
            missing.append(name)
            waiting[name] = parameter
    if missing and not strict:
        for match in _match_by_prefix(missing, waiting, offers):
            matches.append(match)
            missing.remove(match.parameter.name)
    return matches, missing, list(unused)


def _is_parallel(network: Any) -> bool:
    mode = ms.context.get_auto_parallel_context("parallel_mode")
    return mode in ("semi_auto_parallel", "auto_parallel") or type(network).__name__ == "AutoParallel"


def _match_by_prefix(missing: Sequence[str], waiting: Mapping[str, Any], offers: Mapping[str, _Offer]) -> list[_Match]:
    """MindSpore's second chance: a checkpoint saved from a wrapper has every name behind one common prefix."""
    left, found = list(missing), []
    while left:
        prefixes = (offer[: -len(name)] for name in left for offer in offers if offer.endswith(name) and offer != name)
        prefix = next(prefixes, None)
        hits = [] if prefix is None else [name for name in left if prefix + name in offers]
        if not hits:
            return found
        for name in hits:
            log.warning("parameter %r is loaded from %r of the checkpoint, matched by suffix", name, f"{prefix}{name}")
            found.append(_Match(waiting[name], f"{prefix}{name}", offers[f"{prefix}{name}"]))
            left.remove(name)
    return found


def _check_fit(match: _Match, strict: bool) -> None:
    parameter, offer = match.parameter, match.offer
    shape = tuple(parameter.shape)
    trimmed = offer.shape[: len(shape)] if set(offer.shape[len(shape) :]) <= {1} else offer.shape
    if shape != trimmed and not _takes_slice(match):
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} has shape {list(shape)} in the network, but this rank's slice of it in the "
            f"checkpoint is {list(offer.shape)} (full shape {list(offer.tensor.meta.shape)}); "
            "check predict_strategy, and compile the network before loading if it is parallel"
        )
    if offer.dtype is None:
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} is {offer.tensor.meta.dtype.name} in the checkpoint, which MindSpore has no "
            "dtype for; convert the checkpoint first"
        )
    if parameter.dtype != offer.dtype and (
        strict or not any({parameter.dtype, offer.dtype} <= family for family in _FAMILIES)
    ):
        raise LayoutMismatchError(
            f"parameter {parameter.name!r} is {parameter.dtype} in the network and {offer.dtype} in the checkpoint; "
            + ("strict_load forbids a cast" if strict else "MindSpore casts within floats and within ints only")
        )


def _takes_slice(match: _Match) -> bool:
    """A Parameter that still has its full shape and is not sliced yet takes the slice and its shape."""
    return not match.parameter.sliced and tuple(match.parameter.shape) == match.offer.tensor.meta.shape


def _fill_matches(matches: Sequence[_Match], catalog: Catalog, workers: int, limits: Limits) -> None:
    in_place, staged = [], []
    for match in matches:
        memory = _own_memory(match)
        (in_place if memory is not None else staged).append((match, memory))
    try:
        _read([(match.offer, memory) for match, memory in in_place], catalog, workers, limits)
    except CheckpointError as error:
        raise _half_done(error, [match.parameter.name for match, _ in in_place]) from error
    _mark([match for match, _ in in_place])
    done = [match.parameter.name for match, _ in in_place]
    for group in _groups([match for match, _ in staged], limits):
        buffers = [np.empty(_nbytes(match.offer), np.uint8) for match in group]
        try:
            _read([(match.offer, buffer) for match, buffer in zip(group, buffers)], catalog, workers, limits)
        except CheckpointError as error:
            raise _half_done(error, done) from error
        for match, buffer in zip(group, buffers):
            _set(match, buffer)
        done += [match.parameter.name for match in group]


def _groups(matches: Sequence[_Match], limits: Limits) -> list[list[_Match]]:
    """Parameters whose buffers exist at the same time: together a few tiles, or one that is larger."""
    groups: list[list[_Match]] = []
    held = 0
    for match in matches:
        nbytes = _nbytes(match.offer)
        if not groups or held + nbytes > 4 * limits.tile:
            groups.append([])
            held = 0
        groups[-1].append(match)
        held += nbytes
    return groups


def _half_done(error: CheckpointError, changed: list[str]) -> LoadError:
    listed = ", ".join(map(repr, changed[:5])) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
    return LoadError(
        f"{error}\nThe load stopped on the way: {len(changed)} parameters may already hold new bytes ({listed or 'none'}); "
        "load again before using the network",
        tuple(changed),
    )


def _own_memory(match: _Match) -> Optional[np.ndarray]:
    """The Parameter's memory as flat bytes, where writing to it is writing to the Parameter."""
    parameter, offer = match.parameter, match.offer
    if ms.context.get_context("device_target") != "CPU" or parameter.dtype != offer.dtype or offer.dtype == ms.qint4x2:
        return None
    if math.prod(parameter.shape) != math.prod(offer.shape):
        return None
    if parameter.has_init:
        parameter.init_data()
    host = parameter.asnumpy()
    if not host.flags.writeable or not host.flags.c_contiguous or host.ctypes.data != parameter.asnumpy().ctypes.data:
        return None
    return host.reshape(-1).view(np.uint8)


def _read(wanted: Sequence[tuple[_Offer, Any]], catalog: Catalog, workers: int, limits: Limits) -> None:
    sinks = [MemorySink(array) for _, array in wanted]
    tasks = [
        Task(offer.tensor, (Target(offer.region, (Landing(number, (Extent(0, sinks[number].array.size),)),)),))
        for number, (offer, _) in enumerate(wanted)
        if offer.region is not None
    ]
    with ReaderPool(catalog.files, open_reader) as readers:
        pump.run(schedule(tasks, catalog.stored, limits), readers, sinks, workers, lambda *_: None)


def _tensor(buffer: np.ndarray, offer: _Offer) -> Any:
    if offer.dtype == ms.qint4x2:
        return ms.Tensor(buffer.view(np.int8).reshape(offer.shape), dtype=ms.qint4x2)
    numpy = _NUMPY.get(offer.tensor.meta.dtype.name)
    if numpy is not None:
        return ms.Tensor.from_numpy(buffer.view(numpy).reshape(offer.shape))
    return ms.Tensor.from_numpy(buffer.reshape(offer.shape)).view(offer.dtype)  # 8-bit floats, which numpy lacks


def _set(match: _Match, buffer: np.ndarray) -> None:
    parameter, offer = match.parameter, match.offer
    tensor = _tensor(buffer, offer)
    if tensor.shape != parameter.shape and len(tensor.shape) > len(parameter.shape):
        tensor = tensor.reshape(parameter.shape)
    if tensor.dtype != parameter.dtype:
        log.warning("parameter %r is cast from %s to %s", parameter.name, tensor.dtype, parameter.dtype)
        tensor = ms.Tensor(tensor.asnumpy(), parameter.dtype)
    parameter.set_data(tensor, bool(parameter.sliced) or tensor.shape != parameter.shape)
    _mark([match])


def _mark(matches: Sequence[_Match]) -> None:
    for match in matches:
        if hasattr(match.parameter, "init_param") and not match.parameter.init_param:
            match.parameter.init_param = True
