"""A callback that records what resuming from a checkpoint needs, when MindSpore saves it.

    config = CheckpointConfig(save_checkpoint_steps=1000, integrated_save=False)
    saver = ModelCheckpoint("net", f"checkpoint/rank_{get_rank()}", config)
    model.train(epochs, dataset, callbacks=[saver, ms_ckpt_ext.CheckpointRecorder()])

It follows every callback that saves (`ModelCheckpoint`, and what derives from it, as MindFormers' does), waits for
asynchronous saves without holding up the training, digests the file in a thread and leaves the notes of
`engine.resume.records` beside it. Ranks do not communicate: the files show when all are done.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.world import group_size
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.strategy import Strategy, strategy_from_layout_dict
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import FileDigests, update_manifest
from ms_ckpt_ext.engine.resume.records import Record, forget_deleted, home_of, write_record
from ms_ckpt_ext.errors import CheckpointError, DecryptionError, integer, storage_error, true_or_false
from ms_ckpt_ext.formats.registry import read_index

_LOSS_SCALES = ("scale_sense", "loss_scale")


class _Saved(NamedTuple):
    """A save that was started: its file may not be there yet."""

    path: str
    epoch: int
    step: int
    loss_scale: Optional[float]
    layouts: Mapping[str, Any]


class CheckpointRecorder(ms.train.Callback):
    """Records strategy, world and digests beside every checkpoint; list it after the callback that saves.

    Failures are logged, and the training goes on: a checkpoint without these notes can still be loaded.

    Args:
        digests: digest every tensor, which reads the file once more, from the page cache, in a thread.
        start_epoch, start_step: epoch and step of the training when this run started, e.g. what `resume` returned.

    Raises:
        ArgumentTypeError: `digests` is neither True nor False.
    """

    def __init__(self, digests: bool = True, start_epoch: int = 0, start_step: int = 0) -> None:
        super().__init__()
        self._digests = true_or_false(digests, "digests")
        self._start = (start_epoch, start_step)
        self._last: dict[int, tuple[str, int]] = {}
        self._waiting: list[_Saved] = []
        self._pool = ThreadPoolExecutor(1, "ms_ckpt_ext recorder")
        self._under_way: list[Future[None]] = []

    def on_train_step_end(self, run_context: Any) -> None:
        """Look for new saves; note those whose files are there."""
        self._look(run_context.original_args())
        self._note_finished()

    def on_train_end(self, run_context: Any) -> None:
        """Note the last save, and wait until all is noted."""
        self.on_train_step_end(run_context)
        for saved in self._waiting:
            log.error("the save of %r did not finish, so it is not recorded", saved.path)
        for under_way in self._under_way:
            under_way.result()
        self._waiting, self._under_way = [], []

    def record(
        self,
        path: str,
        network: Any,
        *,
        epoch: Optional[int] = None,
        step: Optional[int] = None,
        loss_scale: Optional[float] = None,
    ) -> bool:
        """Record a file that was saved without `Model.train`, at once; every rank does so for its own file.

        Args:
            path: the file, in a folder `rank_{N}` of the checkpoint's directory where there are several ranks.
            network: the compiled network that was saved; its `parameter_layout_dict` is recorded.
            epoch, step, loss_scale: of the training.

        Returns:
            True on the rank that came last, which makes the checkpoint complete.

        Raises:
            ArgumentTypeError: epoch or step is no integer.
            StorageError, FormatError: the file cannot be read, or the notes cannot be written.
        """
        epoch = None if epoch is None else integer(epoch, "epoch")
        step = None if step is None else integer(step, "step")
        scale = None if loss_scale is None else float(loss_scale)
        return self._note(path, network.parameter_layout_dict, epoch, step, scale)

    def _look(self, told: Any) -> None:
        for saver in told.list_callback:
            path, step = getattr(saver, "latest_ckpt_file_name", ""), getattr(saver, "_last_triggered_step", 0)
            if not path or self._last.get(id(saver)) == (path, step):
                continue
            self._last[id(saver)] = (path, step)
            step = step or told.cur_step_num
            network = told.train_network
            epoch = self._start[0] + (step - 1) // told.batch_num + 1
            scale = _loss_scale(network)
            self._waiting.append(_Saved(path, epoch, self._start[1] + step, scale, network.parameter_layout_dict))

    def _note_finished(self) -> None:
        there = [saved for saved in self._waiting if os.path.exists(saved.path)]  # renamed to this when complete
        self._waiting = [saved for saved in self._waiting if saved not in there]
        self._under_way = [job for job in self._under_way if not job.done()]
        self._under_way += [self._pool.submit(self._note_or_log, saved) for saved in there]

    def _note_or_log(self, saved: _Saved) -> None:
        try:
            self._note(saved.path, saved.layouts, saved.epoch, saved.step, saved.loss_scale)
        except (CheckpointError, OSError) as error:
            log.error("the checkpoint %r could not be recorded: %s", saved.path, error)

    def _note(
        self,
        path: str,
        layouts: Mapping[str, Any],
        epoch: Optional[int],
        step: Optional[int],
        loss_scale: Optional[float],
    ) -> bool:
        rank, world = _place()
        home = home_of(path, rank)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise storage_error("look at the saved", path, error) from error
        forget_deleted(home.folder, rank)
        if self._digests and (world == 1 or "/" in home.file):  # a manifest has one writer
            update_manifest(os.path.dirname(path), {os.path.basename(path): _digest(path, size)})
        record = Record(rank, world, home.file, size, time.time(), bool(layouts), epoch, step, loss_scale)
        complete = write_record(home, record, _stage_strategy(layouts, rank))
        if complete:
            log.info("checkpoint %r of step %s is complete: %d ranks", home.name, step, world)
        return complete


def _place() -> tuple[int, int]:
    """(rank, world) of this process."""
    try:
        return int(ms.communication.get_rank()), int(ms.communication.get_group_size())
    except RuntimeError:
        return 0, 1


def _stage_strategy(layouts: Mapping[str, Any], rank: int) -> Optional[Strategy]:
    """The layouts of this rank's pipeline stage, if it is the stage's first rank."""
    if not layouts:
        return None
    strategy = strategy_from_layout_dict(layouts, rank, group_size)
    return strategy if rank % strategy.devices_per_stage == 0 else None


def _loss_scale(network: Any) -> Optional[float]:
    scales = [p for p in network.get_parameters() if p.name.rsplit(".", 1)[-1] in _LOSS_SCALES]
    return float(scales[0].asnumpy().reshape(-1)[0]) if scales else None


def _digest(path: str, size: int) -> FileDigests:
    try:
        return digest_file(read_index(path))
    except DecryptionError:  # encrypted: authenticated by itself
        return FileDigests(size, {})
