"""Parameters as memory on the CPU, where a Parameter's host memory is its only memory.

Bytes written to `Parameter.asnumpy()` are in the Parameter, which is checked each time. Where they would not be
(not yet initialised or sliced, packed types), a buffer takes the bytes and becomes the Parameter's data afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np
from mindspore import mint
from mindspore._c_expression import TensorPy
from mindspore.common import np_dtype

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Match, Offer, nbytes_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import copy_box
from ms_ckpt_ext.engine.copying.strides import copy_strided
from ms_ckpt_ext.engine.load.slabs import HostSink
from ms_ckpt_ext.transport.base import Bytes

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.load.replicas import SliceBytes

_COPY = 4 << 20
"""Bytes that are copied from a device at once."""
_NUMPY: Mapping[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": np_dtype.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "C128": np.complex128,
}


def on_device() -> bool:
    """Whether Parameters belong in a device's memory."""
    return bool(ms.context.get_context("device_target") != "CPU")


def stays_on_host(parameter: Any) -> bool:
    """Whether a Parameter was made to live in host memory (`device="CPU"` or "Remote"), whatever the target."""
    return not on_device() or parameter._get_user_data("parameter_device") is not None


def kept_on_host(parameters: Sequence[Any]) -> frozenset[int]:
    """Ids of the Parameters that stay in host memory: those made so, and those that were offloaded.

    MindSpore does not distinguish an offloaded Parameter from a fresh one, which has not been on the device yet. Where
    some matrix of the network is on the device, what is not has been offloaded; else all are fresh (numbers of an
    optimizer may be there before anything has run).
    """
    if not on_device():
        return frozenset(map(id, parameters))
    used = any(len(parameter.shape) > 1 and not _on_host(parameter) for parameter in parameters)
    return frozenset(
        id(parameter)
        for parameter in parameters
        if stays_on_host(parameter) or (used and not parameter.has_init and _on_host(parameter))
    )


def bytes_to_come(parameters: Sequence[Any]) -> int:
    """Bytes of device memory that Parameters will take when they are filled, beyond what they have there."""
    kept = kept_on_host(parameters)
    lacking = (p for p in parameters if id(p) not in kept and (_on_host(p) or _is_meta(p)))
    return sum(math.prod(parameter.shape) * int(parameter.itemsize) for parameter in lacking)


def _on_host(parameter: Any) -> bool:
    return str(getattr(parameter, "device", "CPU")) == "CPU"


def in_device_memory(parameter: Any) -> bool:
    """Whether a Parameter has memory on the device now, which a load would fill."""
    return not (parameter.has_init or _is_meta(parameter) or _on_host(parameter))


def _is_meta(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_meta", False))  # versions before 2.10 have none


def give_device_memory(parameter: Any, shape: Shape) -> None:
    """Make sure that a Parameter has memory on the device, for a slice of `shape`. What it held is not copied."""
    if parameter.has_init:
        parameter.init_data()
    other = math.prod(parameter.shape) != math.prod(shape)
    if other or _is_meta(parameter) or _on_host(parameter):
        parameter.set_data(mint.empty(shape if other else parameter.shape, dtype=parameter.dtype), slice_shape=True)


def own_memory(parameter: Any, elements: int, kept: bool = False) -> Optional[Bytes]:
    """The Parameter's memory as flat bytes, where writing to it is writing to the Parameter; None elsewhere.

    `kept`: it stays in host memory though the target is a device.
    """
    if (on_device() and not kept) or parameter.dtype == ms.qint4x2 or _is_meta(parameter):
        return None
    if math.prod(parameter.shape) != elements or not elements:
        return None
    if parameter.has_init:
        parameter.init_data()
    host = parameter.asnumpy()
    if not host.flags.writeable or not host.flags.c_contiguous or host.ctypes.data != parameter.asnumpy().ctypes.data:
        return None
    memory: Bytes = host.reshape(-1).view(np.uint8)
    return memory


def tensor_of(buffer: Bytes, offer: Offer) -> Any:
    """A buffer of a slice's bytes as a MindSpore tensor of the checkpoint's dtype."""
    if offer.dtype == ms.qint4x2:
        return ms.Tensor(buffer.view(np.int8).reshape(offer.shape), dtype=ms.qint4x2)
    numpy = _NUMPY.get(offer.tensor.meta.dtype.name)
    if numpy is not None:
        return ms.Tensor.from_numpy(buffer.view(numpy).reshape(offer.shape))
    # 8-bit floats: numpy lacks them and the CPU cannot view bytes as them, so as in `mindspore.load_checkpoint`.
    return TensorPy.convert_bytes_to_tensor(buffer.tobytes(), tuple(offer.shape), offer.dtype)


def give(match: Match, buffer: Bytes) -> None:
    """Make a buffer the data of its Parameter, in host memory, cast as MindSpore casts."""
    parameter = match.parameter
    tensor = tensor_of(buffer, match.offer)
    if tensor.shape != parameter.shape and len(tensor.shape) > len(parameter.shape):
        tensor = tensor.reshape(parameter.shape)
    if tensor.dtype != parameter.dtype:
        log.warning("parameter %r is cast from %s to %s", parameter.name, tensor.dtype, parameter.dtype)
        tensor = ms.Tensor(tensor.asnumpy(), parameter.dtype)
    parameter.set_data(tensor, bool(parameter.sliced) or tensor.shape != parameter.shape)
    mark_loaded(parameter)


def mark_loaded(parameter: Any) -> None:
    """Tell MindSpore that the Parameter has its data."""
    if hasattr(parameter, "init_param") and not parameter.init_param:
        parameter.init_param = True


def contents_of(parameter: Any, samples: Optional[tuple[int, int]] = None) -> SliceBytes:
    """What a Parameter holds: on the CPU its memory, on a device copies of a few MiB made one after another.

    `samples`: on a device, how many samples, spread from end to end, and bytes of each; None for all of it.
    """
    from ms_ckpt_ext.engine.load.replicas import SliceBytes

    if not on_device() or _on_host(parameter):
        return SliceBytes(str(parameter.dtype), iter((parameter.asnumpy().reshape(-1).view(np.uint8),)))
    return SliceBytes(str(parameter.dtype), _copies(parameter, samples), copied=True)


def _copies(parameter: Any, samples: Optional[tuple[int, int]]) -> Iterator[Bytes]:
    flat = parameter.view(-1)
    size, step = flat.shape[0], _COPY // parameter.itemsize
    starts: Iterable[int] = range(0, size, step)
    if samples is not None and size * parameter.itemsize > samples[0] * samples[1]:
        step = samples[1] // parameter.itemsize
        starts = (number * (size - step) // (samples[0] - 1) for number in range(samples[0]))
    for start in starts:
        piece = mint.narrow(flat, 0, start, min(step, size - start))
        yield piece.asnumpy().view(np.uint8)


def host_bytes(parameter: Any, dtype: Any = None) -> Bytes:
    """What a Parameter holds, in host memory; cast to another MindSpore dtype as a sink casts it, where it lies."""
    if dtype is not None and dtype != parameter.dtype:
        if on_device() and not _on_host(parameter):
            shape = tuple(parameter.shape) or (1,)
            cast = mint.empty(shape, dtype=dtype)
            cast.copy_(parameter.view(*shape))
        else:
            cast = ms.Tensor(parameter.asnumpy(), dtype)
        parameter = cast
    pieces = [*contents_of(parameter).pieces]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class CastSink:
    """Memory of a Parameter of another dtype: every piece is cast as it lands."""

    def __init__(self, memory: Bytes, shape: Shape, source: DType, parameter: Any) -> None:
        self._memory, self._shape, self._source = memory, shape, source
        self._dtype = parameter.dtype
        self._target = BY_MINDSPORE[str(parameter.dtype)]

    def place(
        self, source: Bytes, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]
    ) -> None:
        """Cut, cast, copy."""
        whole = Region((0,) * len(shape), box.shape)
        piece = np.empty(self._source.nbytes(box.size), np.uint8)
        copy = copy_box(shape, box, box.shape, whole, self._source)
        copy_strided(copy._replace(source=copy.source + offset), source, piece)
        values = ms.Tensor(piece.view(_NUMPY[self._source.name]), self._dtype).asnumpy()
        cast = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        copy_strided(copy_box(box.shape, whole, self._shape, region, self._target, view), cast, self._memory)


class ParameterSink:
    """Where one Parameter's slice lands on the CPU; call `finish` when all of it has landed."""

    def __init__(self, match: Match, kept: bool = False, tell: bool = True) -> None:
        offer, parameter = match.offer, match.parameter
        self._match = match
        self._buffer: Optional[Bytes] = None
        source = offer.tensor.meta.dtype
        memory = own_memory(parameter, math.prod(offer.shape), kept)
        if memory is None or (parameter.dtype != offer.dtype and source.name not in _NUMPY):
            self._buffer = np.empty(nbytes_of(offer), np.uint8)
            self._sink: Union[HostSink, CastSink] = HostSink(self._buffer, offer.shape, source)
        elif parameter.dtype == offer.dtype:
            self._sink = HostSink(memory, offer.shape, source)
        else:
            if tell:
                log.warning("parameter %r is cast from %s to %s", parameter.name, offer.dtype, parameter.dtype)
            self._sink = CastSink(memory, offer.shape, source, parameter)

    def place(
        self, source: Bytes, offset: int, shape: Shape, box: Region, region: Region, view: Optional[View]
    ) -> None:
        """See `engine.load.slabs.SliceSink`."""
        self._sink.place(source, offset, shape, box, region, view)

    def finish(self) -> None:
        """Give a buffer to the Parameter, if there was one."""
        if self._buffer is not None:
            give(self._match, self._buffer)
            self._buffer = None
        mark_loaded(self._match.parameter)

    def contents(self) -> SliceBytes:
        """What the Parameter holds, after any cast."""
        return contents_of(self._match.parameter)
