"""What the offline jobs want: the output files of a merge, and of a re-cut.

A merge writes every parameter whole, spread over parts of similar size; a re-cut writes every rank's slices under
another strategy. Training scalars and whatever else lies outside the strategy go along whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from heapq import heapreplace
from typing import Callable, Optional

from ms_ckpt_ext.core.geometry.region import Region
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.integer import integer
from ms_ckpt_ext.core.planning.pieces import SourceTensor, whole_box
from ms_ckpt_ext.engine.files import older
from ms_ckpt_ext.engine.files.apart import check_apart
from ms_ckpt_ext.engine.files.encrypted_sink import Seal
from ms_ckpt_ext.engine.files.job import Job, Output, Wanted
from ms_ckpt_ext.engine.files.order import Files, arranged
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.keeping import Box, Keeping, slice_of
from ms_ckpt_ext.engine.unlisted.proven import merged, refuse_own
from ms_ckpt_ext.errors import LayoutMismatchError, UsageError
from ms_ckpt_ext.formats import registry, safetensors
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.index import FileLayout, TensorSpec

PART_BYTES = 3 << 30
"""MindSpore's size of a part of a merged checkpoint."""


class MergeOptions:
    """How a merge is to be written.

    Attributes:
        task, tasks: this call writes share `task` (from 1) of `tasks`.
        naming: "mindspore" (`part0.safetensors`, `param_name_map.json`, `hyper_param.safetensors`) or "huggingface"
            (`model-00001-of-00002.safetensors`, `model.safetensors.index.json`).
        part_bytes: aim for parts of at most this many bytes; with the names of Hugging Face, where it is a limit, only
            a single larger parameter exceeds it.
        format: "safetensors" or "ckpt".
        crc: give every file a checksum; files in MindSpore's encrypted blocks have one in any case.
        seal: how the files are encrypted; None when they are not. The index names parameters and is not encrypted.
        digests: write a manifest of digests beside them.
    """

    def __init__(
        self,
        task: int = 1,
        tasks: int = 1,
        naming: str = "mindspore",
        part_bytes: int = PART_BYTES,
        format: str = "safetensors",
        crc: bool = False,
        seal: Optional[Seal] = None,
        digests: bool = True,
    ) -> None:
        self.task, self.tasks, self.naming = task, tasks, naming
        self.format, self.crc, self.seal, self.digests = format, crc, seal, digests
        if self.format not in rank_folders.FORMATS:
            raise UsageError(f"output_format must be one of {', '.join(rank_folders.FORMATS)}; got {self.format!r}")
        if (self.naming, self.format) == ("huggingface", "ckpt"):
            raise UsageError("naming='huggingface' is for safetensors files; leave out output_format='ckpt', or naming")
        if self.naming not in ("mindspore", "huggingface"):
            raise UsageError(f"naming must be 'mindspore' or 'huggingface', got {self.naming!r}")
        self.part_bytes = integer(part_bytes, "part_bytes", kind="an int, a number of bytes such as 5 << 30")
        if self.part_bytes < 1:
            raise UsageError(f"the size limit of a part must be at least 1 byte, got {self.part_bytes}")
        if not 1 <= self.task <= self.tasks:
            raise UsageError(
                f"split_dst_file must be (task, tasks) with 1 <= task <= tasks, got ({self.task}, {self.tasks})"
            )


def merge_job(catalog: Catalog, target: str, options: MergeOptions) -> Job:
    """Every parameter whole, in parts.

    Raises:
        UsageError: there is no parameter; or the target holds another's model.
        CoverageError: a pipeline stage has no file, or a parameter is not where a map says.
        LayoutMismatchError: what lies outside the strategy differs by rank.
    """
    catalog.require(catalog.absent)
    catalog = merged(catalog)
    named = catalog.tensors
    if not named:
        raise UsageError("choice_func dropped every parameter; nothing would be written")
    sizes = {name: _nbytes(tensor) for name, tensor in named.items()}
    count = max(math.ceil(sum(sizes.values()) / options.part_bytes), options.tasks, 1)
    count = min(count, len(sizes))
    limited = options.naming == "huggingface"
    groups = _limited(sizes, count, options.part_bytes) if limited else _balanced(sizes, count)
    if options.format == "safetensors":
        groups = [names for group in groups for names in _listable(group, named)]
    # transformers opens files of "pt", "tf", "flax" and "mlx" only.
    framework = "pt" if options.naming == "huggingface" else "ms"
    lay_out = partial(_output, catalog=catalog, crc=options.crc, seal=options.seal, framework=framework)
    parts = [
        lay_out(_part_name(options, number, len(groups)), [(n, named[n], None) for n in group])
        for number, group in enumerate(groups)
    ]
    weight_map = {name: part.name for part in parts for name in sorted(w.name for w in part.wanted)}
    spread = _shares([part.layout.size for part in parts], options.tasks)
    shares = [[parts[number] for number in sorted(numbers)] for numbers in spread]
    if catalog.extras:
        whole = [(name, tensor, None) for name, tensor in catalog.extras.items()]
        shares[0].append(lay_out(f"{rank_folders.HYPER_STEM}.{options.format}", whole))
    tasks = {f"task-{task}-of-{options.tasks}": tuple(share) for task, share in enumerate(shares, 1)}
    mine = f"task-{options.task}-of-{options.tasks}"
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    index_name = older.INDEXES[options.naming]
    written = {index_name, *(output.name for share in shares for output in share)}
    return Job(
        catalog,
        tasks.pop(mine),
        tasks,
        {index_name: json.dumps(index, indent=4).encode()},
        lambda: [name for name in older.of_merge(target, options.naming) if name not in written],
        mine,
        options.seal,
        options.digests,
    )


def refuse_empty(catalog: Catalog) -> None:
    """Raise UsageError for a checkpoint without parameters, CoverageError when it is known where they should be."""
    if not catalog.tensors:
        catalog.require(catalog.absent)
        files = ", ".join(repr(index.path) for index in catalog.files[:3])
        raise UsageError(f"the checkpoint holds no parameters ({files}), so there is nothing to write; check the path")


def _nbytes(tensor: SourceTensor) -> int:
    return tensor.meta.dtype.nbytes(math.prod(tensor.meta.shape))


def _balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Spread names over `count` groups, largest first, each to the group with the least so far."""
    groups: list[list[str]] = [[] for _ in range(count)]
    totals = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        total, least = totals[0]
        groups[least].append(name)
        heapreplace(totals, (total + sizes[name], least))
    return groups


def _limited(sizes: Mapping[str, int], count: int, most: int) -> list[list[str]]:
    """`_balanced` over as few groups as it takes, from `count` on, until only a single larger name exceeds `most`.

    One group more never makes the largest larger, nor the second largest, and so on: what fits some groups fits more,
    so their number is found in growing strides and then by halving. As many groups as names fit for sure.
    """

    def exceeds(group: Sequence[str]) -> bool:
        return len(group) > 1 and sum(sizes[name] for name in group) > most

    low = high = count
    groups = _balanced(sizes, high)
    while any(map(exceeds, groups)):
        low, high = high + 1, min(2 * high - count + 1, len(sizes))
        groups = _balanced(sizes, high)
    while low < high:
        middle = (low + high) // 2
        fewer = _balanced(sizes, middle)
        if any(map(exceeds, fewer)):
            low = middle + 1
        else:
            high, groups = middle, fewer
    return groups


def _listable(group: Sequence[str], named: Mapping[str, SourceTensor]) -> list[list[str]]:
    """The names of a part, in as many parts as it takes until the header of each can list its own."""
    specs = [TensorSpec(name, named[name].meta.dtype, named[name].meta.shape) for name in group]
    return [[spec.name for spec in part] for part in safetensors.in_headers(specs)]


def _shares(sizes: Sequence[int], tasks: int) -> list[set[int]]:
    """Spread numbered parts over tasks by bytes."""
    shares = _balanced({str(number): size for number, size in enumerate(sizes)}, tasks)
    return [{int(number) for number in share} for share in shares]


def _part_name(options: MergeOptions, number: int, count: int) -> str:
    if options.naming == "mindspore":
        return f"part{number}.{options.format}"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _output(
    name: str,
    wanted: Iterable[tuple[str, SourceTensor, Optional[Region]]],
    catalog: Catalog,
    crc: bool = False,
    seal: Optional[Seal] = None,
    framework: str = "ms",
) -> Output:
    """Lay out one file.

    Args:
        wanted: name, parameter and box of it; None for the whole parameter.
        seal: may ask for a checksum by itself.
        framework: what the header says of it.
    """
    crc = crc or (seal is not None and seal.needs_crc(name))
    boxes = [(new, tensor, box or whole_box(tensor)) for new, tensor, box in wanted]
    specs = [TensorSpec(new, tensor.meta.dtype, box.shape if box else tensor.meta.shape) for new, tensor, box in boxes]
    notes = {new: catalog.notes[t.stored_name] for new, t, _ in boxes if t.stored_name in catalog.notes}
    layout: FileLayout = registry.lay_out(name, specs, {"format": framework, **notes}, crc)
    return Output(name, layout, tuple(Wanted(*box) for box in boxes), lambda: layout.tensors)


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
    refuse_empty(catalog)
    for rank in ranks:
        catalog.require(catalog.absent if strategy is None else strategy.names_of(rank))
    keeping = Keeping(catalog, strategy, states, alone)
    catalog = keeping.catalog
    outputs = []
    for rank in ranks:
        wanted = arranged(catalog, rank_boxes(catalog, strategy, rank), keeping.of(rank), files(rank))
        outputs.append(_output(file_name(rank), wanted, catalog, crc, seal))
    job = partial(Job, catalog, tuple(outputs), seal=seal, digests=digests)
    if target is None:
        return job()
    names = [output.name for output in outputs]
    stale = partial(older.of_recut, target, names, file_name, every_rank)
    return job(replaces=stale, shuns=[each for name in names for each in older.in_any_format(name)])


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
    check_apart(catalog, target, job)
    return job, target


def rank_boxes(catalog: Catalog, strategy: Optional[Strategy], rank: int) -> list[Box]:
    """All that `strategy` gives a rank, as far as the checkpoint has it.

    Raises:
        LayoutMismatchError, UsageError: as `recut_job`.
    """
    found = listed_boxes(catalog, strategy, rank)
    if strategy is not None and not found:
        raise nothing_listed(strategy, rank)
    return found


def nothing_listed(strategy: Strategy, rank: int) -> UsageError:
    """The error of a strategy that has nothing in common with a checkpoint."""
    return UsageError(
        f"{strategy.origin} gives rank {rank} no parameter that the checkpoint holds; "
        "check that strategy and checkpoint belong to the same model, and name_map if you use one"
    )


def listed_boxes(catalog: Catalog, strategy: Optional[Strategy], rank: int) -> list[Box]:
    """`rank_boxes`, where that may be nothing."""
    if strategy is None:
        return [Box(name, tensor, whole_box(tensor)) for name, tensor in catalog.tensors.items()]
    found = []
    names = strategy.names_of(rank)
    refuse_own(catalog, names, f"it cannot be cut as {strategy.origin} says")
    for name in names:
        tensor = catalog.tensors.get(name) or catalog.extras.get(name)
        if tensor is not None and not name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            found.append(box_under(strategy, rank, name, tensor))
    return found


def box_under(strategy: Strategy, rank: int, name: str, tensor: SourceTensor) -> Box:
    """What a rank has of a parameter by the layout of a name. Raises LayoutMismatchError: it cannot be cut so."""
    layout = strategy.layout(name, rank)
    assert layout is not None  # the strategy gives the rank this name
    try:
        return slice_of(name, tensor, layout, rank % strategy.devices_per_stage)
    except LayoutMismatchError as error:
        raise LayoutMismatchError(f"parameter {name!r} under {strategy.origin}: {error}") from error
