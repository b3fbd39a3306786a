"""Rank folders beyond those that a strategy speaks of: left over from a larger run, or a sign of the wrong strategy.

A training on 8 ranks, then one on 4 in the same directory: rank_4 … rank_7 of the first lie beside the second's files.
Or the strategy is that of one pipeline stage of a model whose parameters are all tied, and the files of the other
stages are there. Such files may be passed over, but only where the case is clear: with the strategy of a part of the
job, a part of the model would pass for all of it. They must hold no parameter that the others lack, and either

- be of another run: of another step by their names or by their counters, much older than the others, or cut otherwise;
- or repeat the others: stretches of what they hold are those of the rank in the same place, as with tied parameters,
  and the strategy is right about which of the others are copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, TypeVar

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.errors import CheckpointError, StrategyError, name_ranks
from ms_ckpt_ext.formats.discovery.saves import step_of
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import PLAIN, Access

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.integrity.contents import Seen

    Look = Callable[[Sequence[tuple[int, str]]], list[Seen]]

_T = TypeVar("_T")
Indexes = Mapping[int, FileIndex]
_NAMES, _RANKS, _STRETCH = 8, 16, 4096
"""Parameters and ranks that are compared, at most, spread over all; bytes of each."""
_COUNTERS = ("global_step", "step_num", "epoch_num")
"""Training scalars that are the same on all ranks of a save."""


class _Pair(NamedTuple):
    """Two ranks whose files should hold the same of a parameter."""

    name: str
    one: int
    two: int


def of_strategy(index_of: Indexes, strategy: Strategy, access: Access = PLAIN) -> Indexes:
    """The files, by rank, of the ranks that the strategy speaks of; others are logged.

    Raises:
        StrategyError: there are others, and what they are is not plain.
    """
    own = {rank: index for rank, index in index_of.items() if rank < strategy.world}
    beyond = {rank: index for rank, index in index_of.items() if rank >= strategy.world}
    if not beyond:
        return index_of
    known = {name: entry for index in own.values() for name, entry in index.tensors.items()}
    for index in beyond.values():
        lacking = next((name for name in index.tensors if not _is_known(name, known, strategy)), None)
        if lacking is not None:
            raise _refused(index, strategy, f", which holds {lacking!r}, a parameter that the strategy does not list")
    doubtful = {rank: index for rank, index in beyond.items() if not own or not _is_other_run(index, own, known)}
    repeated = _repeated(own, doubtful, strategy, access) if own and doubtful else {*doubtful}
    if repeated is None or not own:
        held = next(iter(doubtful.values()))
        raise _refused(held, strategy, ", and nothing tells it from the others: not its step, age or shapes")
    log.warning(
        "the files of %s, such as %r, are passed over: %s is for %d ranks, and %s",
        name_ranks(list(beyond)),
        next(iter(beyond.values())).path,
        strategy.origin,
        strategy.world,
        "they repeat what these hold" if repeated else "they are not of the same save",
    )
    return own


def _refused(index: FileIndex, strategy: Strategy, why: str) -> StrategyError:
    return StrategyError(
        f"{strategy.origin} is for {strategy.world} ranks, but the checkpoint has {index.path!r}{why}; "
        "check that they belong together, and give the strategies of all pipeline stages (merged, or a directory); "
        "folders that a larger run left behind are to be moved away"
    )


def _is_known(name: str, known: Mapping[str, TensorEntry], strategy: Strategy) -> bool:
    return name in strategy.layouts or name in known or name.startswith(ACCUMULATED_GRADIENT_PREFIX)


def _is_other_run(index: FileIndex, own: Indexes, known: Mapping[str, TensorEntry]) -> bool:
    step = step_of(index.path)
    if step is not None and step not in {step_of(held.path) for held in own.values()}:
        return True
    ages = [held.mtime_ns for held in own.values()]
    if min(ages) - index.mtime_ns > max(ages) - min(ages):  # a copy's files have any order, but not such a gap
        return True
    return any(entry[:2] != known[name][:2] for name, entry in index.tensors.items() if name in known)


def _repeated(own: Indexes, doubtful: Indexes, strategy: Strategy, access: Access) -> Optional[set[int]]:
    """Of these ranks, those that are not at another step: all of them repeat the others. None where they do not.

    As far as stretches tell; None as well where they cannot be read here.
    """
    look = _looking({**own, **doubtful}, access)
    try:
        left = {rank: index for rank, index in doubtful.items() if not _counts_otherwise(rank, index, own, look)}
        return {*left} if not left or _repeats(own, left, strategy, look) else None
    except CheckpointError:
        return None


def _looking(files: Indexes, access: Access) -> Look:
    """What sees a stretch in the middle of a rank's parameter."""
    from ms_ckpt_ext.engine.source.catalog import Catalog
    from ms_ckpt_ext.engine.unlisted.whole_slices import Alone, Probe

    numbers = {rank: number for number, rank in enumerate(files)}
    alone = Alone(Catalog(tuple(files.values()), {}, {}, {}, access))

    def stretch(rank: int, name: str) -> Probe:
        nbytes = files[rank].tensors[name].nbytes
        start = max(0, (nbytes - _STRETCH) // 2 // 16 * 16)
        return Probe(numbers[rank], name, start, min(_STRETCH, nbytes - start))

    return lambda wanted: alone([stretch(rank, name) for rank, name in wanted])


def _counts_otherwise(rank: int, index: FileIndex, own: Indexes, look: Look) -> bool:
    """Whether a counter of steps stands elsewhere than in all the others."""
    for name in (name for name in _COUNTERS if name in index.tensors):
        holders = [other for other, held in own.items() if name in held.tensors]
        there, *others = look([(rank, name), *((other, name) for other in _spread(holders, _RANKS))])
        if others and there not in others:
            return True
    return False


def _repeats(own: Indexes, beyond: Indexes, strategy: Strategy, look: Look) -> bool:
    files = {**own, **beyond}
    pairs = [pair for pair in _pairs(own, beyond, strategy) if _both_have(pair, files)]
    compared = {pair.two for pair in pairs}
    if any(rank not in compared for rank in _spread(sorted(beyond), _RANKS)):
        return False
    ones, twos = look([(pair.one, pair.name) for pair in pairs]), look([(pair.two, pair.name) for pair in pairs])
    return ones == twos and not all(seen.constant for seen in ones)


def _both_have(pair: _Pair, files: Indexes) -> bool:
    return all(rank in files and pair.name in files[rank].tensors for rank in (pair.one, pair.two))


def _pairs(own: Indexes, beyond: Indexes, strategy: Strategy) -> Iterator[_Pair]:
    """What is compared: of what is listed, and of matrices that are not, which then have to be the same everywhere."""
    held = {name: entry for index in own.values() for name, entry in index.tensors.items()}
    listed = _spread([name for name in held if name in strategy.layouts], _NAMES)
    matrices = [name for name, entry in held.items() if name not in strategy.layouts and len(entry.shape) > 1]
    others = _spread(matrices, _NAMES)
    for rank in _spread(sorted(beyond), _RANKS):
        for name in (*listed, *others):
            yield _Pair(name, rank % strategy.world, rank)
    for name in listed:
        yield from (_Pair(name, *ranks[:2]) for ranks in _copies(name, strategy) if ranks[1:])
    for name in others:
        yield from (_Pair(name, min(own), rank) for rank in _spread(sorted(own), _RANKS))


def _copies(name: str, strategy: Strategy) -> Iterator[Sequence[int]]:
    """Ranks that hold the same slice, of some slices."""
    for stage, layout in strategy.layouts[name].items():
        base = stage * strategy.devices_per_stage
        for ranks in _spread([*layout.holders.values()], _RANKS):
            yield [base + rank for rank in ranks]


def _spread(items: Sequence[_T], most: int) -> Sequence[_T]:
    return items[:: max(1, -(-len(items) // most))]
