"""What a case is: a call of one function, its input in a folder, and what should come of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from random import Random
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from tests.stock.fuzz.files import write, write_strategy
from tests.stock.fuzz.model import Array, Cut, Job, Model

Files = dict[str, dict[str, Array]]


class Place(NamedTuple):
    """An argument that is a path: below the folder of the side that runs the call."""

    path: str


class Network(NamedTuple):
    """An argument that is a network of these parameters, of other contents."""

    parameters: Mapping[str, Array]


class Slices(NamedTuple):
    """An argument that is a list of Parameters of one name."""

    name: str
    arrays: tuple[Array, ...]


class Layouts(NamedTuple):
    """An argument that is what `build_searched_strategy` gives."""

    cuts: Mapping[str, Cut]


class Case(NamedTuple):
    """One call.

    Attributes:
        function: its name in MindSpore.
        arguments, named: of the call, with `Place` and `Network` where a side puts its own.
        expected: file -> name -> tensor that should be written there. Of a network the file is "network", of a
            dictionary that is returned "returned".
        only: whether `expected` is all there should be.
        optional: names of `expected` that a file may lack.
        refusal: why an error is the right answer, where it is.
        rank: of this process, as MindSpore tells it.
        tags: what is special, for the table of known differences.
    """

    function: str
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    model: Model
    expected: Files
    only: bool = True
    optional: frozenset[str] = frozenset()
    refusal: str = ""
    rank: int = 0
    tags: frozenset[str] = frozenset()


class Source(NamedTuple):
    """A checkpoint of all ranks, as it lies in a folder."""

    kind: str
    stem: str
    strategy: str
    dedup: bool


def write_source(
    rng: Random, model: Model, root: Path, kind: str = "", dedup: Optional[bool] = None, tidy: bool = False
) -> Source:
    """`src/rank_N/…` and the strategy file of the job. Where it need not be tidy, older steps lie beside it, too."""
    kind = kind or rng.choice(["safetensors", "safetensors", "ckpt"])
    if dedup is None:
        dedup = kind == "safetensors" and rng.random() < 0.15
    stem = rng.choice(["net", "net", "llama_rank_{}-3_1200", "net-{}", "net_rank_{}_1-2_30"])
    form = strategy_form(rng, model.source)
    write_strategy(root / f"src_strategy.{form}", model.source, form=form)
    keeper = _keepers(rng, model) if dedup else {}
    note = {"format": "ms", "remove_redundancy": str(dedup)} if dedup or rng.random() < 0.1 else {"format": "ms"}
    for rank in range(model.source.world):
        held = {n: a for n, a in model.rank(rank).items() if keeper.get((n, rank), True)}
        write(root / "src" / f"rank_{rank}" / f"{stem.format(rank)}.{kind}", held, note)
    if not tidy and stem == "llama_rank_{}-3_1200" and rng.random() < 0.4:
        older = {n: Array(a.dtype, np.zeros_like(a.bits)) for n, a in model.rank(0).items()}
        for rank in range(model.source.world):
            write(root / "src" / f"rank_{rank}" / f"llama_rank_{rank}-2_1000.{kind}", older, note)
    return Source(kind, stem, f"src_strategy.{form}", dedup)


def one_device(model: Model) -> Model:
    """The model as one device saves it."""
    cuts = {n: {0: Cut((1,), ((),) * len(a.shape))} for n, a in model.parameters.items()}
    return model._replace(source=Job(1, 1, cuts, frozenset(cuts)))


def strategy_form(rng: Random, job: Job) -> str:
    nested = any(cut.nested for stages in job.cuts.values() for cut in stages.values())
    return "json" if not nested and rng.random() < 0.2 else "ckpt"


def _keepers(rng: Random, model: Model) -> dict[tuple[str, int], bool]:
    """(name, rank) -> whether this rank is the one that keeps its slice."""
    found: dict[tuple[str, int], bool] = {}
    job = model.source
    for name in job.listed:
        for stage, cut in job.cuts[name].items():
            cut = cut.without_shard() if name.startswith("accu_grads") else cut
            holders: dict[tuple[int, ...], list[int]] = {}
            for local in range(job.devices):
                holders.setdefault(cut.cell(local), []).append(stage * job.devices + local)
            for ranks in holders.values():
                kept = rng.choice(ranks)
                found.update({(name, rank): rank == kept for rank in ranks})
    return found


def write_merged(
    rng: Random, model: Model, root: Path, names: Mapping[str, str], wrapped: bool = False
) -> dict[str, Array]:
    """A merged checkpoint as MindSpore writes it, by other `names` where there are any; returns what it holds.

    `wrapped`: names differ by a prefix, which no name map tells.
    """
    folder = "merged"
    held = {names.get(n, n): a for n, a in model.parameters.items() if not n.startswith("accu_grads")}
    count = rng.choice([1, 1, 2, 3])
    weights = {name: f"part{number % count}.safetensors" for number, name in enumerate(sorted(held))}
    for file in sorted(set(weights.values())):
        write(root / folder / file, {n: held[n] for n in held if weights[n] == file})
    if model.extras:
        write(root / folder / "hyper_param.safetensors", model.extras)
    size = sum(len(array.data) for array in held.values())
    if names and not wrapped and rng.random() < 0.7:  # as MindFormers has it: the map has the names of the network
        weights = {n: weights[names.get(n, n)] for n in model.parameters if names.get(n, n) in weights}
    (root / folder / "param_name_map.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=4)
    )
    return {n: a for n, a in model.parameters.items() if not n.startswith("accu_grads")}


class Truth(NamedTuple):
    """What should be: by rank of the target; what a rank may also do without; and why an error is right instead."""

    held: dict[int, dict[str, Array]]
    optional: frozenset[str] = frozenset()
    refusal: str = ""


def merged(model: Model, choice: Optional[Callable[[str], Any]] = None) -> Truth:
    """Everything whole: what is cut outside the strategy, and what every rank has of its own, cannot be."""
    torn = [n for n in (*model.unlisted_cut, *model.own) if choice is None or choice(n) is not False]
    whole = {n: a for n, a in model.parameters.items() if n in model.source.cuts and n not in torn}
    return Truth({0: {**whole, **model.extras}}, refusal=_refusal(torn))


def recut(model: Model, ranks: Optional[list[int]] = None) -> Truth:
    """What the ranks of the target should have.

    What it lists is cut; what it does not list stays whole, or as it is where the ranks correspond; what is cut in the
    source and nobody can tell how it should be cut in the target is refused.
    """
    source, target = model.source, model.target
    alike = target is not None and _same_slices(source, target)
    ranks = list(range(target.world if target else 1)) if ranks is None else ranks
    held: dict[int, dict[str, Array]] = {rank: dict(model.extras) for rank in ranks}
    refused, optional = [], set()
    for name in (n for n in model.parameters if n in source.cuts):
        torn = name in model.unlisted_cut
        listed = target is not None and name in target.listed
        whole = all(prod(cut.parts) == 1 for cut in source.cuts[name].values())
        for rank in ranks:
            if target is None or (not listed and (whole or target.devices == 1)):
                piece: Optional[Array] = model.parameters[name]
            else:
                piece = (target if listed else source).slice(name, rank, model.parameters[name])
            if piece is not None:
                held[rank][name] = piece
        if torn if target is None or listed or target.devices == 1 else not whole and not alike:
            refused.append(name)
        if target is not None and not listed and (source.stages > 1 or target.stages > 1):
            optional.add(name)
    for name, arrays in model.own.items():
        for rank in ranks if alike else ():
            held[rank][name] = arrays[rank]
        refused += [] if alike or source.world == 1 else [name]
    return Truth(held, frozenset(optional), _refusal(refused))


def _same_slices(one: Job, two: Job) -> bool:
    """Whether every rank has the same slice of all that both list, optimizer shards aside."""
    if (one.devices, one.stages) != (two.devices, two.stages):
        return False
    both = one.listed & two.listed
    plain = [
        {n: {s: cut.without_shard() for s, cut in job.cuts[n].items()} for n in both if not n.startswith("accu_grads")}
        for job in (one, two)
    ]
    cells = [
        {n: {s: (c.parts, [c.cell(r) for r in range(one.devices)]) for s, c in cuts.items()} for n, cuts in job.items()}
        for job in plain
    ]
    return bool(both) and cells[0] == cells[1]


def _refusal(names: list[str]) -> str:
    return f"{sorted(names)}: nobody can tell how it is, or should be, cut" if names else ""
