"""A random model, the job that saved it, and the job that wants it.

Arrays are held as unsigned integers of the element's size: bytes are compared, not values.
"""

from __future__ import annotations

from math import gcd, prod
from random import Random
from typing import NamedTuple, Optional

import numpy as np

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "BOOL": 1}
_COMMON = ("F32", "F32", "F32", "F16", "BF16", "BF16")
_RARE = tuple(WIDTHS)


class Array(NamedTuple):
    """A tensor: dtype by its safetensors name, and the bits."""

    dtype: str
    bits: np.ndarray

    @property
    def data(self) -> bytes:
        return self.bits.tobytes()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape


class Cut(NamedTuple):
    """How the ranks of one pipeline stage share a parameter, in MindSpore's numbers.

    `tensor_map` lists, for every tensor axis, the device axes that split it, counted from the right; major first.
    """

    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    step: int = 0
    size: int = 0

    @property
    def nested(self) -> bool:
        return any(len(group) > 1 for group in self.tensor_map)

    @property
    def ways(self) -> tuple[int, ...]:
        """Slices along every tensor axis, the optimizer shard aside."""
        return tuple(prod(self.dev_matrix[-1 - axis] for axis in group) for group in self.tensor_map)

    @property
    def replicas(self) -> list[int]:
        """Device axes (from the left) that split nothing, of more than one device."""
        used = {len(self.dev_matrix) - 1 - axis for group in self.tensor_map for axis in group}
        return [axis for axis, extent in enumerate(self.dev_matrix) if axis not in used and extent > 1]

    @property
    def shards(self) -> int:
        """Ways of the optimizer shard."""
        if not self.step or not self.size:
            return 1
        return prod(self.dev_matrix[axis] for axis in self.replicas) if self.size == -1 else self.size

    @property
    def parts(self) -> tuple[int, ...]:
        ways = self.ways
        return (ways[0] * self.shards, *ways[1:]) if ways else ()

    def without_shard(self) -> Cut:
        return self._replace(step=0, size=0)

    def cell(self, rank: int) -> tuple[int, ...]:
        """Which slice a rank of the stage holds."""
        place = [int(each) for each in np.unravel_index(rank, self.dev_matrix)]
        cell = []
        for group in self.tensor_map:
            index = 0
            for axis in group:
                index = index * self.dev_matrix[-1 - axis] + place[-1 - axis]
            cell.append(index)
        left, index, scale = self.shards, 0, 1
        for axis in reversed(self.replicas):
            ways = min(left, self.dev_matrix[axis])
            index += scale * (place[axis] % ways)
            scale, left = scale * ways, left // ways
        if self.shards > 1:
            cell[0] = cell[0] * self.shards + index
        return tuple(cell)

    def slice(self, rank: int, whole: Array) -> Array:
        bits = whole.bits
        for axis, (index, parts) in enumerate(zip(self.cell(rank), self.parts)):
            extent = bits.shape[axis] // parts
            bits = bits.take(range(index * extent, (index + 1) * extent), axis)
        return Array(whole.dtype, np.array(bits, order="C"))


class Job(NamedTuple):
    """`cuts`: name -> stage -> cut, of everything that is saved under a cut; `listed`: what the strategy file tells."""

    devices: int
    stages: int
    cuts: dict[str, dict[int, Cut]]
    listed: frozenset[str]

    @property
    def world(self) -> int:
        return self.devices * self.stages

    def cut(self, name: str, rank: int) -> Optional[Cut]:
        return self.cuts.get(name, {}).get(rank // self.devices)

    def slice(self, name: str, rank: int, whole: Array) -> Optional[Array]:
        """What a rank holds of a parameter; gradients that are accumulated are saved without their optimizer shard."""
        cut = self.cut(name, rank)
        if cut is None:
            return None
        return (cut.without_shard() if name.startswith("accu_grads") else cut).slice(rank % self.devices, whole)

    def of_stage(self, stage: int) -> dict[str, Cut]:
        """What the strategy file of a stage lists."""
        return {n: stages[stage] for n, stages in self.cuts.items() if stage in stages and n in self.listed}


class Model(NamedTuple):
    """Parameters whole; what every rank has alike outside every cut; what every rank has of its own."""

    parameters: dict[str, Array]
    extras: dict[str, Array]
    own: dict[str, list[Array]]
    source: Job
    target: Optional[Job]

    def rank(self, rank: int) -> dict[str, Array]:
        """What a rank of the source saves."""
        slices = {name: self.source.slice(name, rank, whole) for name, whole in self.parameters.items()}
        return {
            **{name: array for name, array in slices.items() if array is not None},
            **self.extras,
            **{name: arrays[rank] for name, arrays in self.own.items()},
        }

    @property
    def unlisted_cut(self) -> list[str]:
        """Parameters that ranks hold in slices, of which the strategy file says nothing."""
        job = self.source
        return [
            name
            for name, stages in job.cuts.items()
            if name not in job.listed and any(prod(cut.parts) > 1 for cut in stages.values())
        ]


class Wishes(NamedTuple):
    """What a kind of call can use of the model."""

    target: bool = True
    stages: bool = True
    unlisted: bool = True
    own: bool = True
    nested: bool = True
    shards: bool = True


_EVERYTHING = Wishes()


def random_model(rng: Random, wishes: Wishes = _EVERYTHING) -> Model:
    devices, stages = _size(rng, wishes.stages)
    other = _size(rng, wishes.stages) if wishes.target and rng.random() < 0.85 else None
    names = _names(rng)
    source = _random_job(rng, names, devices, stages, wishes, tied=rng.random() < 0.4)
    target = None if other is None else _random_job(rng, names, *other, wishes, tied=rng.random() < 0.3)
    if target is not None and rng.random() < 0.15:
        target = source  # nothing changes
    parameters = {name: _array(rng, name, source, target) for name in names}
    extras = _extras(rng)
    own = {}
    if wishes.own and rng.random() < 0.1:
        own["rng_state"] = [Array("U8", _bits(rng, "U8", (8,))) for _ in range(source.world)]
    source, target = (None if job is None else _with_gradients(rng, job) for job in (source, target))
    assert source is not None
    for name in (n for n in {**source.cuts, **(target.cuts if target else {})} if n.startswith("accu_grads")):
        like = parameters[name.split(".", 1)[1]]
        parameters[name] = Array(like.dtype, np.zeros_like(like.bits))
    return Model(parameters, extras, own, source, target)


def _size(rng: Random, several_stages: bool) -> tuple[int, int]:
    stages = rng.choice([1, 1, 1, 2, 2, 3, 4]) if several_stages else 1
    return rng.choice([n for n in (1, 2, 2, 3, 4, 4, 4, 6, 8, 8, 12, 16) if n * stages <= 16]), stages


def _names(rng: Random) -> list[str]:
    pool = [
        "embed.weight",
        "head.weight",
        "norm.gamma",
        *(f"layers.{i}.{w}" for i in range(3) for w in ("wq", "w1.bias")),
    ]
    names = rng.sample(pool, rng.randint(2, 5))
    names += [f"{moment}.{name}" for name in names[:2] for moment in ("adam_m", "adam_v") if rng.random() < 0.5]
    if rng.random() < 0.05:
        names.append("side-car.weight")
    return names


def _random_job(rng: Random, names: list[str], devices: int, stages: int, wishes: Wishes, tied: bool) -> Job:
    cuts: dict[str, dict[int, Cut]] = {}
    for number, name in enumerate(names):
        ndim = 1 + (len(name) + number) % 3
        first = number % stages if number < stages else rng.randrange(stages)
        where = {first} | ({rng.randrange(stages)} if tied and number == 0 else set())
        one = random_cut(rng, devices, ndim, wishes)
        cuts[name] = {s: one if rng.random() < 0.6 else random_cut(rng, devices, ndim, wishes) for s in sorted(where)}
    listed = set(names)
    if wishes.unlisted and rng.random() < 0.3:
        for name in rng.sample(names, rng.randint(1, max(1, len(names) // 3))):
            alone = all(not (listed - {name}) & {n for n in names if s in cuts[n]} for s in cuts[name])
            if not alone and len(listed) > 1:
                listed.discard(name)
                if rng.random() < 0.6:  # frozen and whole; else frozen and cut
                    cuts[name] = {s: Cut(cut.dev_matrix, ((),) * len(cut.tensor_map)) for s, cut in cuts[name].items()}
    present = {s for n in listed for s in cuts[n]}
    for stage in set(range(stages)) - present:  # a strategy file of nothing is none
        name = next(iter(sorted(listed)))
        cuts[name][stage] = random_cut(rng, devices, len(next(iter(cuts[name].values())).tensor_map), wishes)
    return Job(devices, stages, cuts, frozenset(listed))


def random_cut(rng: Random, devices: int, ndim: int, wishes: Wishes) -> Cut:
    matrix = _factors(rng, devices)
    axes = list(range(len(matrix)))
    rng.shuffle(axes)
    groups: list[list[int]] = [[] for _ in range(ndim)]
    nested = wishes.nested and rng.random() < 0.15
    for axis in axes:
        where = rng.randint(-1, ndim - 1)
        if where >= 0 and (nested or not groups[where]):
            groups[where].append(axis)
    cut = Cut(matrix, tuple(map(tuple, groups)))
    if not wishes.shards or not cut.replicas or rng.random() < 0.55:
        return cut
    sizes = [-1, -1, *_partial_sizes(cut)]
    innermost = cut.replicas[-1]
    return cut._replace(step=prod(matrix[innermost + 1 :]), size=rng.choice(sizes))


def _partial_sizes(cut: Cut) -> list[int]:
    """Sizes that the innermost replicas make, the last one taken in part or whole."""
    sizes, made = [], 1
    for axis in reversed(cut.replicas):
        extent = cut.dev_matrix[axis]
        sizes += [made * ways for ways in range(2, extent + 1) if extent % ways == 0]
        made *= extent
    return sizes


def _factors(rng: Random, devices: int) -> tuple[int, ...]:
    factors = []
    while devices > 1:
        factor = rng.choice([n for n in range(2, devices + 1) if devices % n == 0])
        factors.append(factor)
        devices //= factor
    if not factors or rng.random() < 0.15:
        factors.insert(rng.randint(0, len(factors)), 1)
    return tuple(factors)


def _array(rng: Random, name: str, *jobs: Optional[Job]) -> Array:
    cuts = [cut for job in jobs if job for cut in job.cuts.get(name, {}).values()]
    parts = [1] * len(cuts[0].tensor_map)
    for cut in cuts:
        parts = [a * b // gcd(a, b) for a, b in zip(parts, cut.parts)]
    shape = tuple(count * rng.choice([1, 1, 2, 3]) for count in parts)
    dtype = rng.choice(_COMMON if rng.random() < 0.7 else _RARE)
    return Array(dtype, _bits(rng, dtype, shape))


def _bits(rng: Random, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    source = np.random.default_rng(rng.getrandbits(32))
    width = WIDTHS[dtype]
    if dtype == "BOOL":
        return source.integers(0, 2, shape).astype(np.uint8)
    if dtype[0] in "IU":
        return source.integers(0, 256, (*shape, width), np.uint8).view(f"u{width}").reshape(shape)
    values = source.standard_normal(shape)
    if rng.random() < 0.2 and values.size > 3:
        values.reshape(-1)[:3] = (-0.0, np.inf, np.nan)
    if dtype == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(f"f{width}").view(f"u{width}")


def _extras(rng: Random) -> dict[str, Array]:
    pool = {
        "global_step": Array("I32", np.array([rng.randrange(1, 10**6)], np.uint32)),
        "learning_rate": Array("F32", np.array(rng.random(), np.float32).view(np.uint32)),
        "epoch_num": Array("I32", np.array(rng.randrange(1, 100), np.uint32)),
        "loss_scale": Array("F32", np.array([65536.0], np.float32).view(np.uint32)),
        "beta1_power": Array("F32", np.array(rng.random(), np.float32).view(np.uint32)),
    }
    return {name: pool[name] for name in sorted(pool) if rng.random() < 0.35}


def _with_gradients(rng: Random, job: Job) -> Job:
    """Gradients that are accumulated stand in the strategy beside their weight."""
    if rng.random() > 0.12:
        return job
    name = sorted(job.listed)[0]
    return job._replace(
        cuts={**job.cuts, f"accu_grads.{name}": job.cuts[name]}, listed=job.listed | {f"accu_grads.{name}"}
    )
