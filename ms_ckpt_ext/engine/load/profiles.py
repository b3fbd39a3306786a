"""Named hardware for the cost model: JSON files beside this module (`configs/hardware` in a checkout) or a user's own.

Every figure says where it comes from: a page, "measured", or "assumed" where nobody published one. They are orders of
magnitude: good for choosing a way and for seeing what dominates, not for promising seconds. `ms-ckpt measure` writes a
profile with measured ones.

The machine also decides how much staging memory a rank has for one round: its bucket. Every round costs a status and a
call or two, and a call is slow beyond HCCL_BUFFSIZE: so on a device a round reads, sends and receives about that much
each. Two rounds are under way, and what Parameters still take of the device comes first: a bucket is never more than an
eighth of what is left then. The device tells how much is left; where it does not, its profile and the plan do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage.reader import read_json
from ms_ckpt_ext.transport.agree import share_numbers
from ms_ckpt_ext.transport.base import Transport

HARDWARE_FOLDER = Path(__file__).resolve().parent / "hardware"
_MOST = 1e30
"""Above what any figure can be."""
CPU, ASCEND = "cpu", "atlas-800t-a2"
"""What is assumed where the Parameters are in host memory, and on an NPU that no profile names."""
HARDWARE_VARIABLE = "MS_CKPT_EXT_HARDWARE"
"""Which profile to take, where no argument says so."""
_SHARE_OF_LOAD = 24
"""A chunk is at most this fraction of a rank's fair share of the reading: readers can be balanced within 5 %."""
_LEAST = 4 << 20
"""Bytes; below, reads are short."""
_CALLS, _SHARE_OF_FREE = 3, 8
"""A bucket is as many calls' worth, and such a fraction of what is left, at most."""
_OTHERS = 8
"""The fraction of a device that driver, communicators and the like are assumed to take."""


class Profile(NamedTuple):
    """A machine.

    Attributes:
        name: how it is asked for.
        title: what it is, in words.
        hardware: its figures.
        origins: figure -> where it comes from.
        soc: beginnings of soc versions that it is for.
    """

    name: str
    title: str
    hardware: Hardware
    origins: Mapping[str, str]
    soc: tuple[str, ...] = ()


def names() -> list[str]:
    """The profiles that come with the package."""
    return sorted(path.stem for path in HARDWARE_FOLDER.glob("*.json"))


def profile(name: str) -> Profile:
    """A profile by its name, or by the path of a JSON file.

    Raises:
        UsageError: no such profile, or a file that is not one; says what is wrong.
        StorageError: the file cannot be read.
    """
    path = HARDWARE_FOLDER / f"{name}.json" if name in names() else Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(
            f"no hardware profile {name!r}: it is neither one of {', '.join(names())} nor the path of a .json file "
            f"(copy one of those in {os.fspath(HARDWARE_FOLDER)!r} to begin with)"
        )
    return _from_json(path, read_json(os.fspath(path), "hardware profile", UsageError))


def fitting(product: str, on_device: bool) -> str:
    """The name of the profile for a machine: `product` is an NPU's soc version in lower case."""
    if not on_device:
        return CPU
    socs = {soc: name for name in names() for soc in profile(name).soc}
    beginnings = [soc for soc in socs if product.startswith(soc)]
    return socs[max(beginnings, key=len)] if beginnings else ASCEND


def chosen(asked: str, product: str = "", on_device: bool = False) -> Profile:
    """The profile that an argument or MS_CKPT_EXT_HARDWARE asks for, else the one that fits. Raises as `profile`."""
    return profile(asked or os.environ.get(HARDWARE_VARIABLE) or fitting(product, on_device))


def _from_json(path: Path, content: Any) -> Profile:
    def figure(*keys: str, default: Any = None) -> Any:
        found = content
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is None and default is not None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 < found < _MOST:
            raise UsageError(
                f"hardware profile {os.fspath(path)!r}: {'.'.join(keys)} must be a number above 0, got {found!r:.60}"
            )
        return found

    def rate(name: str, default: float = math.inf) -> float:
        return float(figure(name, "bytes_per_second", default=default)) if name in content else default

    hardware = Hardware(
        storage=float(figure("storage", "bytes_per_second")),
        shared=bool(content["storage"].get("shared", False)),
        ranks_per_host=math.ceil(figure("ranks_per_host")),
        link=float(figure("link", "bytes_per_second")),
        latency=float(figure("latency", "seconds")),
        host=rate("host"),
        between=rate("between", 0.0),
        upload=rate("upload"),
        reader=rate("reader"),
        per_rank=float(figure("latency", "per_rank", default=0.0)),
        counts=float(figure("counts", "bytes_per_rank_squared", default=0.0)),
        memory=float(figure("memory", "bytes", default=0.0)),
        call=float(figure("call", "bytes", default=0.0)),
    )
    told = {key: value.get("from", "not said") for key, value in content.items() if isinstance(value, dict)}
    soc = content.get("soc", [])
    if not isinstance(soc, list) or not all(isinstance(each, str) for each in soc):
        raise UsageError(f"hardware profile {os.fspath(path)!r}: soc must be a list of texts, got {soc!r:.60}")
    return Profile(path.stem, str(content.get("title", path.stem)), hardware, told, tuple(soc))


def limits_for(demands: Sequence[Demand], world: int, bucket: int) -> ExchangeLimits:
    """Chunks of several MiB, smaller where the checkpoint is, so that every reader has several."""
    total = sum(d.tensor.meta.dtype.nbytes(math.prod(d.tensor.meta.shape)) for d in demands)
    chunk = min(ExchangeLimits().chunk, max(1024, total // (world * _SHARE_OF_LOAD)))
    return ExchangeLimits(bucket, chunk)


def bucket_for(asked: Optional[int], call_bytes: int, left: int) -> int:
    """The bucket that was asked for, or one that fits.

    Args:
        call_bytes: HCCL_BUFFSIZE; 0 where there is none.
        left: bytes of the device that the rank with the least has left; 0 where buffers are in host memory.
    """
    if asked is not None:
        return asked
    wanted = max(_CALLS * call_bytes, ExchangeLimits().bucket)
    return max(_LEAST, min(wanted, left // _SHARE_OF_FREE)) if left else ExchangeLimits().bucket


def left_on_all(transport: Transport[Any], to_come: int, demands: Sequence[Demand], hardware: Hardware) -> int:
    """Bytes that the device with the least will have left; 0 where buffers are in host memory. Collective.

    Args:
        to_come: bytes that this rank's Parameters will still take of its device.
    """
    free = transport.free_bytes()
    told = share_numbers(transport, free and max(free - to_come, 1))
    if all(told) or not transport.traits.on_device:
        return min(told)
    return left_by(demands, transport.size, hardware)


def left_by(demands: Sequence[Demand], world: int, hardware: Hardware) -> int:
    """Bytes of a device of this profile that the Parameters of the rank with the most leave; 0 where it has none."""
    if not hardware.memory:
        return 0
    wanted = np.zeros(world, np.int64)
    for demand in demands:
        meta = demand.tensor.meta
        for grid in demand.grids:
            if grid.uneven:
                for cell, ranks in grid.ranks.items():
                    wanted[list(ranks)] += meta.dtype.nbytes(grid.region(cell, meta.shape).size)
                continue
            sizes = (extent // count for extent, count in zip(meta.shape, grid.parts))
            wanted[[rank for ranks in grid.ranks.values() for rank in ranks]] += meta.dtype.nbytes(math.prod(sizes))
    usable = int(hardware.memory) * (_OTHERS - 1) // _OTHERS
    return max(usable - int(wanted.max(initial=0)), 1)
