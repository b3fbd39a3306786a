"""Named hardware for the cost model: JSON files beside this module (`configs/hardware` in a checkout) or a user's own.

Every figure says where it comes from: a page, "measured", or "assumed" where nobody published one. They are orders of
magnitude: good for choosing a way and for seeing what dominates, not for promising seconds. `ms-ckpt measure` writes a
profile with measured ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage.reader import read_json

HARDWARE_FOLDER = Path(__file__).resolve().parent / "hardware"
_MOST = 1e30
"""Above what any figure can be."""
CPU, ASCEND = "cpu", "atlas-800t-a2"
"""What is assumed where the Parameters are in host memory, and on an NPU that no profile names."""
HARDWARE_VARIABLE = "MS_CKPT_EXT_HARDWARE"
"""Which profile to take, where no argument says so."""


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
