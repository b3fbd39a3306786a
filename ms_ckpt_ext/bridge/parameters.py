"""Parameters of a checkpoint as MindSpore has them, outside any network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ms_ckpt_ext.bridge.match import Offer, check_cell, offers_of
from ms_ckpt_ext.bridge.memory import tensor_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.engine.lazy import LazyTensor, Parameters
from ms_ckpt_ext.errors import UsageError


def parameter_dict(held: Parameters, names: Iterable[str]) -> dict[str, Any]:
    """name -> `Parameter` of the checkpoint's dtype (bfloat16, float8 and int4 included), or text as `str`.

    All are read together. Raises as `LazyTensor.__getitem__`, and UsageError for a dtype that MindSpore lacks.
    """
    values = {name: held[name] for name in names}
    lazy = {name: value for name, value in values.items() if isinstance(value, LazyTensor)}
    offers = offers_of(held.catalog, None, 0)
    wanted: Mapping[str, Offer] = {name: offers[held.names[name]] for name in lazy}
    for name, offer in wanted.items():
        if offer.dtype is None:
            raise UsageError(
                f"parameter {name!r} is {offer.tensor.meta.dtype.name}, which this MindSpore has no dtype for; "
                "leave it out, or read it as bytes, by load(...)[name][...]"
            )
    buffers = iter(held.read([(offer.tensor, offer.region, offer.shape) for offer in wanted.values()]))
    made = {name: ms.Parameter(tensor_of(next(buffers), offer), name=name) for name, offer in wanted.items()}
    return {name: made.get(name, value) for name, value in values.items()}


def load_into(network: Any, parameters: Mapping[str, Any], strict_load: bool, remove_redundancy: bool) -> None:
    """MindSpore's own `load_param_into_net`."""
    check_cell(network)
    ms.load_param_into_net(network, dict(parameters), strict_load, remove_redundancy)
