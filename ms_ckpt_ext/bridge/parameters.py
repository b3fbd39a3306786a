"""Parameters of a checkpoint as MindSpore has them, outside any network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.match import Offer, castable, check_cell, offers_of, sort_parameters, tell_suffixes
from ms_ckpt_ext.bridge.memory import tensor_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.planning.suffixes import match_suffixes
from ms_ckpt_ext.engine.source.lazy import LazyTensor, Parameters
from ms_ckpt_ext.errors import UsageError


def parameter_dict(held: Parameters, names: Iterable[str]) -> dict[str, Any]:
    """name -> `Parameter` of the checkpoint's dtype (bfloat16, float8 and int4 included), or text as `str`.

    All are read together. Raises as `LazyTensor.__getitem__`, and UsageError for a dtype that MindSpore lacks.
    """
    values = {name: held[name] for name in names}
    lazy = {name: value for name, value in values.items() if isinstance(value, LazyTensor)}
    held.prove(held.names[name] for name in lazy)
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


def load_into(
    network: Any,
    parameters: Mapping[str, Any],
    stored: Mapping[str, str],
    strict_load: bool,
    remove_redundancy: bool,
) -> None:
    """MindSpore's own `load_param_into_net`, except for the names that it would match by order.

    Args:
        stored: name of a parameter -> its name in the file.

    Raises LayoutMismatchError where a suffix has several readings; nothing was changed.
    """
    check_cell(network)
    given = dict(parameters)
    if not strict_load:
        given = _settled(network, given, stored)
    # Strict here, as suffixes and casts, where they are allowed, are settled above.
    ms.load_param_into_net(network, given, True, remove_redundancy)


def _settled(network: Any, parameters: Mapping[str, Any], stored: Mapping[str, str]) -> dict[str, Any]:
    """The parameters under their names in the network, in its dtypes as far as MindSpore casts."""
    named, missing = sort_parameters(network, parameters)
    names = [parameter.name for parameter in named]
    mapped = [name for name in names if stored[name] != name]
    found = match_suffixes([parameter.name for parameter in missing], names, stored, mapped)
    tell_suffixes(found)
    given = {**parameters, **{name: parameters[source] for name, source in found.found.items()}}
    for parameter in (*named, *missing):
        if parameter.name in given:
            given[parameter.name] = _cast(given[parameter.name], parameter)
    return given


def _cast(value: Any, parameter: Any) -> Any:
    if not isinstance(value, ms.Parameter) or value.dtype == parameter.dtype or not castable(value, parameter):
        return value
    log.warning("parameter %r is cast from %s to %s", parameter.name, value.dtype, parameter.dtype)
    return ms.Parameter(ms.Tensor(value.asnumpy(), parameter.dtype), name=parameter.name)
