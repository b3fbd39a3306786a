"""Checkpoints from one format into another, encrypted and decrypted: a file, or a whole tree of them.

Every call writes one file for every input file, in bounded memory, and may be run again after an interruption. Nothing
appears in the target before all of it is complete. Plaintext of encrypted files is never on disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Optional

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    any_mode,
    checked_name_map,
    execute,
    limits_of,
    path_of,
    seal_of,
    workers_of,
)
from ms_ckpt_ext.engine.conversion import Rename, convert_job, copy_job, renamed_map
from ms_ckpt_ext.engine.jobs import Choice, chosen_name
from ms_ckpt_ext.engine.offline import Report
from ms_ckpt_ext.engine.sealing import Seal
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError
from ms_ckpt_ext.formats import discovery
from ms_ckpt_ext.formats.crypto import GCM, KeyLike
from ms_ckpt_ext.formats.registry import DEC_KEY_VARIABLE, ENC_KEY_VARIABLE, PLAIN, Access


def ckpt_to_safetensors(
    file_path: PathLike,
    save_path: Optional[PathLike] = None,
    name_map: Optional[Mapping[str, str]] = None,
    file_name_regex: Optional[str] = None,
    processes_num: int = 1,
) -> None:
    """Convert `.ckpt` files to safetensors. Drop-in for `mindspore.ckpt_to_safetensors`.

    Tensors, training scalars and text survive; tensors without elements, which stock MindSpore loses, and text, on
    which it fails, too.
    An encrypted input is decrypted with the key in the environment (`MS_CKPT_EXT_DEC_KEY`).

    Args:
        file_path: a `.ckpt` file, or a directory whose `rank*` folders hold them.
        save_path: directory for the results, by default the inputs' own; keeps the rank folders.
        name_map: parameter name in the input -> name in the output.
        file_name_regex: convert only files whose name it is found in; of a single file, whose path.
        processes_num: upper bound on worker threads.

    Raises:
        DiscoveryError: no such input, no rank folder, nothing to convert, or files of both formats side by side.
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        FormatError, DecryptionError, StorageError: an input cannot be read, the output cannot be written.
    """
    _as_mindspore(file_path, save_path, name_map, file_name_regex, processes_num, "safetensors")


def safetensors_to_ckpt(
    file_path: PathLike,
    save_path: Optional[PathLike] = None,
    name_map: Optional[Mapping[str, str]] = None,
    file_name_regex: Optional[str] = None,
    processes_num: int = 1,
) -> None:
    """Convert safetensors files to `.ckpt`. Drop-in for `mindspore.safetensors_to_ckpt`.

    Arguments and errors are those of `ckpt_to_safetensors`, with the formats exchanged. A dtype without a name in
    `.ckpt` files (F8_E8M0, F4, …) is a UsageError.
    """
    _as_mindspore(file_path, save_path, name_map, file_name_regex, processes_num, "ckpt")


def convert(
    src: PathLike,
    dst: PathLike,
    *,
    to: Optional[str] = None,
    name_map: Optional[Mapping[str, str]] = None,
    choice_func: Optional[Choice] = None,
    file_name_regex: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = GCM,
    crc_check: bool = False,
    crc: bool = False,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    dry_run: bool = False,
) -> Report:
    """Convert one checkpoint file or a tree of them.

    Args:
        src: a `.ckpt` or safetensors file, or a directory; of a directory, every checkpoint file below it.
        dst: the directory for the results, which keeps the tree; for a file also the new file's path.
        to: "safetensors" or "ckpt"; None to keep every file's format (or to take it from the suffix of `dst`).
        name_map: parameter name in the input -> name in the output.
        choice_func: parameter name in the input -> True (keep), False (drop) or a str (new name); before `name_map`.
        file_name_regex: only files whose name it is found in.
        dec_key, dec_mode: of encrypted inputs, as for every reader.
        enc_key: encrypt the results. Default: the environment variable MS_CKPT_EXT_ENC_KEY; without it they are plain.
        enc_mode: of a `.ckpt` "AES-GCM", "AES-CBC", "SM4-CBC" in MindSpore's format, or "chunked"; of safetensors
            "AES-GCM", in this package's chunked container (docs/encryption.md).
        crc_check: verify the checksum of every input that has one, before anything is written.
        crc: give every result a checksum.
        max_process_num: upper bound on worker threads.
        buffer_bytes: buffer budget of each worker.
        dry_run: only tell what would be read and written.

    Returns:
        What was read and written; of a dry run, a `Preview`.

    Raises:
        DiscoveryError: no such input, nothing to convert, or files of both formats where `to` names one of them.
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        FormatError, ChecksumError, DecryptionError, StorageError: an input cannot be read, or the output not written.
    """
    if to not in (None, *discovery.FORMATS):
        raise UsageError(f"to must be one of {', '.join(discovery.FORMATS)}, or None, got {to!r}")
    access, seal = any_mode(dec_key, dec_mode, crc_check), seal_of(enc_key, enc_mode)
    found = _find(path_of(src, "src"), path_of(dst, "dst"), to, _pattern(file_name_regex))
    rename = _rename(name_map, choice_func)
    maps = {name: renamed_map(os.path.join(found.source, name), found.renamed_in(name), rename) for name in found.maps}
    job = convert_job(found.inputs, access, rename, crc, maps, seal)
    return execute(job, found.target, workers_of(max_process_num), limits_of(buffer_bytes), "convert", dry_run)


def encrypt(
    src: PathLike,
    dst: PathLike,
    *,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = GCM,
    file_name_regex: Optional[str] = None,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    dry_run: bool = False,
) -> Report:
    """Encrypt one checkpoint file or a tree of them, as they are: `decrypt` gives back the very same bytes.

    Arguments, results and errors are those of `convert`; a key is needed. Parameter maps (`param_name_map.json`) of
    merged checkpoints go along and stay readable, and with them names of parameters and files.
    """
    seal = seal_of(enc_key, enc_mode)
    if seal is None:
        raise UsageError(f"enc_key is needed: give the key, or set the environment variable {ENC_KEY_VARIABLE}")
    return _copy(src, dst, PLAIN, seal, file_name_regex, "encrypt", (max_process_num, buffer_bytes), dry_run)


def decrypt(
    src: PathLike,
    dst: PathLike,
    *,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    file_name_regex: Optional[str] = None,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    dry_run: bool = False,
) -> Report:
    """Decrypt one checkpoint file or a tree of them, to the very bytes that were encrypted.

    Arguments, results and errors are those of `convert`; a key is needed. Authenticated containers are checked whole
    while they are decrypted, and nothing appears in `dst` unless all of it was right.
    """
    access = any_mode(dec_key, dec_mode)
    if access.key is None:
        raise UsageError(f"dec_key is needed: give the key, or set the environment variable {DEC_KEY_VARIABLE}")
    access = replace(access, optional=False)
    return _copy(src, dst, access, None, file_name_regex, "decrypt", (max_process_num, buffer_bytes), dry_run)


def _copy(
    src: PathLike,
    dst: PathLike,
    access: Access,
    seal: Optional[Seal],
    file_name_regex: Optional[str],
    title: str,
    budget: tuple[int, int],
    dry_run: bool,
) -> Report:
    """Every file with the plaintext it has."""
    found = _find(path_of(src, "src"), path_of(dst, "dst"), None, _pattern(file_name_regex))
    maps = {name: renamed_map(os.path.join(found.source, name), {}, str) for name in found.maps}
    job = copy_job(found.inputs, access, maps, seal)
    return execute(job, found.target, workers_of(budget[0]), limits_of(budget[1]), title, dry_run)


class _Found(NamedTuple):
    """What a conversion has to do.

    Attributes:
        source, target: directories.
        files: input relative to the source -> output relative to the target.
        maps: parameter maps that go along, relative to both.
    """

    source: str
    target: str
    files: dict[str, str]
    maps: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, str]:
        """Output relative to the target -> path of its input."""
        return {output: os.path.join(self.source, name) for name, output in self.files.items()}

    def renamed_in(self, name: str) -> dict[str, str]:
        """File names as the map `name` has them -> their new names."""
        folder = os.path.dirname(name)
        mine = {old: new for old, new in self.files.items() if os.path.dirname(old) == folder}
        return {os.path.basename(old): os.path.basename(new) for old, new in mine.items()}


def _as_mindspore(
    file_path: PathLike,
    save_path: Optional[PathLike],
    name_map: Optional[Mapping[str, str]],
    file_name_regex: Optional[str],
    processes_num: int,
    to: str,
) -> None:
    source, pattern, rename = path_of(file_path, "file_path"), _pattern(file_name_regex), _rename(name_map, None)
    target = None if save_path is None else path_of(save_path, "save_path")
    suffix = _other(to)
    if target and os.path.splitext(target)[1]:
        raise UsageError(f"save_path must be a directory, got {target!r}; a file keeps its name but for the suffix")
    if os.path.isfile(source) and not source.endswith(suffix):
        raise UsageError(f"file_path must be a {suffix} file or a directory, got {source!r}")
    if os.path.isfile(source) and pattern and not pattern.search(source):
        raise UsageError(f"file_name_regex {file_name_regex!r} is not found in file_path {source!r}")
    folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
    found = _find(source, (target or folder) + os.sep, to, None if os.path.isfile(source) else pattern, "rank")
    job = convert_job(found.inputs, any_mode(None, None), rename, seal=seal_of(None, GCM))
    execute(job, found.target, workers_of(processes_num), limits_of(BUFFER_BYTES), "convert")


def _find(source: str, target: str, to: Optional[str], pattern: Optional[re.Pattern[str]], below: str = "") -> _Found:
    """The files of a conversion.

    Args:
        source: a file or a directory.
        target: a directory, or the new path of a single file.
        to: the wanted format.
        pattern: must be found in a file's name.
        below: of a directory, only files in folders of it whose names begin so; "" for all files, however deep.
    """
    if os.path.isfile(source):
        folder, name = os.path.split(source)
        return _single(folder or ".", name, target, to)
    if not os.path.isdir(source):
        raise DiscoveryError(f"no such file or directory: {source!r}; check the path")
    folders = sorted(child.name for child in Path(source).iterdir() if child.is_dir() and child.name.startswith(below))
    if below and not folders:
        raise DiscoveryError(f"{source!r} holds no folder whose name starts with {below!r}; check the path")
    names = _walk(source, folders if below else None)
    files = [name for name in names if name.endswith(_SUFFIXES) and (not pattern or pattern.search(_base(name)))]
    files = [name for name in files if not (name.endswith(".ckpt") and discovery.is_strategy(Path(source, name)))]
    if to is not None:
        files = _of_one_kind(source, files, to, same_place=os.path.realpath(target) == os.path.realpath(source))
    if not files:
        raise DiscoveryError(f"{source!r} holds no checkpoint file to convert; check the path and file_name_regex")
    maps = (discovery.MAP_NAME, discovery.HF_INDEX_NAME)
    return _Found(
        source,
        target,
        {name: _renamed(name, to) for name in files},
        tuple(name for name in names if _base(name) in maps) if not below else (),
    )


_SUFFIXES = tuple(f".{kind}" for kind in discovery.FORMATS)
_base = os.path.basename


def _single(folder: str, name: str, target: str, to: Optional[str]) -> _Found:
    """One file: into a directory, or to a path that ends in a format's suffix."""
    if not name.endswith(_SUFFIXES):
        raise UsageError(f"{os.path.join(folder, name)!r} is not a checkpoint by its name: {' or '.join(_SUFFIXES)}")
    if target.endswith(_SUFFIXES) and not os.path.isdir(target):
        if to is not None and not target.endswith(f".{to}"):
            raise UsageError(f"the target {target!r} and the wanted format {to!r} contradict each other")
        return _Found(folder, os.path.dirname(target) or ".", {name: _base(target)})
    return _Found(folder, target, {name: _renamed(name, to)})


def _renamed(name: str, to: Optional[str]) -> str:
    return name if to is None else f"{os.path.splitext(name)[0]}.{to}"


def _walk(source: str, folders: Optional[list[str]]) -> list[str]:
    """Files below a directory, relative to it; hidden ones aside. With `folders`, those directly in these folders."""
    if folders is not None:
        return sorted(
            f"{folder}/{child.name}"
            for folder in folders
            for child in Path(source, folder).iterdir()
            if child.is_file()
        )
    found = []
    for root, inner, names in os.walk(source):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [os.path.relpath(os.path.join(root, name), source) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_one_kind(source: str, files: list[str], to: str, same_place: bool) -> list[str]:
    """The files that are not of the wanted format yet. The others may only be results of an earlier run."""
    wanted = [name for name in files if name.endswith(_other(to))]
    results = {_renamed(name, to) for name in wanted} if same_place else set()
    strange = [name for name in files if name not in wanted and name not in results]
    if wanted and strange:
        raise DiscoveryError(
            f"{source!r} holds both .safetensors and .ckpt files ({wanted[0]!r} and {strange[0]!r}), so which ones are "
            "the checkpoint is not clear; select them by file_name_regex, or move the others away"
        )
    return wanted or strange


def _other(to: str) -> str:
    """Suffix of the format that is converted from."""
    return ".ckpt" if to == "safetensors" else ".safetensors"


def _pattern(text: Optional[str]) -> Optional[re.Pattern[str]]:
    try:
        return None if text is None else re.compile(text)
    except (re.error, TypeError) as error:
        raise UsageError(f"file_name_regex {text!r} is not a regular expression: {error}") from None


def _rename(name_map: Optional[Mapping[str, str]], choice: Optional[Choice]) -> Rename:
    names = checked_name_map(name_map)
    if choice is not None and not callable(choice):
        raise ArgumentTypeError(f"choice_func must be callable, got {type(choice).__name__}")

    def rename(name: str) -> Optional[str]:
        chosen = chosen_name(choice, name)
        return None if chosen is None else names.get(chosen, chosen)

    return rename
