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
    checked_naming,
    checked_words,
    limits_of,
    path_of,
    require_path,
    workers_of,
)
from ms_ckpt_ext.api.mindspore.prefixes import Prefix, as_stock
from ms_ckpt_ext.api.mindspore.unserved import file_without_tables, refuse_what_is_no_file
from ms_ckpt_ext.engine.integrity.digests import digest_tensors
from ms_ckpt_ext.engine.integrity.recorded import audit_alone
from ms_ckpt_ext.engine.source.catalog import Catalog, file_catalog, files_catalog
from ms_ckpt_ext.engine.source.lazy import Parameters
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.source.renaming import Choice
from ms_ckpt_ext.engine.source.sharded import alike
from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError
from ms_ckpt_ext.formats.crypto import KeyLike
from ms_ckpt_ext.formats.discovery.whole_models import is_map
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import Access, reopen
from ms_ckpt_ext.formats.safetensors import DEDUPLICATED
from ms_ckpt_ext.formats.table import CKPT, FORMATS, STRATEGY, kind_of


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
    verify: str = "none",
    format: Optional[str] = None,
    file_suffix: Optional[str] = None,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    allow_equal_slices: bool = False,
) -> Parameters:
    """The parameters of any checkpoint as a dictionary, each read when it is indexed, as far as the index asks.

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
        name_map: name in the result -> name in the checkpoint (as `choice_func` left it), as for
            `load_distributed_checkpoint`: several names may share a source, and a source keeps its own name, too.
        dec_key, dec_mode: of an encrypted checkpoint; without a mode any container will do.
        crc_check: verify the checksum of every file that has one now, which reads all of it.
        verify: "none"; "full": compare what is chosen with `ms_ckpt_ext.digests.json` now, which reads all of that.
        format: "safetensors" or "ckpt", where a directory holds both.
        file_suffix: which file of a rank folder; None for the newest.
        max_process_num: upper bound on the threads of one read.
        buffer_bytes: buffer budget of each thread.
        allow_equal_slices: as in `unified_safetensors`.

    Returns:
        A mapping of names to `LazyTensor` (text: to `str`), in the checkpoint's order. Close it, use it in a `with`
        statement, or drop it.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, two parameters of one name, or `names` that match none; or
            verify="full", and a file has no digests on record.
        DiscoveryError, StrategyError, LayoutMismatchError: it is not clear what the files are.
        FormatError, ChecksumError, DecryptionError, StorageError: they cannot be read.

    What lies outside the strategy, in several ranks' files, is compared when it is first read; a LayoutMismatchError
    says what differs.
    """
    checked_words(load, locals())
    source = path_of(path, "path")
    access, full = any_mode(dec_key, dec_mode, crc_check), _is_full(verify)
    naming, patterns = checked_naming(choice_func, name_map), _patterns(names)
    catalog = _catalog(source, strategy, access, format, file_suffix, allow_equal_slices)
    stored = dict.fromkeys((*catalog.tensors, *catalog.outside))
    wanted = _wanted({**stored, **catalog.absent}, patterns)
    naming = naming and naming._replace(aside=frozenset(stored.keys() - wanted))
    catalog = _only(catalog, wanted).called(naming)
    catalog.require(catalog.absent)
    workers, limits = workers_of(max_process_num), limits_of(buffer_bytes)
    if full:
        _compare_digests(catalog, workers)
    held = dict.fromkeys((*catalog.tensors, *catalog.outside))
    return Parameters(catalog, {name: name for name in held}, workers, limits)


def _is_full(verify: str) -> bool:
    if verify not in ("none", "full"):
        raise UsageError(f'verify must be "none" or "full" here, got {verify!r}; only ranks together compare replicas')
    return verify == "full"


def _compare_digests(catalog: Catalog, workers: int) -> None:
    copies = [alike(held, catalog.files) for held in catalog.unproven.values()]
    audit_alone(catalog, [*catalog.tensors.values(), *catalog.extras.values(), *copies], workers)


def as_parameters(held: Parameters, names: Optional[Iterable[str]] = None) -> dict[str, Any]:
    """What `load` found, as `{name: mindspore.Parameter}` (text: `str`), in the stored dtypes, bfloat16 and int4 too.

    Args:
        held: the result of `load`.
        names: which of them; None for all.

    Returns:
        name -> Parameter of the stored shape, or `str` for text, in the checkpoint's order.

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
    *,
    name_map: Optional[Mapping[str, str]] = None,
    verify: str = "none",
) -> dict[str, Any]:
    """The Parameters of one file. Drop-in for `mindspore.load_checkpoint`.

    Reads only what is chosen (with `crc_check`, the file once more), and takes encrypted safetensors too.

    Args:
        ckpt_file_name: the file; its name must end in `format`.
        net: a Cell to fill by `mindspore.load_param_into_net`, or None. Names that differ by a wrapper's prefix are
            matched by suffix, but, unlike there, never by order, see `core.planning.suffixes`.
        strict_load, remove_redundancy: as there; what the file says about redundancy takes precedence.
        specify_prefix, filter_prefix: keep, or leave out, names that begin so; either replaces `choice_func`.
        dec_key, dec_mode: of an encrypted file.
        choice_func: parameter name -> True (keep), False (leave out) or a str (new name). As in stock MindSpore,
            anything else counts by its truth.
        crc_check: verify the file's checksum, if it has one.
        format: "ckpt" or "safetensors".
        name_map: name in the result -> name in the file (as the choice left it), as for `load`.
        verify: as for `load`.

    Returns:
        name -> Parameter, or `str` for text.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or nothing is left.
        UnsupportedError: what only `mindspore.load_checkpoint` serves: contents in memory instead of a path, hash
            tables (MapParameter), what a parameter server keeps, and AITurbo's store.
        DiscoveryError: no such file.
        FormatError, ChecksumError, DecryptionError, StorageError: it cannot be read.
        LayoutMismatchError: names of `net` can be matched by suffix in several ways; `net` is unchanged.
    """
    checked_words(load_checkpoint, locals())
    refuse_what_is_no_file(ckpt_file_name)
    source = path_of(ckpt_file_name, "ckpt_file_name")
    checked_format(format, "format")
    if os.path.isdir(source):
        raise UsageError(
            f"ckpt_file_name is the directory {source!r}, and one file is needed; `load` takes directories"
        )
    if not source.endswith(f".{format}"):
        raise UsageError(f"ckpt_file_name must end in .{format}, as format says, got {source!r}")
    naming = as_stock(specify_prefix, filter_prefix, choice_func, name_map)
    access, full = access_of(dec_key, dec_mode, crc_check), _is_full(verify)
    require_path(source)
    with _held(file_without_tables(source, access).called(naming), full) as held:
        found = as_parameters(held, sorted(held) if FORMATS[format].by_name else None)  # as MindSpore lists them
        redundancy = held.catalog.files[0].metadata.get(DEDUPLICATED)
    if not found:
        raise UsageError(f"choice_func or the prefixes leave nothing of {source!r}; check them")
    if net is not None:
        from ms_ckpt_ext.bridge.parameters import load_into

        told = {"True": True, "False": False}.get(redundancy or "", remove_redundancy)
        load_into(net, found, _sources(held), strict_load, told)
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
    *,
    crc_check: bool = False,
    name_map: Optional[Mapping[str, str]] = None,
    verify: str = "none",
) -> dict[str, Any]:
    """The Parameters of all `.ckpt` files of a directory. Drop-in for `mindspore.load_segmented_checkpoints`.

    Where stock MindSpore takes the files in any order and lets the last of two equal names win, this reports them
    unless they hold the same, as training scalars of one save do; a file of which nothing is chosen is no error as long
    as another one has something.

    The other arguments, the result and the errors are those of `load_checkpoint`.

    Args:
        ckpt_file_dir: the directory; files in its folders are not looked at.

    Raises:
        DiscoveryError: also when two files hold a parameter with different dtypes, shapes or values.
    """
    checked_words(load_segmented_checkpoints, locals())
    folder = path_of(ckpt_file_dir, "ckpt_file_dir")
    if not os.path.isdir(folder):
        what = "is a file, and the directory that holds it is" if os.path.isfile(folder) else "does not exist: one is"
        raise DiscoveryError(f"ckpt_file_dir {folder!r} {what} needed; check the path")
    paths = [path for path in sorted(Path(folder).glob(f"*{CKPT.suffix}")) if kind_of(str(path)) != STRATEGY]
    if not paths:
        raise DiscoveryError(f"{folder!r} holds no .ckpt checkpoint; check the path")
    naming = as_stock(specify_prefix, filter_prefix, choice_func, name_map)
    access, full = access_of(dec_key, dec_mode, crc_check), _is_full(verify)
    catalog = files_catalog(list(map(str, paths)), access)
    chosen = catalog.called(naming)
    _refuse_doubles(catalog, {tensor.stored_name for tensor in chosen.tensors.values()}, folder)
    with _held(chosen, full) as held:
        found = as_parameters(held)
    if not found:
        raise UsageError(f"choice_func or the prefixes leave nothing of the files in {folder!r}; check them")
    if net is not None:
        from ms_ckpt_ext.bridge.parameters import load_into

        load_into(net, found, _sources(held), strict_load, False)
    return found


def _sources(held: Parameters) -> dict[str, str]:
    """Name of a parameter -> the one it is stored under: two names of one source are one parameter."""
    return {name: tensor.stored_name for name, tensor in held.catalog.tensors.items()}


def _held(catalog: Catalog, full: bool) -> Parameters:
    workers = workers_of(64)
    if full:
        _compare_digests(catalog, workers)
    return Parameters(catalog, {name: name for name in catalog.tensors}, workers)


def _refuse_doubles(catalog: Catalog, wanted: set[str], folder: str) -> None:
    """Parameters that two files hold must be the same in both."""
    first: dict[str, FileIndex] = {}
    for index in catalog.files:
        for name in sorted(wanted.intersection(index.tensors)):
            other = first.setdefault(name, index)
            if other is not index and not _equal(name, other, index, catalog.access):
                raise DiscoveryError(
                    f"parameter {name!r} is in {os.path.basename(other.path)!r} and, not the same, in "
                    f"{os.path.basename(index.path)!r} of {folder!r}; "
                    "which one is meant is not clear: choose by choice_func, or move one file away"
                )


def _equal(name: str, one: FileIndex, two: FileIndex, access: Access) -> bool:
    if (one.tensors[name][:2], one.metadata.get(name)) != (two.tensors[name][:2], two.metadata.get(name)):
        return False

    def digest(index: FileIndex) -> dict[str, str]:
        return digest_tensors(index, [name], opener=lambda _path: reopen(index, access))

    return digest(one) == digest(two)


def _only(catalog: Catalog, wanted: set[str]) -> Catalog:
    tensors, extras = ({n: t for n, t in held.items() if n in wanted} for held in (catalog.tensors, catalog.extras))
    unproven, own = ({n: t for n, t in held.items() if n in wanted} for held in (catalog.unproven, catalog.own))
    absent = {name: where for name, where in catalog.absent.items() if name in wanted}
    return catalog._replace(tensors=tensors, extras=extras, unproven=unproven, own=own, absent=absent)


def _catalog(
    path: str, strategy: Any, access: Access, kind: Optional[str], file_suffix: Optional[str], allow_equal: bool
) -> Catalog:
    checked_format(kind, "format", optional=True)
    if not os.path.isdir(path) and not is_map(os.path.basename(path)):
        require_path(path)
        if kind is not None and not path.endswith(f".{kind}"):
            raise UsageError(f"path must end in .{kind}, as format says, got {path!r}")
        return file_catalog(path, access)
    known = as_strategy(strategy, argument="strategy")
    return read_slices(list_checkpoint(path, known, file_suffix, kind=kind), known, access, allow_equal)


def _patterns(names: Union[str, Iterable[str], None]) -> Optional[list[str]]:
    if names is None:
        return None
    listed = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not all(isinstance(name, str) for name in listed):
        raise ArgumentTypeError("names must be a str, several of them, or None")
    return listed


def _wanted(stored: Iterable[str], patterns: Optional[list[str]]) -> set[str]:
    """Names that one of the patterns matches. Raises UsageError for a pattern without a match: it may be misspelt."""
    names = list(stored)
    if patterns is None:
        return set(names)
    found = {pattern: {n for n in names if n == pattern or fnmatch.fnmatchcase(n, pattern)} for pattern in patterns}
    idle = [pattern for pattern, hits in found.items() if not hits]
    if idle:
        raise UsageError(
            f"names: the checkpoint holds no parameter like {', '.join(map(repr, idle[:3]))}, but for example "
            f"{', '.join(map(repr, names[:3])) or 'none at all'}; globs are of whole names, e.g. '*.bias'"
        )
    return set().union(*found.values())
