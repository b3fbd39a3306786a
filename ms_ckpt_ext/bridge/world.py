"""This process's place among the ranks, as MindSpore knows it."""

from __future__ import annotations

from typing import Any, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import MissingDependencyError

try:
    import mindspore
    from mindspore import communication
except ImportError as error:
    raise MissingDependencyError(
        f"this call needs MindSpore, which cannot be imported ({error}); install it with "
        "`pip install 'mindspore>=2.7' 'numpy<2'`, or run an offline job, which does not need it"
    ) from error

__all__ = [
    "group_size",
    "join_job",
    "mindspore",
    "own_rank",
    "require_views_of_bytes",
    "training_strategy_file",
    "world_size",
]


def own_rank() -> int:
    """Global rank of this process; 0, with a warning, where communication was not initialised."""
    try:
        return int(communication.get_rank())
    except RuntimeError:
        log.warning("communication is not initialised: loading the slices of rank 0")
        return 0


def world_size() -> int:
    """Number of ranks of this job; 1 where communication was not initialised."""
    try:
        return int(communication.get_group_size())
    except RuntimeError:
        return 1


def require_views_of_bytes() -> None:
    """Raise MissingDependencyError where Parameters are in an NPU's memory, which this MindSpore cannot view as bytes.

    Before 2.8 `Tensor.view` takes a shape only, and no dtype.
    """
    version = mindspore.__version__
    if mindspore.get_context("device_target") != "CPU" and [int(n) for n in version.split(".")[:2]] < [2, 8]:
        raise MissingDependencyError(
            f"Parameters in an NPU's memory need MindSpore 2.8 or newer, and this is {version}, which cannot view "
            "tensors there as bytes; nothing was changed. Install a newer one, with the CANN that it asks for; or let "
            "`ms-ckpt reshard` cut a file for each rank, and load that with mindspore.load_checkpoint"
        )


def join_job(device_target: Optional[str] = None) -> None:
    """Initialise the communication of this process's job, unless that was done."""
    if mindspore.mint.distributed.is_initialized():
        return
    if device_target is not None:
        mindspore.set_device(device_target)
    if mindspore.get_context("device_target") == "Ascend":
        mindspore.mint.distributed.init_process_group()
    else:
        mindspore.communication.init()


def group_size(name: str) -> int:
    """Number of ranks of a communication group."""
    return int(communication.get_group_size(name))


def training_strategy_file(network: Any) -> Optional[str]:
    """Path of the training strategy by what the job says: `AutoParallel`, else the context; None when neither does."""
    if isinstance(network, mindspore.nn.Cell):
        for _, cell in network.cells_and_names():
            if type(cell).__name__ == "AutoParallel":
                return getattr(cell, "_save_strategy_file_path", None) or None
    return mindspore.context.get_auto_parallel_context("strategy_ckpt_load_file") or None
