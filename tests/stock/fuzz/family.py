"""Random calls of what is left of MindSpore's checkpoint family: slices in memory, layouts, ranks, paths."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.stock.fuzz.cases import Case, Layouts, Place, Slices, strategy_form
from tests.stock.fuzz.files import write, write_strategy
from tests.stock.fuzz.model import Array, Wishes, random_model


def sliced(rng: Random, root: Path) -> Case:
    """merge_sliced_parameter"""
    model = random_model(rng, Wishes(target=False, stages=False, unlisted=False))
    job = model.source
    name = rng.choice(sorted(n for n in job.listed if not n.startswith("accu_grads")))
    whole = model.parameters[name]
    slices = [job.slice(name, rank, whole) for rank in range(job.devices)]
    named = {"strategy": Layouts({n: job.cuts[n][0] for n in sorted(job.listed)})}
    expected = {"returned": {name: whole}}
    if rng.random() < 0.15:
        named, expected = {}, {}
    return Case("merge_sliced_parameter", (Slices(name, tuple(slices)),), named, model, expected)


def searched(rng: Random, root: Path) -> Case:
    """build_searched_strategy"""
    model = random_model(rng, Wishes(target=False))
    form = strategy_form(rng, model.source)
    write_strategy(root / f"strategy.{form}", model.source, form=form)
    return Case("build_searched_strategy", (Place(f"strategy.{form}"),), {}, model, {})


def group_info(rng: Random, root: Path) -> Case:
    """restore_group_info_list"""
    from mindspore.train.node_strategy_pb2 import ParallelGroupMap

    model = random_model(rng, Wishes(target=False))
    message = ParallelGroupMap()
    message.ckpt_restore_rank_list.dim.extend(rng.sample(range(16), rng.randint(1, 8)))
    (root / "group_info.pb").write_bytes(message.SerializeToString())
    return Case("restore_group_info_list", (Place("group_info.pb"),), {}, model, {})


def path_of_a_rank(rng: Random, root: Path) -> Case:
    """get_ckpt_path_with_strategy"""
    model = random_model(rng, Wishes(target=False))
    job = model.source
    rank = rng.randrange(job.world)
    there = rng.sample(range(job.world), rng.randint(0, job.world))
    for each in there:
        write(root / f"rank_{each}" / "net.ckpt", {"a": Array("U8", next(iter(model.parameters.values())).bits)})
    stage = rank // job.devices
    write_strategy(root / "strategy.ckpt", job, stage)
    return Case(
        "get_ckpt_path_with_strategy",
        (Place(f"rank_{rank}/net.ckpt"), Place("strategy.ckpt")),
        {},
        model,
        {},
        rank=rank,
    )
