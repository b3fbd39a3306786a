"""Rank folders beyond those that a strategy speaks of: left over from a larger run, or a sign of the wrong strategy.

Who trains on 8 ranks and then on 4 in the same directory has rank_4 … rank_7 of the first run beside the second's.
They may be passed over, but only where it is plain that they are not of this save: the strategy of a part of the job
would make a part of the model pass for all of it. So they must hold no parameter that the strategy lacks, and be of
another step by their names, or older than every file that counts, or cut otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from ms_ckpt_ext import log
from ms_ckpt_ext.core.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.errors import StrategyError, name_ranks
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.saves import step_of

Indexes = Mapping[int, FileIndex]


def of_strategy(index_of: Indexes, strategy: Strategy) -> Indexes:
    """The files, by rank, of the ranks that the strategy speaks of; others are logged.

    Raises:
        StrategyError: there are others, and they may be of the same save.
    """
    own = {rank: index for rank, index in index_of.items() if rank < strategy.world}
    beyond = {rank: index for rank, index in index_of.items() if rank >= strategy.world}
    if not beyond:
        return index_of
    known = {name: entry for index in own.values() for name, entry in index.tensors.items()}
    for index in beyond.values():
        lacking = next((name for name in index.tensors if not _is_known(name, index, known, strategy)), None)
        if lacking is not None:
            raise _beyond(index, strategy, f", which holds {lacking!r}, a parameter that the strategy does not list")
    doubtful = next((index for index in beyond.values() if not own or not _is_other_run(index, own, known)), None)
    if doubtful is not None:
        raise _beyond(doubtful, strategy, ", and nothing tells it from the others: not its step, age or shapes")
    log.warning(
        "the files of %s, such as %r, are passed over: %s is for %d ranks, and they are not of the same save",
        name_ranks(list(beyond)),
        next(iter(beyond.values())).path,
        strategy.origin,
        strategy.world,
    )
    return own


def _beyond(index: FileIndex, strategy: Strategy, why: str) -> StrategyError:
    return StrategyError(
        f"{strategy.origin} is for {strategy.world} ranks, but the checkpoint has {index.path!r}{why}; "
        "check that they belong together, and give the strategies of all pipeline stages (merged, or a directory); "
        "folders that a larger run left behind are to be moved away"
    )


def _is_known(name: str, index: FileIndex, known: Mapping[str, TensorEntry], strategy: Strategy) -> bool:
    """Whether what a file beyond the strategy's ranks calls so is in the files of these, too."""
    if name in strategy.layouts or name.startswith(ACCUMULATED_GRADIENT_PREFIX):
        return True
    here, there = index.tensors[name], known.get(name)
    return there is not None and len(here.shape) < 2 and here[:2] == there[:2]  # a step, or a schedule


def _is_other_run(index: FileIndex, own: Indexes, known: Mapping[str, TensorEntry]) -> bool:
    step = step_of(index.path)
    if step is not None and step not in {step_of(held.path) for held in own.values()}:
        return True
    ages = [held.mtime_ns for held in own.values()]
    if min(ages) - index.mtime_ns > max(ages) - min(ages):  # a copy's files have any order, but not such a gap
        return True
    return any(entry[:2] != known[name][:2] for name, entry in index.tensors.items() if name in known)
