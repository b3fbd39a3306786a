"""Random calls of what loads: into dictionaries, and into networks."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.stock.fuzz.cases import Case, Network, Place, one_device, recut, write_merged, write_source
from tests.stock.fuzz.cutting import target_strategy
from tests.stock.fuzz.files import flat, write, write_by_mindspore
from tests.stock.fuzz.model import Array, Wishes, random_model

KEY = b"0123456789ABCDEF"
_OTHERS = {"F32": "F16", "F16": "F32", "BF16": "F32", "I32": "I64", "I64": "I32", "F64": "F32"}
"""A dtype of the same family."""


def into_network(rng: Random, root: Path) -> Case:
    """load_distributed_checkpoint of a merged checkpoint into a network"""
    model = one_device(random_model(rng, Wishes(own=False)))
    wrapped = rng.random() < 0.1
    write_merged(rng, model, root, {n: f"backbone.{n}" for n in model.parameters} if wrapped else {}, wrapped)
    named: dict[str, Any] = {"format": "safetensors", "unified_safetensors_dir": Place("merged")}
    rank = 0
    if model.target is not None and not wrapped:
        named["predict_strategy"] = target_strategy(rng, model.target, root)
        rank = rng.randrange(model.target.world)
    if wrapped:
        model = model._replace(target=None)
    listed = model.target.listed if model.target else frozenset(model.parameters)
    held = recut(model, [rank]).held[rank]
    tensors = {n: a for n, a in held.items() if n in listed or n in model.extras}
    tags = {"wrapped"} if wrapped else set()
    offered = held if rng.random() < 0.2 else tensors  # what the strategy does not list, in the network
    wanted = {name: array for name, array in offered.items() if rng.random() < 0.92}
    if rng.random() < 0.2:
        wanted["unknown.weight"] = Array("F32", np.zeros((2, 2), np.uint32))
    if not wrapped and rng.random() < 0.1:
        named["return_param_dict"] = True
        tags.add("param_dict")
    expected = {"network": {n: a for n, a in wanted.items() if n in held}}
    optional: set[str] = set()
    if "param_dict" in tags:
        expected, optional = {"returned": held}, held.keys() - tensors.keys()
    for name in [n for n in sorted(wanted) if wanted[n].dtype in _OTHERS and rng.random() < 0.08]:
        wanted[name] = _empty(_OTHERS[wanted[name].dtype], wanted[name].shape)  # a cast
        expected.get("network", {}).pop(name, None)
    refusal = ""
    if wanted and rng.random() < 0.04:
        name = rng.choice(sorted(wanted))
        wanted[name] = _empty(wanted[name].dtype, (*wanted[name].shape, 7))
        refusal = "" if "param_dict" in tags else f"{name} has another shape in the network"
    return Case(
        "load_distributed_checkpoint", (Network(wanted),), named, model, expected,
        only="param_dict" in tags, optional=frozenset(optional), rank=rank, tags=frozenset(tags), refusal=refusal,
    )  # fmt: skip


def _empty(dtype: str, shape: tuple[int, ...]) -> Array:
    from tests.stock.fuzz.model import WIDTHS

    return Array(dtype, np.zeros(shape, f"u{WIDTHS[dtype]}"))


def ckpt_into_network(rng: Random, root: Path) -> Case:
    """load_distributed_checkpoint of .ckpt files into a network"""
    cut_too = rng.random() < 0.4
    model = random_model(rng, Wishes(stages=False, target=cut_too, nested=not cut_too, shards=not cut_too))
    source = write_source(rng, model, root, "ckpt", tidy=True)
    files = [Place(f"src/rank_{r}/{source.stem.format(r)}.ckpt") for r in range(model.source.world)]
    named: dict[str, Any] = {"train_strategy_filename": Place(source.strategy)}
    held, rank, target = {**model.parameters, **model.extras}, 0, model.target
    if target is not None:
        rank = rng.randrange(target.world)
        cuts = {n: target.cuts[n][0] for n in sorted(target.listed & model.source.listed)}
        named["predict_strategy"] = {n: [list(c.dev_matrix), flat(c), [], 0, True, ""] for n, c in cuts.items()}
        held.update({n: piece for n in cuts if (piece := target.slice(n, rank, model.parameters[n]))})
    wanted = {n: a for n, a in held.items() if rng.random() < 0.9}
    expected = {n: a for n, a in wanted.items() if n in model.source.listed and (target is None or n in cuts)}
    return Case(
        "load_distributed_checkpoint", (Network(wanted), files), named, model, {"network": expected},
        only=False, rank=rank,
    )  # fmt: skip


def load_file(rng: Random, root: Path) -> Case:
    """load_checkpoint"""
    model = random_model(rng, Wishes(target=False))
    kind = rng.choice(["ckpt", "safetensors"])
    held = model.rank(0)
    named: dict[str, Any] = {"format": kind} if kind == "safetensors" or rng.random() < 0.2 else {}
    if kind == "ckpt" and rng.random() < 0.3:
        sealed: dict[str, Any] = {"crc_check": True} if rng.random() < 0.5 else {}
        if not sealed or rng.random() < 0.5:
            sealed |= {"enc_key": KEY, "enc_mode": rng.choice(["AES-GCM", "AES-CBC", "SM4-CBC"])}
        write_by_mindspore(root / "net.ckpt", held, sealed)
        named |= {name.replace("enc_", "dec_"): value for name, value in sealed.items()}
    else:
        write(root / f"net.{kind}", held)
    chosen = _chosen(rng, held, named)
    expected = {"returned": chosen}
    later = kind == "ckpt" and not {"crc_check", "format"} & named.keys() and rng.random() < 0.25
    if not later and rng.random() < 0.4:
        wanted = {n: a for n, a in held.items() if rng.random() < 0.9}
        if wanted:
            named["net"] = Network(wanted)
            expected["network"] = {n: a for n, a in wanted.items() if n in chosen}
        if rng.random() < 0.2:
            named["strict_load"] = True
    function = "load_checkpoint_async" if later else "load_checkpoint"
    return Case(
        function, (Place(f"net.{kind}"),), named, model, expected, only=False,
        refusal="" if chosen else "nothing is left", tags=frozenset({"param_dict"}),
    )  # fmt: skip


def _chosen(rng: Random, held: dict[str, Array], named: dict[str, Any]) -> dict[str, Array]:
    """Adds arguments that choose, and returns what they leave."""
    filters, prefixes = rng.random(), ["layers", "adam", "embed.", "norm", "head"]
    picked = tuple(rng.sample(prefixes, 2))
    if filters < 0.15:
        named["specify_prefix"] = rng.choice([picked[0], list(picked), picked])
        begins = picked[:1] if isinstance(named["specify_prefix"], str) else picked
        return {n: a for n, a in held.items() if n.startswith(begins)}
    if filters < 0.3:
        named["filter_prefix"] = picked[0]
        return {n: a for n, a in held.items() if not n.startswith(picked[0])}
    if filters < 0.5:
        kept = set(rng.sample(sorted(held), rng.randint(0, len(held))))
        named["choice_func"] = lambda name: name in kept
        return {n: a for n, a in held.items() if n in kept}
    return dict(held)


def load_segments(rng: Random, root: Path) -> Case:
    """load_segmented_checkpoints"""
    model = random_model(rng, Wishes(target=False))
    held = model.rank(0)
    count = rng.randint(1, 3)
    for number in range(count):
        part = {n: a for k, (n, a) in enumerate(held.items()) if k % count == number}
        write(root / "segments" / f"net_{number}.ckpt", part or held)
    return Case(
        "load_segmented_checkpoints", (Place("segments"),), {}, model, {"returned": held},
        tags=frozenset({"param_dict"}),
    )  # fmt: skip
