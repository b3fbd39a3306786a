"""Functions of MindSpore under all their names: put others in their place, and restore them.

A function is one object that many modules refer to: `mindspore.X`, `mindspore.parallel.X`, the module that defines it,
and whatever imported it by name. All of them are found by identity among the loaded modules, so nothing that merely
has the same name is touched. What is imported later finds the new function where the old one was. Some functions exist
twice: `mindspore.train` keeps wrappers of those that moved to `mindspore.parallel`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, Callable

from ms_ckpt_ext.bridge.world import mindspore

Function = Callable[..., Any]
_PACKAGES = (mindspore, mindspore.parallel, mindspore.train)
LOCK = threading.RLock()
"""Held while names change."""


def stock_functions(names: Iterable[str]) -> dict[str, tuple[Function, ...]]:
    """MindSpore's own functions of each name as they stand now; what this release does not have is left out."""
    found = {name: dict.fromkeys(getattr(p, name) for p in _PACKAGES if hasattr(p, name)) for name in names}
    return {name: tuple(functions) for name, functions in found.items() if functions}


def replace(pairs: Mapping[Function, Function], everywhere: bool) -> int:
    """Let every name of a key refer to its value; returns how many names changed.

    Args:
        pairs: present functions -> what to put in their place.
        everywhere: in all loaded modules; else in those of MindSpore only. This package's own are never touched.
    """
    wanted = {id(old): new for old, new in pairs.items()}
    count = 0
    with LOCK:
        for module in _modules(everywhere):
            for name, value in list(vars(module).items()):
                if id(value) in wanted:
                    setattr(module, name, wanted[id(value)])
                    count += 1
    return count


def _modules(everywhere: bool) -> list[ModuleType]:
    loaded = [(name.partition(".")[0], module) for name, module in list(sys.modules.items())]
    return [
        module
        for top, module in loaded
        if isinstance(module, ModuleType) and (top == "mindspore" or (everywhere and top != "ms_ckpt_ext"))
    ]
