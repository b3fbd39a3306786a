"""Which share of a job this process is to do: as it was told, or as its launcher says."""

from __future__ import annotations

import os
from typing import Any

from ms_ckpt_ext.core.integer import integer
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError

# (rank, world) as rank tables, msrun, torchrun, Open MPI, MPICH and Intel MPI, and SLURM's srun give them; the first
# pair that is set counts. SLURM comes last, for its variables are there under every launcher that it starts.
_LAUNCHERS = (
    ("RANK_ID", "RANK_SIZE"),
    ("RANK_ID", "MS_WORKER_NUM"),
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def share_of(share: Any, argument: str) -> tuple[int, int]:
    """(i, n): share i of n, from 1. "auto" takes it from the launcher's environment; nothing means all of it.

    Raises:
        ArgumentTypeError: `argument`, as it is called, is neither that nor a pair of ints.
        UsageError: there is no such share, or the launcher's variables are no numbers.
    """
    if isinstance(share, str) and share == "auto":
        return _checked(argument, *_from_environment(argument))
    if not share:
        return 1, 1
    try:
        task, tasks = share if isinstance(share, (tuple, list)) else ()
        task, tasks = integer(task, argument), integer(tasks, argument)
    except ValueError:
        raise ArgumentTypeError(
            f"{argument} must be () or (task, tasks), two ints from 1, or 'auto'; got {share!r}"
        ) from None
    return _checked(argument, task, tasks)


def _checked(argument: str, task: int, tasks: int) -> tuple[int, int]:
    if not 1 <= task <= tasks:
        raise UsageError(f"{argument} must be (task, tasks) with 1 <= task <= tasks, got ({task}, {tasks})")
    return task, tasks


def _from_environment(argument: str) -> tuple[int, int]:
    for names in _LAUNCHERS:
        rank, world = map(os.environ.get, names)
        if rank and world:
            if not (rank.isdecimal() and world.isdecimal()):
                raise UsageError(f"{argument}='auto' needs numbers in {names[0]}={rank!r}, {names[1]}={world!r}")
            return int(rank) + 1, int(world)
    return 1, 1
