"""Random calls of what cuts a checkpoint anew."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from tests.stock.fuzz.cases import Case, Place, one_device, recut, strategy_form, write_merged, write_source
from tests.stock.fuzz.files import write, write_strategy
from tests.stock.fuzz.model import Job, Model, Wishes, random_model


def transform(rng: Random, root: Path) -> Case:
    """transform_checkpoints, of rank folders"""
    model = random_model(rng)
    source = write_source(rng, model, root, dedup=False)
    named: dict[str, Any] = {"src_strategy_file": Place(source.strategy)}
    form = "ckpt" if source.kind == "ckpt" else rng.choice(["ckpt", "safetensors"])
    if form != "ckpt" or rng.random() < 0.3:
        named["output_format"] = form
    if rng.random() < 0.2:
        named["process_num"] = rng.choice([1, 2, 4])
    if model.target is not None:
        named["dst_strategy_file"] = target_strategy(rng, model.target, root)
    prefix = rng.choice(["net", "net_", "checkpoint_"])
    truth = recut(model)
    part = "_part0" if source.kind == "ckpt" and _by_stage(model) else ""
    return Case(
        rng.choice(["transform_checkpoints", "transform_checkpoints", "convert_checkpoints"]),
        (Place("src"), Place("out"), prefix),
        named,
        model,
        {f"out/rank_{rank}/{prefix}{rank}{part}.{form}": held for rank, held in truth.held.items()},
        optional=truth.optional,
        refusal=truth.refusal,
        tags=frozenset({f"from {source.kind}"}),
    )


def _by_stage(model: Model) -> bool:
    """Whether MindSpore takes the source for one stage of several: both have one, and the target lists more."""
    if model.target is None or (model.source.stages, model.target.stages) != (1, 1):
        return False
    mine, theirs = (
        {n for n in job.listed if not n.startswith(("accu_grads", "adam_v", "adam_m"))}
        for job in (model.source, model.target)
    )
    return mine < theirs


def target_strategy(rng: Random, job: Job, root: Path) -> Place:
    """The strategy file of the target."""
    form = strategy_form(rng, job)
    write_strategy(root / f"dst_strategy.{form}", job, form=form)
    return Place(f"dst_strategy.{form}")


def transform_whole(rng: Random, root: Path) -> Case:
    """transform_checkpoints, of one whole checkpoint"""
    model = one_device(random_model(rng, Wishes(own=False)))
    kind = rng.choice(["ckpt", "safetensors"])
    write(root / "src" / "rank_0" / f"net.{kind}", {**model.parameters, **model.extras})
    form = "ckpt" if kind == "ckpt" else rng.choice(["ckpt", "safetensors"])
    named: dict[str, Any] = {"output_format": form}
    if model.target is not None:
        named["dst_strategy_file"] = target_strategy(rng, model.target, root)
    truth = recut(model)
    expected = {f"out/rank_{rank}/net{rank}.{form}": held for rank, held in truth.held.items()}
    source = Place("src/rank_0/net.safetensors") if kind == "safetensors" and rng.random() < 0.3 else Place("src")
    return Case(
        "transform_checkpoints", (source, Place("out"), "net"), named, model, expected,
        optional=truth.optional, refusal=truth.refusal, tags=frozenset({f"from {kind}"}),
    )  # fmt: skip


def by_rank(rng: Random, root: Path) -> Case:
    """transform_checkpoint_by_rank"""
    model = random_model(rng)
    source = write_source(rng, model, root, "ckpt")
    named: dict[str, Any] = {"src_strategy_file": Place(source.strategy)}
    if model.target is not None:
        named["dst_strategy_file"] = target_strategy(rng, model.target, root)
    rank = rng.randrange(model.target.world if model.target else 1)
    ranks = list(range(model.source.world))
    if rng.random() < 0.5:
        ranks.reverse()  # as rank_list_for_transform has them
    files = {each: Place(f"src/rank_{each}/{source.stem.format(each)}.ckpt") for each in ranks}
    if rng.random() < 0.1:
        del files[rng.choice(sorted(files))]
    (root / "out").mkdir()
    truth = recut(model, [rank])
    return Case(
        rng.choice(["transform_checkpoint_by_rank", "transform_checkpoint_by_rank", "convert_checkpoint_by_rank"]),
        (rank, files, Place("out/net.ckpt")),
        named,
        model,
        {"out/net.ckpt": truth.held[rank]},
        optional=truth.optional,
        refusal=truth.refusal,
        tags=frozenset({"a file is not given"} if len(files) < model.source.world else ()),
    )


def rank_list(rng: Random, root: Path) -> Case:
    """rank_list_for_transform"""
    model = random_model(rng, Wishes(unlisted=False))
    form = strategy_form(rng, model.source)
    write_strategy(root / f"src_strategy.{form}", model.source, form=form)
    named: dict[str, Any] = {"src_strategy_file": Place(f"src_strategy.{form}")} if rng.random() < 0.95 else {}
    if model.target is not None:
        named["dst_strategy_file"] = target_strategy(rng, model.target, root)
    rank = rng.randrange(model.target.world if model.target else 1)
    function = rng.choice(["rank_list_for_transform", "rank_list_for_transform", "rank_list_for_convert"])
    return Case(function, (rank,), named, model, {})


def save_mode(rng: Random, root: Path) -> Case:
    """load_distributed_checkpoint without a network"""
    model = one_device(random_model(rng, Wishes(own=False)))
    model = model._replace(target=model.target or model.source)
    target = model.target
    assert target is not None
    names = _renamed(rng, model)
    write_merged(rng, model, root, names)
    named: dict[str, Any] = {
        "predict_strategy": target_strategy(rng, target, root),
        "format": "safetensors",
        "unified_safetensors_dir": Place("merged"),
        "dst_safetensors_dir": Place("out"),
    }
    if names:
        named["name_map"] = names
    ranks = list(range(target.world))
    if rng.random() < 0.5:
        named["rank_id"] = rng.choice(ranks)
        ranks = [named["rank_id"]]
    out = rng.choice(["safetensors", "safetensors", "ckpt"])
    if out == "ckpt" or rng.random() < 0.3:
        named["output_format"] = out
    expected = {f"out/rank_{rank}/net.{out}": held for rank, held in recut(model, ranks).held.items()}
    unlisted = frozenset(model.parameters) - target.listed
    return Case("load_distributed_checkpoint", (None,), named, model, expected, optional=unlisted)


def _renamed(rng: Random, model: Model) -> dict[str, str]:
    """Names in the target -> names in the files, where they differ."""
    if rng.random() < 0.85:
        return {}
    return {name: f"model.{name}" for name in sorted(model.parameters) if rng.random() < 0.5}
