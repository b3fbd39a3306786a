"""The output files of a re-cut: every rank's slices under another strategy, one file a rank.

Training scalars and whatever else lies outside the strategy go along whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Callable, Optional

from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.files import overwrite
from ms_ckpt_ext.engine.files.job import Job, check_apart, output_of
from ms_ckpt_ext.engine.files.order import Files, arranged
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.rank_boxes import rank_boxes
from ms_ckpt_ext.engine.unlisted.keeping import Keeping

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.files.encrypted_sink import Seal


def recut_job(
    catalog: Catalog,
    strategy: Optional[Strategy],
    ranks: Sequence[int],
    file_name: Callable[[int], str],
    target: Optional[str] = None,
    *,
    files: Callable[[int], Files] = lambda _: (),
    every_rank: bool = False,
    states: bool = True,
    alone: bool = False,
    crc: bool = False,
    seal: Optional[Seal] = None,
    digests: bool = True,
) -> Job:
    """The slices of `ranks` under `strategy` (None: one device), one file per rank.

    What the source has and the strategy does not list is kept, see `engine.unlisted.keeping`.

    Args:
        file_name: rank -> file, relative to the target directory.
        target: the target directory, when the job's files there are one result: what an older one left is taken away.
        files: rank -> the order of parameters in a `.ckpt`, see `engine.files.order`.
        every_rank: files of this name of ranks beyond these, too, whoever wrote them.
        states, alone: see `Keeping`.
        crc: give every file a checksum.
        seal: how the files are encrypted; None when they are not.
        digests: write a manifest of digests beside them.

    Raises:
        LayoutMismatchError: a parameter cannot be cut as the strategy says, or not be kept, see
            `engine.unlisted.keeping`.
        UsageError: no parameter of the strategy is in the checkpoint, or none at all.
        CoverageError: one of the ranks wants parameters of a pipeline stage that has no file.
    """
    catalog.require_any()
    for rank in ranks:
        catalog.require(catalog.absent if strategy is None else strategy.names_of(rank))
    keeping = Keeping(catalog, strategy, states, alone)
    catalog = keeping.catalog
    outputs = []
    for rank in ranks:
        wanted = arranged(catalog, rank_boxes(catalog, strategy, rank), keeping.of(rank), files(rank))
        outputs.append(output_of(file_name(rank), wanted, catalog, crc, seal))
    job = partial(Job, catalog, tuple(outputs), seal=seal, digests=digests)
    if target is None:
        return job()
    names = [output.name for output in outputs]
    stale = partial(overwrite.of_recut, target, names, file_name, every_rank)
    return job(replaces=stale, shuns=[each for name in names for each in overwrite.in_any_format(name)])


def folders_job(
    catalog: Catalog,
    strategy: Optional[Strategy],
    ranks: Sequence[int],
    alone: bool,
    target: str,
    form: str,
    *,
    crc: bool = False,
    seal: Optional[Seal] = None,
    digests: bool = True,
) -> tuple[Job, str]:
    """`rank_N/net.{form}` below `target` for every one of `ranks`; and the directory that the job is to be run in.

    With `alone`, `ranks` is a single one, which gets a target of its own, so that the ranks of a job can do this at the
    same time. The other arguments are those of `recut_job`. Raises as `recut_job` and `check_apart`.
    """
    recut = partial(recut_job, catalog, strategy, ranks, states=False, alone=alone, crc=crc, seal=seal, digests=digests)
    if alone:
        target = os.path.join(target, f"rank_{ranks[0]}")
        job = recut(lambda _: f"net.{form}", target)
    else:
        job = recut(lambda rank: f"rank_{rank}/net.{form}", target, every_rank=True)
    check_apart(job, target)
    return job, target
