"""Replaces MindFormers' loading functions by this package's: by identity, under all their names.

    install(Options())     from here on MindFormers loads through this package
    uninstall()            from here on it loads by itself again

Both of its ways are covered: the new one (`use_legacy_format: False`: `load_checkpoint`, `load_hf_checkpoint`) and the
legacy one, whose merge by rank 0 gives way to a load from the rank folders (`legacy`), and whose whole files go
straight into the Parameters (`single`).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge import names
from ms_ckpt_ext.bridge.mindformers import legacy, loader, single
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.bridge.names import Function
from ms_ckpt_ext.errors import MissingDependencyError

_HOMES: tuple[tuple[str, str, Function], ...] = (
    ("mindformers.checkpoint.checkpoint", "load_checkpoint", loader.load_checkpoint),
    ("mindformers.checkpoint.checkpoint", "load_hf_checkpoint", loader.load_hf_checkpoint),
    ("mindformers.utils.load_checkpoint_utils", "load_safetensors_checkpoint", single.load_safetensors_checkpoint),
    ("mindformers.trainer.utils", "load_ckpt", single.load_ckpt),
)
_installed: dict[Function, Function] = {}
"""Stock -> ours; changed only under `bridge.names.LOCK`."""


def install(options: Options) -> tuple[str, ...]:
    """Let MindFormers load through this package, with these options; calling it again changes the options.

    Returns:
        Names of the functions that are served. A release of MindFormers may lack some.

    Raises:
        MissingDependencyError: MindFormers cannot be imported.
    """
    with names.LOCK:
        uninstall()
        fresh = {stock: _bound(stock, ours, options) for stock, ours in _found()}
        count = names.replace(fresh, everywhere=True)
        _installed.update(fresh)
        served = [stock.__name__ for stock in fresh] + legacy.install(options)
    log.info("ms_ckpt_ext serves MindFormers' %s (%d names replaced)", ", ".join(served), count)
    return tuple(served)


def uninstall() -> None:
    """Give MindFormers' functions their names back."""
    with names.LOCK:
        names.replace({ours: stock for stock, ours in _installed.items()}, everywhere=True)
        _installed.clear()
        legacy.uninstall()


def _found() -> Iterator[tuple[Function, Function]]:
    for home, name, ours in _HOMES:
        try:
            stock = getattr(importlib.import_module(home), name, None)
        except ImportError as error:
            raise MissingDependencyError(
                f"MindFormers cannot be imported ({error}); install it, see its docs"
            ) from error
        if stock is not None:
            yield stock, ours


def _bound(stock: Function, ours: Function, options: Options) -> Function:
    @functools.wraps(stock)
    def replaced(*args: Any, **named: Any) -> Any:
        return ours(functools.partial(stock, *args, **named), options, *args, **named)

    return replaced
