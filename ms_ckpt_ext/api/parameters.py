"""Parameter dicts from any checkpoint: lazily as numpy arrays, or as MindSpore's Parameters."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional, Union

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    access_of,
    any_mode,
    as_strategy,
    checked_format,
    checked_name_map,
    limits_of,
    log,
    path_of,
    workers_of,
)
from ms_ckpt_ext.engine.catalog import Catalog, file_catalog, open_catalog
from ms_ckpt_ext.engine.jobs import Choice, chosen_name
from ms_ckpt_ext.engine.lazy import Parameters
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError
from ms_ckpt_ext.formats import discovery
from ms_ckpt_ext.formats.crypto import KeyLike
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.safetensors import DEDUPLICATED

Prefix = Union[str, list[str], tuple[str, ...], None]


def load(
    path: PathLike,
    strategy: Any = None,
    *,
    names: Union[str, Iterable[str], None] = None,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    crc_check: bool = False,
    format: Optional[str] = None,
    file_suffix: Optional[str] = None,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
) -> Parameters:
    """The parameters of any checkpoint as a dictionary, each read when it is indexed, and only what the index asks.

        held = load("net.ckpt")
        held["embedding.weight"][1000:2000]         # a numpy array; reads these rows
        everything = held.arrays()                  # name -> numpy array (text: str), read together
        as_parameters(held)                         # name -> mindspore.Parameter

    Args:
        path: a `.ckpt` or safetensors file, encrypted or not; a merged checkpoint's directory; or a sharded one's
            (`rank_N/…`), which is seen whole.
        strategy: the strategy that cut a sharded checkpoint, in any form (see `as_strategy`).
        names: which parameters: names or glob patterns ("layers.0.*"); None for all.
        choice_func: parameter name -> True (keep), False (leave out) or a str (new name).
        name_map: name in the result -> name in the checkpoint, as for `load_distributed_checkpoint`.
        dec_key, dec_mode: of an encrypted checkpoint; without a mode any container will do.
        crc_check: verify the checksum of every file that has one now, which reads all of it.
        format: "safetensors" or "ckpt", where a directory holds both.
        file_suffix: which file of a rank folder; None for the newest.
        max_process_num: upper bound on the threads of one read.
        buffer_bytes: buffer budget of each.

    Returns:
        A mapping of names to `LazyTensor` (text: to `str`), in the checkpoint's order. Close it, or use it in a `with`
        statement, or let go of it.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or two parameters of one name.
        DiscoveryError, StrategyError, LayoutMismatchError: what the files are cannot be told.
        FormatError, ChecksumError, DecryptionError, StorageError: they cannot be read.
    """
    source = path_of(path, "path")
    access = any_mode(dec_key, dec_mode, crc_check)
    catalog = _catalog(source, strategy, access, format, file_suffix)
    held = _renamed(
        list({**catalog.tensors, **catalog.extras}), _patterns(names), choice_func, checked_name_map(name_map)
    )
    return Parameters(catalog, held, workers_of(max_process_num), limits_of(buffer_bytes))


def as_parameters(held: Parameters, names: Optional[Iterable[str]] = None) -> dict[str, Any]:
    """What `load` found, as `{name: mindspore.Parameter}` (text: `str`), in the stored dtypes, bfloat16 and int4 too.

    Args:
        held: the result of `load`.
        names: which of them; None for all.

    Raises:
        MissingDependencyError: MindSpore cannot be imported.
        KeyError: no such name.
        FormatError, DecryptionError, StorageError: they cannot be read.
    """
    from ms_ckpt_ext.bridge.parameters import parameter_dict

    return parameter_dict(held, held if names is None else names)


def load_checkpoint(
    ckpt_file_name: PathLike,
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Prefix = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Prefix = None,
    choice_func: Optional[Choice] = None,
    crc_check: bool = False,
    remove_redundancy: bool = False,
    format: str = "ckpt",
) -> dict[str, Any]:
    """The Parameters of one file. Drop-in for `mindspore.load_checkpoint`.

    Reads only what is chosen (with `crc_check`, the file once more), and takes encrypted safetensors too.

    Args:
        ckpt_file_name: the file; its suffix must be `format`.
        net: a Cell to fill by `mindspore.load_param_into_net`, or None.
        strict_load, remove_redundancy: of that function; what the file says about redundancy comes first.
        specify_prefix, filter_prefix: keep, or leave out, names that begin so; either replaces `choice_func`.
        dec_key, dec_mode: of an encrypted file.
        choice_func: parameter name -> True (keep), False (leave out) or a str (new name).
        crc_check: verify the file's checksum, if it has one.
        format: "ckpt" or "safetensors".

    Returns:
        name -> Parameter, or `str` for text.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or nothing is left.
        DiscoveryError: no such file.
        FormatError, ChecksumError, DecryptionError, StorageError: it cannot be read.
    """
    source = path_of(ckpt_file_name, "ckpt_file_name")
    checked_format(format, "format")
    if not source.endswith(f".{format}"):
        raise UsageError(f"ckpt_file_name must end in .{format}, as format says, got {source!r}")
    choice = _prefixes(specify_prefix, filter_prefix) or choice_func
    access = access_of(dec_key, dec_mode, crc_check)
    with _open(source, access, choice) as held:
        found = as_parameters(held)
        redundancy = held.catalog.files[0].metadata.get(DEDUPLICATED)
    if not found:
        raise UsageError(f"choice_func or the prefixes leave nothing of {source!r}; check them")
    if net is not None:
        from ms_ckpt_ext.bridge.parameters import load_into

        load_into(net, found, strict_load, {"True": True, "False": False}.get(redundancy or "", remove_redundancy))
    return found


def load_segmented_checkpoints(
    ckpt_file_dir: PathLike,
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Prefix = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Prefix = None,
    choice_func: Optional[Choice] = None,
) -> dict[str, Any]:
    """The Parameters of all `.ckpt` files of a directory. Drop-in for `mindspore.load_segmented_checkpoints`.

    Where stock MindSpore takes the files in any order and lets the last of two equal names win, this reports them; a
    file of which nothing is chosen is no error as long as another one has something.

    Arguments, result and errors are those of `load_checkpoint`; DiscoveryError also when a parameter is in two files.
    """
    folder = path_of(ckpt_file_dir, "ckpt_file_dir")
    if not os.path.isdir(folder):
        raise DiscoveryError(f"ckpt_file_dir {folder!r} is not a directory that exists; check the path")
    paths = [path for path in sorted(Path(folder).glob("*.ckpt")) if not discovery.is_strategy(path)]
    if not paths:
        raise DiscoveryError(f"{folder!r} holds no .ckpt checkpoint; check the path")
    choice = _prefixes(specify_prefix, filter_prefix) or choice_func
    access = access_of(dec_key, dec_mode)
    found: dict[str, Any] = {}
    place: dict[str, str] = {}
    for path in paths:
        with _open(str(path), access, choice) as held:
            for name in held:
                if place.setdefault(name, path.name) != path.name:
                    raise DiscoveryError(
                        f"parameter {name!r} is in {place[name]!r} and in {path.name!r} of {folder!r}; "
                        "which one is meant is not clear: choose by choice_func, or move one file away"
                    )
            found.update(as_parameters(held))
    if not found:
        raise UsageError(f"choice_func or the prefixes leave nothing of the files in {folder!r}; check them")
    if net is not None:
        from ms_ckpt_ext.bridge.parameters import load_into

        load_into(net, found, strict_load, False)
    return found


def _open(path: str, access: Access, choice: Optional[Choice]) -> Parameters:
    catalog = file_catalog(path, access)
    return Parameters(catalog, _renamed(list(catalog.tensors), None, choice, {}), workers_of(64))


def _catalog(path: str, strategy: Any, access: Access, kind: Optional[str], file_suffix: Optional[str]) -> Catalog:
    checked_format(kind, "format", optional=True)
    if not os.path.isdir(path):
        if kind is not None and not path.endswith(f".{kind}"):
            raise UsageError(f"path must end in .{kind}, as format says, got {path!r}")
        return file_catalog(path, access)
    return open_catalog(path, as_strategy(strategy), file_suffix, access=access, kind=kind)


def _patterns(names: Union[str, Iterable[str], None]) -> Optional[list[str]]:
    if names is None:
        return None
    listed = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) for name in listed):
        raise ArgumentTypeError("names must be a str, several of them, or None")
    return listed


def _renamed(
    stored: list[str], patterns: Optional[list[str]], choice: Optional[Choice], name_map: Mapping[str, str]
) -> dict[str, str]:
    """Name in the result -> name in the checkpoint."""
    if choice is not None and not callable(choice):
        raise ArgumentTypeError(f"choice_func must be callable, got {type(choice).__name__}")
    missing = sorted(set(name_map.values()) - set(stored))
    if missing:
        log.warning("name_map speaks of parameters that the checkpoint does not hold: %s", missing)
    back = {source: name for name, source in name_map.items()}
    found: dict[str, str] = {}
    for name in stored:
        if patterns is not None and not any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns):
            continue
        chosen = chosen_name(choice, name)
        if chosen is None:
            continue
        new = back.get(name, chosen)
        if new in found:
            raise UsageError(f"both {found[new]!r} and {name!r} get the name {new!r}; names must stay unique")
        found[new] = name
    return found


def _prefixes(specify: Prefix, filters: Prefix) -> Optional[Choice]:
    """MindSpore's deprecated arguments as a choice function; None when neither is given."""
    keep, drop = _prefix(specify, "specify_prefix"), _prefix(filters, "filter_prefix")
    if not keep and not drop:
        return None
    return lambda name: (not keep or name.startswith(keep)) and not name.startswith(drop or ("\0",))


def _prefix(value: Prefix, argument: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (str, list, tuple)) or not all(isinstance(each, str) for each in value):
        raise ArgumentTypeError(f"{argument} must be a str, or a list or tuple of them, got {value!r}")
    listed = (value,) if isinstance(value, str) else tuple(value)
    if not listed or "" in listed:
        raise UsageError(f"{argument} must not be empty nor hold an empty str; pass None for no condition")
    return listed
