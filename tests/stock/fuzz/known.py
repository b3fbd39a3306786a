"""Differences that are meant. Each rule is a row of docs/differences.md, which tells who is right, and why.

A rule says as narrowly as it can which differences are its own; what no rule takes is a finding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Callable, NamedTuple, Optional

from tests.stock.fuzz.cases import Case
from tests.stock.fuzz.compare import Difference
from tests.stock.fuzz.model import Cut, Job
from tests.stock.fuzz.sides import Outcome


class Found(NamedTuple):
    """A difference with all that is known about it."""

    difference: Difference
    case: Case
    stock: Outcome
    ours: Outcome

    def kind(self, *kinds: str) -> bool:
        return self.difference.kind in kinds

    @property
    def ours_is_right(self) -> bool:
        """By the truth; of a mistake there is none, and the rule alone decides."""
        right = self.difference.right
        return right == "ours" or (right == "unknown" and "mistake" in self.case.tags)

    @property
    def name(self) -> str:
        """The parameter, where it is about one."""
        return self.difference.where[-1] if len(self.difference.where) > 1 else ""

    def stock_says(self, *texts: str) -> bool:
        return self.kind("served", "error type") and any(text in str(self.stock.error) for text in texts)

    @property
    def jobs(self) -> list[Job]:
        return [job for job in (self.case.model.source, self.case.model.target) if job is not None]

    @property
    def cuts(self) -> list[Cut]:
        """How the parameter is cut, on either side."""
        name = self.name.replace("model.", "")
        return [cut for job in self.jobs for cut in job.cuts.get(name, {}).values()]


def _device_counts(found: Found) -> bool:
    return found.stock_says("Cannot transform device_num from") or (
        found.kind("silent") and "Cannot transform device_num from" in found.difference.told
    )


def _dash(found: Found) -> bool:
    return found.stock_says("invalid literal for int()", "too many values to unpack") and any(
        "-" in name for name in found.case.model.parameters
    )


def _json_strategy(found: Found) -> bool:
    given = [*found.case.arguments, *found.case.named.values()]
    return (
        found.kind("served", "error type")
        and any(str(getattr(value, "path", "")).endswith(".json") for value in given)
        and type(found.stock.error).__name__ in ("TypeError", "DecodeError", "KeyError", "IndexError")
    )


def _nothing_in_a_strategy(found: Found) -> bool:
    return found.stock_says("None of the parameters in checkpoint file are in either")


def _nothing_written(found: Found) -> bool:
    """Stock answers with no error and leaves files unwritten."""
    return found.kind("files") and found.ours_is_right and "only ours" in found.difference.told


def _silent(found: Found) -> bool:
    return found.kind("silent")


def _accident(found: Found) -> bool:
    """An error in stock that says nothing about the input: an index, a key, a C++ assertion."""
    error = found.stock.error
    return found.kind("served") and (
        isinstance(error, (IndexError, KeyError, UnboundLocalError)) or "C++ Call Stack" in str(error)
    )


def _optimizer_shard(found: Found) -> bool:
    return found.kind("bytes") and found.ours_is_right and any(cut.shards > 1 for cut in found.cuts)


def _tied(found: Found) -> bool:
    tied = any(len(job.cuts.get(found.name.replace("model.", ""), {})) > 1 for job in found.jobs)
    return found.kind("bytes", "shape", "names") and found.ours_is_right and tied


def _total_size(found: Found) -> bool:
    if not found.kind("map"):
        return False
    one, two = (json.loads(outcome.files[found.difference.where[0]]) for outcome in (found.stock, found.ours))
    return "total_size" in two.get("metadata", {}) and one.get("weight_map") == two["weight_map"]


def _left_out(found: Found) -> bool:
    """What a choice function leaves out, stock still writes to hyper_param.safetensors: rank 0's slice."""
    choice = found.case.named.get("choice_func")
    return (
        found.case.function == "unified_safetensors"
        and found.kind("names", "files")
        and found.ours_is_right
        and "only stock" in found.difference.told
        and choice is not None
        and (found.kind("files") or choice(found.name) is False)
    )


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


def _gradients(found: Found) -> bool:
    return found.name.startswith("accu_grads") or (found.kind("served") and "accu_grads" in str(found.stock.error))


def _prefixes(found: Found) -> bool:
    named = found.case.named
    return (
        found.case.function == "load_checkpoint"
        and named.get("format") == "safetensors"
        and bool({"specify_prefix", "filter_prefix"} & named.keys())
    )


def _lone_axis(found: Found) -> bool:
    """A parameter of one axis under several device axes."""
    lone = any(
        len(cut.tensor_map) == 1 and cut.nested
        for job in found.jobs for stages in job.cuts.values() for cut in stages.values()
    )  # fmt: skip
    return lone and found.stock_says("the tensor map dimensions must match", "not supported between instances")


def _nested_ckpt(found: Found) -> bool:
    """Several device axes on a tensor axis, in loads of `.ckpt` files."""
    return found.stock_says("'>=' not supported between instances of 'list' and 'int'")


def _shards_in_loads(found: Found) -> bool:
    """Optimizer shards in loads of `.ckpt` files: stock puts them together wrongly, and may see it by the shape."""
    shards = any(cut.shards > 1 for job in found.jobs for stages in job.cuts.values() for cut in stages.values())
    return (
        found.case.function == "load_distributed_checkpoint"
        and shards
        and found.stock_says("should have the same shape as", "cannot reshape array", "all the input array dimensions")
    )


def _by_suffix(found: Found) -> bool:
    """A weight that the file does not have, or a choice or strategy leaves out, filled from its moment."""
    if found.case.function not in ("load_checkpoint", "load_distributed_checkpoint"):
        return False
    names = {**found.case.model.parameters, **found.case.model.extras}
    ends = {name for name in names for other in names if other.endswith(f".{name}")}
    if found.kind("bytes") and found.difference.right == "unknown":
        return found.name in ends and found.difference.where[0] == "network"
    return bool(ends) and found.stock_says("cannot reshape array", "should have the same shape as")


def _wrapped(found: Found) -> bool:
    """Names that were loaded by their ends: stock lists them among those that went nowhere."""
    if not found.kind("value") or "wrapped" not in found.case.tags:
        return False
    return found.stock.value[0] == found.ours.value[0] and set(found.ours.value[1]) < set(found.stock.value[1])


def _pieces(found: Found) -> bool:
    """Columns under safetensors 0.8, where nobody helps stock."""
    return found.kind("bytes") and found.ours_is_right and "raw" in found.case.tags


def _empty_layouts(found: Found) -> bool:
    return found.stock_says("'strategy_filename' should be string, but got <class 'dict'>")


def _no_strategy(found: Found) -> bool:
    """One whole `.ckpt` file into a network, and no strategy."""
    return found.stock_says("no such strategy file: .") and found.case.model.source.world == 1


def _sealed_with_checksum(found: Found) -> bool:
    return found.kind("served") and {"crc_check", "dec_key"} <= found.case.named.keys()


def _renamed(found: Found) -> bool:
    """Stock looks for a file by the new name in a map of the old ones, finds none, and leaves the parameter out."""
    return (
        found.kind("names", "files")
        and found.ours_is_right
        and bool(found.case.named.get("name_map"))
        and "only ours" in found.difference.told
    )


def _names_of_parameters(found: Found) -> bool:
    return found.kind("parameter names")


def _shorter_list(found: Found) -> bool:
    return (
        found.case.function.startswith("rank_list_for_")
        and found.kind("value")
        and set(found.ours.value) < set(found.stock.value)
    )


def _nothing_to_convert(found: Found) -> bool:
    return found.kind("refused") and bool(re.search(r"holds no \S+ file to convert", str(found.ours.error)))


def _uncut(found: Found) -> bool:
    """A parameter that only the target's strategy lists: stock leaves it whole, also for stages that do not have it."""
    if not found.ours_is_right or found.name in found.case.model.source.listed:
        return False
    return found.kind("shape") or (found.kind("names") and "only stock" in found.difference.told)


def _whole_elsewhere(found: Found) -> bool:
    """Which ranks get what is whole and not listed by the target, where there are pipeline stages."""
    return found.kind("names") and found.difference.right == "either"


def _missing_files(found: Found) -> bool:
    """A file that is not needed, or whose lack stock does not see."""
    return found.stock_says("is missing.") or (
        found.kind("refused") and "a file is not given" in found.case.tags and found.ours_is_right
    )


def _dedup_nested(found: Found) -> bool:
    """merge_with_redundancy=False: stock's table of who holds what knows no nested maps, and no pipeline stages."""
    return (
        found.case.function == "unified_safetensors"
        and not found.case.named.get("merge_with_redundancy", True)
        and (found.stock_says("should be in set()", "max() arg is an empty") or found.kind("bytes"))
        and found.difference.right != "stock"
    )


def _slices(found: Found) -> bool:
    """Slices in memory: bfloat16 becomes float32, and optimizer shards are not put together."""
    if found.case.function != "merge_sliced_parameter":
        return False
    sharded = any(cut.shards > 1 or cut.nested for cut in found.cuts) and found.kind("shape", "bytes", "served")
    return (
        (sharded and found.difference.right != "stock") or found.kind("dtype") or found.stock_says("'list' and 'int'")
    )


def _none_processes(found: Found) -> bool:
    named = found.case.named
    return found.kind("served") and any(name.endswith("_num") and not named[name] for name in named)


def _integers(found: Found) -> bool:
    return found.stock_says("should be a int")


def _torn(found: Found) -> bool:
    """Cut or different by rank where a strategy does not tell how: an error, or whole for one device."""
    if found.kind("refused"):
        return bool(found.case.refusal) and "mistake" not in found.case.tags
    target = found.case.model.target
    return found.kind("shape") and found.ours_is_right and target is not None and found.name not in target.listed


def _own(found: Found) -> bool:
    """What every rank has of its own, given to another stage's rank."""
    return found.kind("bytes") and found.ours_is_right and found.name in found.case.model.own


def _arbitrary_order(found: Found) -> bool:
    """Stock keeps names of safetensors in sets, and stages in processes: their order changes from run to run."""
    return found.kind("order") and "from safetensors" in found.case.tags


def _mistakes(found: Found) -> bool:
    """Input that is wrong, which stock takes without a word: an error by name, before anything is written."""
    return (
        "mistake" in found.case.tags
        and found.kind("refused")
        and type(found.ours.error).__module__ == "ms_ckpt_ext.errors"
        and not found.ours.files
    )


def _types(found: Found) -> bool:
    return found.kind("error type") and isinstance(found.ours.error, TypeError)


def _other_stage(found: Found) -> bool:
    """Frozen parameters, outside the strategy, of other stages than the first one."""
    return (
        found.kind("names", "files")
        and found.ours_is_right
        and "only ours" in found.difference.told
        and len(found.jobs[0].cuts) > 0
        and found.case.model.source.stages > 1
    )


RULES: Mapping[str, Callable[[Found], bool]] = {
    "device counts": _device_counts,
    "a dash in a name": _dash,
    "strategies in JSON": _json_strategy,
    "no parameter in a strategy": _nothing_in_a_strategy,
    "files that stock leaves out": _nothing_written,
    "errors that stock does not tell": _silent,
    "errors that stock did not mean": _accident,
    "gradients that are accumulated": _gradients,
    "parameters tied over stages": _tied,
    "optimizer shards": _optimizer_shard,
    "optimizer shards in loads of .ckpt": _shards_in_loads,
    "several device axes in loads of .ckpt": _nested_ckpt,
    "a lone axis under several device axes": _lone_axis,
    "names by suffix": _by_suffix,
    "names loaded by their ends": _wrapped,
    "safetensors 0.8": _pieces,
    "empty layouts": _empty_layouts,
    "no strategy for one file": _no_strategy,
    "a checksum under encryption": _sealed_with_checksum,
    "name_map and the parameter map": _renamed,
    "total_size": _total_size,
    "what a choice leaves out": _left_out,
    "the note remove_redundancy": _note_of_redundancy,
    "the order of stages": _order_of_stages,
    "prefixes of safetensors": _prefixes,
    "names of Parameters": _names_of_parameters,
    "shorter lists of ranks": _shorter_list,
    "nothing to convert": _nothing_to_convert,
    "listed by the target only": _uncut,
    "cut outside the strategy": _torn,
    "whole parameters that the target does not list": _whole_elsewhere,
    "files that are missing": _missing_files,
    "deduplicated slices": _dedup_nested,
    "slices in memory": _slices,
    "no number of processes": _none_processes,
    "every rank's own": _own,
    "the order of safetensors in .ckpt": _arbitrary_order,
    "arguments of a wrong type": _types,
    "mistakes that stock does not see": _mistakes,
    "integers of any kind": _integers,
    "frozen parameters of later stages": _other_stage,
}
"""Name -> whether a difference is one of its kind."""


def rule_of(found: Found) -> Optional[str]:
    return next((name for name, rule in RULES.items() if rule(found)), None)
