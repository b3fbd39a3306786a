"""The output files of a merge: every parameter whole, spread over parts of similar size.

Training scalars and whatever else lies outside the strategy go along whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from heapq import heapreplace
from typing import TYPE_CHECKING, Optional

from ms_ckpt_ext.core.planning.pieces import SourceTensor
from ms_ckpt_ext.engine.files.job import Job, output_of
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.sharded import tell_accumulated
from ms_ckpt_ext.errors import UsageError, integer
from ms_ckpt_ext.formats import registry
from ms_ckpt_ext.formats.discovery import rank_folders
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.table import FORMATS, SAFETENSORS

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.files.encrypted_sink import Seal

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
        format: str = SAFETENSORS.name,
        crc: bool = False,
        seal: Optional[Seal] = None,
        digests: bool = True,
    ) -> None:
        self.task, self.tasks, self.naming = task, tasks, naming
        self.format, self.crc, self.seal, self.digests = format, crc, seal, digests
        if self.naming == "huggingface" and not FORMATS[format].hub:
            raise UsageError("naming='huggingface' is for safetensors files; write these, or leave out naming")
        if self.naming not in ("mindspore", "huggingface"):
            raise UsageError(f"naming must be 'mindspore' or 'huggingface', got {self.naming!r}")
        self.part_bytes = integer(part_bytes, "part_bytes", kind="an int, a number of bytes such as 5 << 30")
        if self.part_bytes < 1:
            raise UsageError(f"part_bytes must be at least 1 byte, got {self.part_bytes}")


def merge_job(catalog: Catalog, target: str, options: MergeOptions) -> Job:
    """Every parameter whole, in parts.

    Raises:
        UsageError: there is no parameter; or the target holds another's model.
        CoverageError: a pipeline stage has no file, or a parameter is not where a map says.
        LayoutMismatchError: what lies outside the strategy differs by rank.
    """
    catalog = _whole(catalog)
    named = catalog.tensors
    sizes = {name: _nbytes(tensor) for name, tensor in named.items()}
    groups = [names for group in _groups(sizes, options) for names in _listable(group, named, options.format)]
    # transformers opens files of "pt", "tf", "flax" and "mlx" only.
    framework = "pt" if options.naming == "huggingface" else "ms"
    write = partial(output_of, catalog=catalog, crc=options.crc, seal=options.seal, framework=framework)
    parts = [
        write(_part_name(options, number, len(groups)), [(n, named[n], None) for n in group])
        for number, group in enumerate(groups)
    ]
    weight_map = {name: part.name for part in parts for name in sorted(w.name for w in part.wanted)}
    spread = _shares([part.layout.size for part in parts], options.tasks)
    shares = [[parts[number] for number in sorted(numbers)] for numbers in spread]
    if catalog.extras:
        whole = [(name, tensor, None) for name, tensor in catalog.extras.items()]
        shares[0].append(write(f"{rank_folders.HYPER_STEM}.{options.format}", whole))
    tasks = {f"task-{task}-of-{options.tasks}": tuple(share) for task, share in enumerate(shares, 1)}
    mine = f"task-{options.task}-of-{options.tasks}"
    index_name = rank_folders.INDEX_NAMES[options.naming]
    written = {index_name, *(output.name for share in shares for output in share)}
    return Job(
        catalog,
        tasks.pop(mine),
        tasks,
        {index_name: _index(sum(sizes.values()), weight_map)},
        lambda: [name for name in _older(target, options.naming) if name not in written],
        mine,
        options.seal,
        options.digests,
    )


def _whole(catalog: Catalog) -> Catalog:
    """What a merge writes: there must be something, all of it, and one copy of what lies outside the strategy."""
    catalog.require(catalog.absent)
    if catalog.outside:
        from ms_ckpt_ext.engine.unlisted.proven import merged

        catalog = merged(catalog)
    tell_accumulated(catalog.files)
    if not catalog.tensors:
        raise UsageError("choice_func dropped every parameter; nothing would be written")
    return catalog


def _groups(sizes: Mapping[str, int], options: MergeOptions) -> list[list[str]]:
    """The names of every part, by the size that parts should have."""
    count = max(math.ceil(sum(sizes.values()) / options.part_bytes), options.tasks, 1)
    count = min(count, len(sizes))
    limited = options.naming == "huggingface"
    return _limited(sizes, count, options.part_bytes) if limited else _balanced(sizes, count)


def _index(total: int, weight_map: Mapping[str, str]) -> bytes:
    """As `json.dumps` with `indent=4`, which takes ten times as long, for it is written in Python."""
    listed = json.JSONEncoder(separators=(",\n        ", ": ")).encode(weight_map)[1:-1]
    head = f'{{\n    "metadata": {{\n        "total_size": {total}\n    }},\n    "weight_map": {{\n        '
    return f"{head}{listed}\n    }}\n}}".encode()


def _older(target: str, naming: str) -> list[str]:
    """`overwrite.of_merge`, which is imported when there is anything in the target."""
    if _is_empty(target):
        return []
    from ms_ckpt_ext.engine.files.overwrite import of_merge

    return of_merge(target, naming)


def _is_empty(folder: str) -> bool:
    """Whether a folder holds nothing that shows, or is not there."""
    try:
        return all(name.startswith(".") for name in os.listdir(folder))
    except OSError as error:
        return isinstance(error, FileNotFoundError)


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


def _listable(group: Sequence[str], named: Mapping[str, SourceTensor], form: str) -> list[list[str]]:
    """The names of a part, in as many parts as it takes until the header of each can list its own."""
    specs = [TensorSpec(name, named[name].meta.dtype, named[name].meta.shape) for name in group]
    return [[spec.name for spec in part] for part in registry.in_files(specs, FORMATS[form])]


def _shares(sizes: Sequence[int], tasks: int) -> list[set[int]]:
    """Spread numbered parts over tasks by bytes."""
    shares = _balanced({str(number): size for number, size in enumerate(sizes)}, tasks)
    return [{int(number) for number in share} for share in shares]


def _part_name(options: MergeOptions, number: int, count: int) -> str:
    if options.naming == "mindspore":
        return f"part{number}.{options.format}"
    return f"model-{number + 1:05d}-of-{count:05d}.{options.format}"
