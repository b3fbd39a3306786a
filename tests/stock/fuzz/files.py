"""Checkpoints and strategy files as MindSpore and safetensors have them, written and read without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from tests.stock.fuzz.model import WIDTHS, Array, Cut, Job

_NAMES = {
    "F32": "Float32", "F16": "Float16", "BF16": "BFloat16", "F64": "Float64", "I8": "Int8", "I16": "Int16",
    "I32": "Int32", "I64": "Int64", "U8": "UInt8", "BOOL": "Bool",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write(path: Path, tensors: Mapping[str, Array], metadata: Optional[Mapping[str, str]] = None) -> None:
    """A checkpoint file, of the format that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_ckpt(tensors) if path.suffix == ".ckpt" else _safetensors(tensors, metadata or {"format": "ms"}))


def _safetensors(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, bodies = 0, []
    for name in sorted(tensors, key=lambda name: (-WIDTHS[tensors[name].dtype], name)):
        tensor = tensors[name]
        stop = position + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop]}
        bodies.append(tensor.data)
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *bodies))


def _ckpt(tensors: Mapping[str, Array]) -> bytes:
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    for name, tensor in tensors.items():
        value = message.value.add()
        value.tag = name
        value.tensor.dims.extend(tensor.shape or [0])
        value.tensor.tensor_type = _NAMES[tensor.dtype]
        value.tensor.tensor_content = tensor.data
    return bytes(message.SerializeToString())


def write_by_mindspore(path: Path, tensors: Mapping[str, Array], options: Mapping[str, Any]) -> None:
    """A `.ckpt` file as `save_checkpoint` writes it: encrypted, or with a checksum."""
    import mindspore as ms

    ms.save_checkpoint([{"name": n, "data": as_tensor(a)} for n, a in tensors.items()], str(path), **options)


def as_tensor(array: Array) -> Any:
    """A MindSpore tensor of these bits."""
    import mindspore as ms

    dtype = getattr(ms, _NAMES[array.dtype].lower() if array.dtype != "BOOL" else "bool_")
    tensor = ms.Tensor(np.zeros(array.shape), dtype)
    tensor.asnumpy().view(f"u{WIDTHS[array.dtype]}").reshape(array.shape)[...] = array.bits
    return tensor


def read(path: Path) -> dict[str, Array]:
    """The tensors of a file, in its order. Raises ValueError where it is no checkpoint."""
    return _read_ckpt(path.read_bytes()) if path.suffix == ".ckpt" else _read_safetensors(path.read_bytes())


def _array(dtype: str, shape: Any, data: bytes) -> Array:
    return Array(dtype, np.frombuffer(data, f"u{WIDTHS[dtype]}").reshape(tuple(shape)))


def _read_safetensors(raw: bytes) -> dict[str, Array]:
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: _array(e["dtype"], e["shape"], raw[8 + length :][slice(*e["data_offsets"])]) for name, e in header.items()
    }


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file notes."""
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}


def _read_ckpt(raw: bytes) -> dict[str, Array]:
    from mindspore.train.checkpoint_pb2 import Checkpoint

    message = Checkpoint()
    message.ParseFromString(raw)
    found = {}
    for value in message.value:
        dims = [] if list(value.tensor.dims) == [0] else list(value.tensor.dims)
        found[value.tag] = _array(_DTYPES[value.tensor.tensor_type], dims, value.tensor.tensor_content)
    return found


def write_strategy(path: Path, job: Job, stage: Optional[int] = None, form: str = "ckpt") -> None:
    """The strategy file of one stage, or what `merge_pipeline_strategys` makes of all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = stage is None and job.stages > 1
    items = {
        f"{number}-{name}" if merged else name: cut
        for number in (range(job.stages) if stage is None else [stage])
        for name, cut in job.of_stage(number).items()
    }
    stages = list(range(job.stages)) if stage is None else [stage]
    if form == "json":
        path.write_text(json.dumps(_as_json(items, stages, 1 if merged else 2)))
    else:
        path.write_bytes(_as_message(items, stages, 1 if merged else 2))


def _as_message(items: Mapping[str, Cut], stages: list[int], current: int) -> bytes:
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    message = ParallelStrategyMap(current_stage=current)
    for stage in stages:
        node = message.parallel_strategy_item.add()
        node.node_name = f"Default/MatMul-op{stage}"
        node.parallel_strategys.stage = stage
        node.parallel_strategys.parallel_strategy.add().dim.extend([1, 1])
    for name, cut in items.items():
        item = message.parallel_layout_item.add()
        item.param_name = name
        fill_layouts(item.parallel_layouts, cut)
    return bytes(message.SerializeToString())


def fill_layouts(layouts: Any, cut: Cut) -> None:
    """MindSpore's message of one parameter."""
    layouts.dev_matrix.add().dim.extend(cut.dev_matrix)
    if cut.nested:
        for group in cut.tensor_map:
            layouts.tensor_map.add().dim.extend(group or [-1])
    else:
        layouts.tensor_map.add().dim.extend(flat(cut))
    layouts.param_split_shape.add()
    layouts.indices_offset.add()
    layouts.field = 0
    layouts.opt_weight_shard_step = cut.step
    layouts.opt_weight_shard_size = cut.size


def flat(cut: Cut) -> list[int]:
    """The tensor map where no tensor axis has several device axes."""
    return [group[0] if group else -1 for group in cut.tensor_map]


def _as_json(items: Mapping[str, Cut], stages: list[int], current: int) -> dict[str, Any]:
    nodes = {f"Default/MatMul-op{s}": {"stage": s, "parallel_strategy": [[1, 1]]} for s in stages}
    layouts = {
        name: {
            "dev_matrix": list(cut.dev_matrix),
            "tensor_map": [list(g) or [-1] for g in cut.tensor_map] if cut.nested else flat(cut),
            "param_split_shape": [],
            "indices_offset": [],
            "field": 0,
            "opt_weight_shard_step": cut.step,
            "opt_weight_shard_size": cut.size,
        }
        for name, cut in items.items()
    }
    return {"current_stage": current, "parallel_strategy_item": nodes, "parallel_layout_item": layouts}
