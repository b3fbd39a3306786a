"""This package's functions under MindSpore's own names: after one call, unchanged code uses them.

    import ms_ckpt_ext
    ms_ckpt_ext.install()       # from here on mindspore.load_distributed_checkpoint(...) is ours

A call that this package cannot serve goes to the stock function, with a warning that names function and argument. While
a stock function runs, for that reason or because it was left stock, everything it calls is stock too, so any subset of
functions can be replaced. Functions that were handed out stay valid after `uninstall()`: they then pass every call on
to stock.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from typing import Any, Callable, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import checked_words
from ms_ckpt_ext.errors import UnsupportedError, UsageError

_Function = Callable[..., Any]
STOCK_VARIABLE = "MS_CKPT_EXT_STOCK"
"""Names of functions that stay stock, separated by commas, or "all"."""

_HOMES = {
    "unified_safetensors": "api.mindspore.merge",
    "merge_pipeline_strategys": "api.mindspore.merge",
    "load_distributed_checkpoint": "api.mindspore.load",
    "transform_checkpoints": "api.mindspore.transform",
    "transform_checkpoint_by_rank": "api.mindspore.transform",
    "rank_list_for_transform": "api.mindspore.transform",
    "convert_checkpoints": "api.mindspore.transform",
    "convert_checkpoint_by_rank": "api.mindspore.transform",
    "rank_list_for_convert": "api.mindspore.transform",
    "ckpt_to_safetensors": "api.convert",
    "safetensors_to_ckpt": "api.convert",
    "load_segmented_checkpoints": "api.mindspore.parameters",
    "load_checkpoint": "api.mindspore.parameters",
    "load_checkpoint_async": "api.mindspore.background",
    "build_searched_strategy": "api.mindspore.family",
    "merge_sliced_parameter": "api.mindspore.family",
    "restore_group_info_list": "api.mindspore.family",
    "get_ckpt_path_with_strategy": "api.mindspore.family",
}
NAMES = tuple(_HOMES)
"""What `install` can replace."""

_STOCK_CODE = ("mindspore.parallel.", "mindspore.train.serialization", "mindspore.safeguard.")
"""Modules of MindSpore whose functions call those that `install` replaces, and then expect the stock ones."""

_installed: dict[str, dict[_Function, _Function]] = {}
"""Name -> stock function -> what replaces it; changed only under `bridge.names.LOCK`."""


def install(
    only: Optional[Iterable[str]] = None, skip: Iterable[str] = (), *, everywhere: bool = True
) -> tuple[str, ...]:
    """Replace MindSpore's checkpoint functions by this package's, under all their names. See `NAMES`.

    After the call exactly the chosen functions are replaced, whichever were before; calling it again changes nothing.

    Args:
        only: names of the functions to replace; None for all.
        skip: names that stay stock, or become so again. MS_CKPT_EXT_STOCK names more of them ("all" for every one).
        everywhere: also in modules outside MindSpore that imported a function by name before.

    Returns:
        Names of the functions that are replaced now. A release of MindSpore may lack some.

    Raises:
        UsageError: a name that is not one of `NAMES`.
        MissingDependencyError: MindSpore cannot be imported.
    """
    checked_words(install, locals())
    from ms_ckpt_ext.bridge import names

    asked = {*_checked(NAMES if only is None else only, "only")} - {*_checked(skip, "skip"), *_from_environment()}
    chosen = [name for name in NAMES if name in asked]
    with names.LOCK:
        uninstall([name for name in _installed if name not in chosen])
        fresh = names.stock_functions(name for name in chosen if name not in _installed)
        for name, functions in fresh.items():
            _installed[name] = {stock: _replacement(name, stock) for stock in functions}
        count = names.replace({k: v for name in fresh for k, v in _installed[name].items()}, everywhere)
        now = tuple(name for name in NAMES if name in _installed)
    if fresh:
        log.info("ms_ckpt_ext serves %s (%d names replaced)", ", ".join(f"mindspore.{n}" for n in fresh), count)
    return now


def uninstall(only: Optional[Iterable[str]] = None) -> None:
    """Give MindSpore's functions their names back.

    Args:
        only: names of functions; None for all that are replaced.

    Raises:
        UsageError: a name that is not one of `NAMES`.
    """
    wanted = NAMES if only is None else _checked(only, "only")
    if not _installed:
        return
    from ms_ckpt_ext.bridge import names

    with names.LOCK:
        gone = {name: _installed.pop(name) for name in wanted if name in _installed}
        pairs = (pair for held in gone.values() for pair in held.items())
        names.replace({ours: stock for stock, ours in pairs}, everywhere=True)
    if gone:
        log.info("MindSpore's own %s again", ", ".join(gone))


def _checked(names: Iterable[str], argument: str) -> list[str]:
    listed = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in listed if name not in _HOMES]
    if unknown:
        raise UsageError(f"{argument}: {unknown} cannot be replaced; known are {', '.join(NAMES)}")
    return listed


def _from_environment() -> list[str]:
    text = os.environ.get(STOCK_VARIABLE, "")
    listed = [name.strip() for name in text.split(",") if name.strip()]
    return list(NAMES) if listed == ["all"] else _checked(listed, STOCK_VARIABLE)


def _replacement(name: str, stock: _Function) -> _Function:
    ours: _Function = getattr(importlib.import_module(f"ms_ckpt_ext.{_HOMES[name]}"), name)
    takes = inspect.signature(ours)

    @functools.wraps(ours)
    def replaced(*args: Any, **named: Any) -> Any:
        if name not in _installed or _within_stock():
            return stock(*args, **named)
        stranger = _stranger(takes, stock, args, named)
        try:
            if stranger is None:
                return ours(*args, **named)
        except UnsupportedError as refusal:
            stranger = refusal.argument
        log.warning(
            "mindspore.%s: ms_ckpt_ext does not take %s as given; stock MindSpore serves this call", name, stranger
        )
        return _call_stock(stock, args, named)

    # Where pickle looks for a function that goes to another process.
    replaced.__module__, replaced.__qualname__ = stock.__module__, stock.__qualname__
    return replaced


def _within_stock() -> bool:
    """Whether the caller of a replacement works for a stock function, in this thread."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _call_stock.__code__ or frame.f_globals.get("__name__", "").startswith(_STOCK_CODE):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _stranger(
    takes: inspect.Signature, stock: _Function, args: tuple[Any, ...], named: dict[str, Any]
) -> Optional[str]:
    """The first argument that stock has and ours lacks, as in a release of MindSpore newer than this package."""
    try:
        given = inspect.signature(stock).bind(*args, **named).arguments
    except TypeError:
        return None  # wrong for stock too, or with an argument that is ours alone: ours says so, or takes it
    return next((argument for argument in given if argument not in takes.parameters), None)


def _call_stock(stock: _Function, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    known = inspect.signature(stock).parameters
    return stock(*args, **{name: value for name, value in named.items() if name in known})
