"""The dry run of a load: what every rank would read, send, receive and hold, and how long that takes on a machine."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from typing import Any, Optional, Union

from ms_ckpt_ext.api.arguments import PathLike, any_mode, as_strategy, checked_naming, checked_words, path_of
from ms_ckpt_ext.api.dry_run.page import write_page
from ms_ckpt_ext.api.dry_run.report import PlanReport, report_of
from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DTYPES
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX
from ms_ckpt_ext.core.planning.pieces import TensorMeta
from ms_ckpt_ext.engine.load import estimate, profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.engine.source.renaming import Choice
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError
from ms_ckpt_ext.storage.reader import read_json

Shapes = Mapping[str, Mapping[str, Any]]


def plan(
    src: Optional[PathLike],
    dst_strategy: Any,
    *,
    src_strategy: Any = None,
    shapes: Union[PathLike, Shapes, None] = None,
    hardware: Optional[Iterable[str]] = None,
    mode: str = "auto",
    bucket_bytes: Optional[int] = None,
    prefetch: int = 1,
    html: Optional[PathLike] = None,
    file_suffix: Optional[str] = None,
    format: Optional[str] = None,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    dec_key: Any = None,
    dec_mode: Optional[str] = None,
    groups: bool = True,
    transfer: bool = False,
    other_ranks: bool = False,
) -> PlanReport:
    """Plan a load of every rank of a job without carrying it out; needs neither NPU nor MindSpore.

    Reads headers, and samples of what the strategy of the job that saved does not list: of what differs by rank, each
    rank takes its own, or it is an error, as in the load.

    The plan is the one that the job's ranks would make, so bytes, messages, rounds and memory are exact; times are
    those of a small model of the machine (`core.exchange.cost`).

    Args:
        src: the checkpoint's directory; None with `shapes`.
        dst_strategy: layouts of the job that loads, in any form that `load_distributed_checkpoint` takes; None for one
            device.
        src_strategy: layouts of the job that saved; None for a merged checkpoint.
        shapes: instead of a checkpoint, its parameters: `{name: {"dtype": "F32", "shape": [..]}}` with full shapes, or
            a JSON file of that.
        hardware: names of profiles or paths of profile files, see `engine.load.profiles`; None for all included ones.
            The first says how ranks lie on servers, and what a round may hold; with None, MS_CKPT_EXT_HARDWARE or an
            Atlas 800T A2 does.
        mode: what the job will ask for; only noted in the report, which has both modes.
        bucket_bytes, prefetch: as in the job; the default bucket is the one that the first machine would choose.
        html: write a page there as well.
        groups: the job has a group of every set of replicas, as MindSpore makes them for a training network when it
            compiles it; False for a job that has none, whose replicas are each sent a copy.
        file_suffix: which file of a rank folder; None for the newest.
        format: "safetensors" or "ckpt", where both lie in the rank folders.
        choice_func, name_map: as the load will have them; not with `shapes`, which have the names that are loaded.
        transfer: plan a transfer from the Parameters of a job under `src_strategy` to those of one under
            `dst_strategy`, see `ms_ckpt_ext.transfer`; with `shapes`.
        other_ranks: for a transfer: the target's ranks follow the source's; by default rank i is the same in both.
        dec_key, dec_mode: of encrypted files, as in `inspect`; their headers are encrypted too.

    Returns:
        Bytes, reads, messages and rounds of each rank and of all, staging memory in bytes, and for every machine the
        predicted seconds of both modes.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or a file of shapes that is not one.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: as for the load.
        StorageError: a file cannot be read, or the page not written.
    """
    checked_words(plan, locals())
    if transfer and (shapes is None or src is not None):
        raise UsageError("a transfer has no checkpoint: give shapes, and the strategies of both sides")
    if other_ranks and not transfer:
        raise UsageError("other_ranks is for transfer=True: the ranks of a load have no others")
    options = LoadOptions(mode=mode, bucket_bytes=bucket_bytes, prefetch=prefetch)
    machines = [profiles.profile(name) for name in (profiles.names() if hardware is None else hardware)]
    saved = as_strategy(src_strategy, argument="src_strategy")
    target = as_strategy(dst_strategy, argument="dst_strategy")
    naming = checked_naming(choice_func, name_map)
    if shapes is not None:
        if naming is not None:
            raise UsageError("choice_func and name_map are for a checkpoint: give shapes by the names that are loaded")
        source = estimate.of_shapes(_metas(shapes), saved)
        origin = (
            f"{_told(shapes, 'shapes')} cut by {_told(src_strategy, 'a strategy')}"
            if saved
            else _told(shapes, "shapes")
        )
    else:
        directory, access = path_of(src, "src"), any_mode(dec_key, dec_mode)
        held = open_catalog(directory, saved, file_suffix, access=access, kind=format).called(naming)
        source = estimate.of_catalog(held, target)
        origin = directory
    first = machines[0] if hardware is not None and machines else profiles.chosen("", on_device=True)
    kept = None
    if transfer:
        from ms_ckpt_ext.engine.transfer.estimate import dry_transfer

        done, kept = dry_transfer(source, saved, target, options, first.hardware, other_ranks)
    else:
        ways = estimate.ways_of(target.world if target else 1, first.hardware)
        done = estimate.dry_run(source, target, options, first.hardware, ways._replace(groups=groups and ways.groups))
    told = _told(dst_strategy, "a strategy") if target else "one device"
    report = report_of(done, source, machines, mode, origin, told, kept)
    if html is not None:
        write_page(path_of(html, "html"), report, done)
    return report


def _told(value: Any, otherwise: str) -> str:
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else otherwise


def _metas(shapes: Union[PathLike, Shapes]) -> list[TensorMeta]:
    where = "shapes"
    if isinstance(shapes, (str, os.PathLike)):
        path = os.fspath(shapes)
        where = f"{path!r}"
        shapes = read_json(path, "shapes")
    if not isinstance(shapes, Mapping):
        raise ArgumentTypeError(f'{where} must map names to {{"dtype": "F32", "shape": [..]}}, got {shapes!r:.60}')
    metas = [_meta(name, entry, where) for name, entry in shapes.items()]
    kept = [meta for meta in metas if not meta.name.startswith(ACCUMULATED_GRADIENT_PREFIX)]
    if not kept:
        raise UsageError(f"{where} lists no parameters")
    return kept


def _is_extent(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and bool(value >= 0)


def _meta(name: str, entry: Any, where: str) -> TensorMeta:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, Mapping) else (None, None)
    known = DTYPES.get(str(dtype)) or BY_MINDSPORE.get(str(dtype))
    if known is None or not isinstance(shape, (list, tuple)) or not all(map(_is_extent, shape)):
        raise UsageError(
            f'{where}: parameter {name!r} must be like {{"dtype": "F32", "shape": [4096, 1024]}}, got {entry!r:.80}; '
            f"dtypes are {', '.join(list(DTYPES)[:4])}, … as in safetensors, or MindSpore's names"
        )
    return TensorMeta(name, known, tuple(map(operator.index, shape)))
