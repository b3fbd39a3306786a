"""Stock is wrong, and does not say so."""

from __future__ import annotations

import json

from tests.stock.fuzz.found import Found


def _optimizer_shard(found: Found) -> bool:
    return found.kind("bytes") and found.ours_is_right and any(cut.shards > 1 for cut in found.cuts)


def _shards_in_loads(found: Found) -> bool:
    """Optimizer shards in loads of `.ckpt` files: stock puts them together wrongly, and may see it by the shape."""
    shards = any(cut.shards > 1 for job in found.jobs for stages in job.cuts.values() for cut in stages.values())
    return (
        found.case.function == "load_distributed_checkpoint"
        and shards
        and found.stock_says("should have the same shape as", "cannot reshape array", "all the input array dimensions")
    )


def _tied(found: Found) -> bool:
    tied = any(len(job.cuts.get(found.name.replace("model.", ""), {})) > 1 for job in found.jobs)
    return found.kind("bytes", "shape", "names") and found.ours_is_right and tied


def _slices(found: Found) -> bool:
    """Slices in memory: bfloat16 becomes float32, and optimizer shards are not put together."""
    if found.case.function != "merge_sliced_parameter":
        return False
    sharded = any(cut.shards > 1 or cut.nested for cut in found.cuts) and found.kind("shape", "bytes", "served")
    return (
        (sharded and found.difference.right != "stock") or found.kind("dtype") or found.stock_says("'list' and 'int'")
    )


def _dedup_nested(found: Found) -> bool:
    """merge_with_redundancy=False: stock's table of who holds what knows no nested maps, and no pipeline stages."""
    return (
        found.case.function == "unified_safetensors"
        and (not found.case.named.get("merge_with_redundancy", True) or "should be in set()" in str(found.stock.error))
        and (found.stock_says("should be in set()", "max() arg is an empty") or found.kind("bytes"))
        and found.difference.right != "stock"
    )


def _torn(found: Found) -> bool:
    """Cut or different by rank where a strategy does not tell how: an error, or whole for one device."""
    if found.kind("refused"):
        return bool(found.case.refusal) and "mistake" not in found.case.tags
    target = found.case.model.target
    return found.kind("shape") and found.ours_is_right and target is not None and found.name not in target.listed


def _own(found: Found) -> bool:
    """What every rank has of its own, given to another stage's rank."""
    return found.kind("bytes") and found.ours_is_right and found.name in found.case.model.own


def _other_stage(found: Found) -> bool:
    """Frozen parameters, outside the strategy, of other stages than the first one."""
    return (
        found.kind("names", "files")
        and found.ours_is_right
        and "only ours" in found.difference.told
        and len(found.jobs[0].cuts) > 0
        and found.case.model.source.stages > 1
    )


def _uncut(found: Found) -> bool:
    """A parameter that only the target's strategy lists: stock leaves it whole, also for stages that do not have it."""
    if not found.ours_is_right or found.name in found.case.model.source.listed:
        return False
    return found.kind("shape") or (found.kind("names") and "only stock" in found.difference.told)


def _loaded_all_the_same(found: Found) -> bool:
    return found.kind("bytes") and found.difference.where[0] == "network" and found.name in found.unlisted


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


def _by_suffix(found: Found) -> bool:
    """A weight that the file does not have, or a choice or strategy leaves out, filled from its moment."""
    if found.case.function not in ("load_checkpoint", "load_distributed_checkpoint"):
        return False
    names = {**found.case.model.parameters, **found.case.model.extras}
    ends = {name for name in names for other in names if other.endswith(f".{name}")}
    if found.kind("bytes", "shape") and found.difference.right == "unknown":
        return found.name in ends and found.difference.where[0] == "network"
    return bool(ends) and found.stock_says(
        "cannot reshape array", "should have the same shape as", "should have the same type as"
    )


def _renamed(found: Found) -> bool:
    """Stock looks for a file by the new name in a map of the old ones, finds none, and leaves the parameter out."""
    return (
        found.kind("names", "files")
        and found.ours_is_right
        and bool(found.case.named.get("name_map"))
        and "only ours" in found.difference.told
    )


def _gradients(found: Found) -> bool:
    return found.name.startswith("accu_grads") or (found.kind("served") and "accu_grads" in str(found.stock.error))


def _nothing_written(found: Found) -> bool:
    """Stock answers with no error and leaves files unwritten."""
    return found.kind("files") and found.ours_is_right and "only ours" in found.difference.told


def _silent(found: Found) -> bool:
    return found.kind("silent")


def _missing_files(found: Found) -> bool:
    """A file that is not needed, or whose lack stock does not see."""
    return found.stock_says("is missing.") or (
        found.kind("refused") and "a file is not given" in found.case.tags and found.ours_is_right
    )


def _total_size(found: Found) -> bool:
    if not found.kind("map"):
        return False
    one, two = (json.loads(outcome.files[found.difference.where[0]]) for outcome in (found.stock, found.ours))
    return "total_size" in two.get("metadata", {}) and one.get("weight_map") == two["weight_map"]


def _pieces(found: Found) -> bool:
    """Columns under safetensors 0.8, where nobody helps stock."""
    return found.kind("bytes") and found.ours_is_right and "raw" in found.case.tags


RULES = {
    "optimizer shards": _optimizer_shard,
    "optimizer shards in loads of .ckpt": _shards_in_loads,
    "parameters tied over stages": _tied,
    "slices in memory": _slices,
    "deduplicated slices": _dedup_nested,
    "cut outside the strategy": _torn,
    "every rank's own": _own,
    "frozen parameters of later stages": _other_stage,
    "listed by the target only": _uncut,
    "loads of what the strategy does not list": _loaded_all_the_same,
    "what a choice leaves out": _left_out,
    "names by suffix": _by_suffix,
    "name_map and the parameter map": _renamed,
    "gradients that are accumulated": _gradients,
    "files that stock leaves out": _nothing_written,
    "errors that stock does not tell": _silent,
    "files that are missing": _missing_files,
    "total_size": _total_size,
    "safetensors 0.8": _pieces,
}
