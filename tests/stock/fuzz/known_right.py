"""Both are right."""

from __future__ import annotations

import numpy as np

from tests.stock.fuzz.cases import Case
from tests.stock.fuzz.found import Found
from tests.stock.fuzz.model import Array


def _wrapped(found: Found) -> bool:
    """Names that were loaded by their ends: stock lists them among those that went nowhere."""
    if not found.kind("value") or "wrapped" not in found.case.tags:
        return False
    return found.stock.value[0] == found.ours.value[0] and set(found.ours.value[1]) < set(found.stock.value[1])


def _went_nowhere(found: Found) -> bool:
    """The answer of a load: what the strategy does not list is loaded, or told; stock does neither."""
    if not found.kind("value") or not isinstance(found.stock.value, tuple) or not isinstance(found.ours.value, tuple):
        return False
    (lacking, unused), (mine, left) = found.stock.value, found.ours.value
    return set(mine) <= set(lacking) and set(lacking) - set(mine) | set(left) ^ set(unused) <= found.unlisted


def _note_of_redundancy(found: Found) -> bool:
    return (
        found.kind("raw")
        and found.case.function == "unified_safetensors"
        and b'"remove_redundancy"' in found.stock.files[found.difference.where[0]]
    )


def _order_of_stages(found: Found) -> bool:
    """The same operators and parameters, in another order."""
    if found.case.function != "merge_pipeline_strategys" or not found.kind("raw"):
        return False
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    held = []
    for outcome in (found.stock, found.ours):
        message = ParallelStrategyMap()
        message.ParseFromString(outcome.files[found.difference.where[0]])
        items = (*message.parallel_strategy_item, *message.parallel_layout_item)
        held.append((message.current_stage, sorted(item.SerializeToString() for item in items)))
    return held[0] == held[1]


def _prefixes(found: Found) -> bool:
    named = found.case.named
    return (
        found.case.function == "load_checkpoint"
        and named.get("format") == "safetensors"
        and bool({"specify_prefix", "filter_prefix"} & named.keys())
    )


def _names_of_parameters(found: Found) -> bool:
    return found.kind("parameter names")


def _shorter_list(found: Found) -> bool:
    """Ranks that suffice, and are no more than stock's: of replicas, any will do."""
    if not found.case.function.startswith("rank_list_for_") or not found.kind("value"):
        return False
    return len(found.ours.value) <= len(found.stock.value) and _suffices(found.case, found.ours.value)


def _suffices(case: Case, ranks: list[int]) -> bool:
    """Whether the files of these ranks hold every element that the rank of the target wants."""
    source, target, rank = case.model.source, case.model.target, case.arguments[0]
    for name, whole in case.model.parameters.items():
        numbered = Array("I64", np.arange(whole.bits.size, dtype=np.uint64).reshape(whole.shape))
        wanted = numbered if target is None else target.slice(name, rank, numbered)
        slices = [source.slice(name, each, numbered) for each in ranks]
        there = {int(n) for each in slices if each is not None for n in each.bits.flat}
        if wanted is not None and name in source.cuts and not {int(n) for n in wanted.bits.flat} <= there:
            return False
    return True


def _whole_elsewhere(found: Found) -> bool:
    """Which ranks get what is whole and not listed by the target, where there are pipeline stages."""
    return found.kind("names") and found.difference.right == "either"


def _arbitrary_order(found: Found) -> bool:
    """Stock keeps names of safetensors in sets, and stages in processes: their order changes from run to run."""
    return found.kind("order") and "from safetensors" in found.case.tags


RULES = {
    "names loaded by their ends": _wrapped,
    "names that went nowhere": _went_nowhere,
    "the note remove_redundancy": _note_of_redundancy,
    "the order of stages": _order_of_stages,
    "prefixes of safetensors": _prefixes,
    "names of Parameters": _names_of_parameters,
    "shorter lists of ranks": _shorter_list,
    "whole parameters that the target does not list": _whole_elsewhere,
    "the order of safetensors in .ckpt": _arbitrary_order,
}
