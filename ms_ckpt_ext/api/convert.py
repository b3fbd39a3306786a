"""Checkpoints from one format into another, encrypted and decrypted: a file, or a whole tree of them.

Every call writes one file for every input file, in bounded memory, and may be run again after an interruption. Nothing
appears in the target before all of it is complete. Plaintext of encrypted files is never on disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    Running,
    any_mode,
    checked_choice,
    checked_format,
    checked_name_map,
    checked_words,
    execute_with_progress,
    path_of,
    running,
    seal_of,
)
from ms_ckpt_ext.api.inputs import Inputs, find_in_ranks, find_inputs, other_suffixes
from ms_ckpt_ext.engine.files.beside import settle
from ms_ckpt_ext.engine.files.convert import RenameFunction, convert_job, copy_job, renamed_map
from ms_ckpt_ext.engine.files.encrypted_sink import Seal
from ms_ckpt_ext.engine.files.job import Job, Report
from ms_ckpt_ext.engine.source.renaming import Choice, chosen_name, warn_unknown
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError
from ms_ckpt_ext.formats.crypto import GCM, KeyLike
from ms_ckpt_ext.formats.registry import DEC_KEY_VARIABLE, ENC_KEY_VARIABLE, PLAIN, Access
from ms_ckpt_ext.formats.table import CKPT, SAFETENSORS
from ms_ckpt_ext.storage.threads import few_collections

_DIRECTION = "names (str) in the input to names (str) in the output"


def ckpt_to_safetensors(
    file_path: PathLike,
    save_path: Optional[PathLike] = None,
    name_map: Optional[Mapping[str, str]] = None,
    file_name_regex: Optional[str] = None,
    processes_num: Optional[int] = 1,
) -> None:
    """Convert `.ckpt` files to safetensors. Drop-in for `mindspore.ckpt_to_safetensors`.

    Tensors, training scalars and text survive; also tensors without elements, which stock MindSpore loses, and
    text, on which it fails. What earlier conversions left beside the inputs, stock's as well, is no obstacle.
    An encrypted input is decrypted with the key in the environment (`MS_CKPT_EXT_DEC_KEY`).

    Args:
        file_path: a `.ckpt` file, or a directory whose `rank*` folders hold them.
        save_path: directory for the results, by default the inputs' own; keeps the rank folders.
        name_map: parameter name in the input -> name in the output.
        file_name_regex: convert only files in whose names it is found; for a single file, in its path.
        processes_num: upper bound on worker threads; None for as many as help. For a single file it may be 0.

    Raises:
        DiscoveryError: no such input, no rank folder, nothing to convert, or without `save_path` a file that is no
            conversion of its input has the name of a result.
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        FormatError, DecryptionError, StorageError: an input cannot be read, the output cannot be written.
    """
    _as_mindspore(file_path, save_path, name_map, file_name_regex, processes_num, SAFETENSORS.name)


def safetensors_to_ckpt(
    file_path: PathLike,
    save_path: Optional[PathLike] = None,
    name_map: Optional[Mapping[str, str]] = None,
    file_name_regex: Optional[str] = None,
    processes_num: Optional[int] = 1,
) -> None:
    """Convert safetensors files to `.ckpt`. Drop-in for `mindspore.safetensors_to_ckpt`.

    Arguments and errors are those of `ckpt_to_safetensors`, with the formats exchanged. A dtype without a name in
    `.ckpt` files (F8_E8M0, F4, …) is a UsageError.
    """
    _as_mindspore(file_path, save_path, name_map, file_name_regex, processes_num, CKPT.name)


@few_collections()
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
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
) -> Report:
    """Convert one checkpoint file or a tree of them.

    Args:
        src: a `.ckpt` or safetensors file, or a directory; of a directory, every checkpoint file below it.
        dst: the directory for the results, which keeps the tree; for a file also the new file's path.
        to: "safetensors" or "ckpt"; None to keep every file's format (or to take it from the suffix of `dst`).
        name_map: parameter name in the input -> name in the output.
        choice_func: parameter name in the input -> True (keep), False (drop) or a str (new name); before `name_map`.
        file_name_regex: only files in whose names it is found.
        dec_key, dec_mode: of encrypted inputs, as for every reader.
        enc_key: encrypt the results. Default: the environment variable MS_CKPT_EXT_ENC_KEY; without it they are plain.
        enc_mode: of a `.ckpt` "AES-GCM", "AES-CBC", "SM4-CBC" in MindSpore's format, or "chunked"; of safetensors
            "AES-GCM", in this package's chunked container (docs/encryption.md).
        crc_check: verify the checksum of every input that has one, before anything is written.
        crc: give every result a checksum.
        digests: write `ms_ckpt_ext.digests.json` beside the results: xxh3-128 of every tensor, see
            `engine.integrity.manifest`; those of encrypted results are encrypted, too.
        max_process_num: upper bound on worker threads.
        buffer_bytes: buffer budget of each worker.
        sync: the results are on disk when this returns; False as in `merge`.
        dry_run: only report what would be read and written.

    Returns:
        What was read and written; of a dry run, a `Preview`.

    Raises:
        DiscoveryError: no such input, nothing to convert, files of both formats where `to` names one of them, or
            in the inputs' own directory a file that is no conversion of its input has the name of a result.
        UsageError, ArgumentTypeError: wrong arguments; nothing was written.
        FormatError, ChecksumError, DecryptionError, StorageError: an input cannot be read, or the output not written.
    """
    checked_words(convert, locals(), ("file_name_regex",))
    checked_format(to, "to", optional=True)
    access, seal = any_mode(dec_key, dec_mode, crc_check), seal_of(enc_key, enc_mode)
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    found = find_inputs(path_of(src, "src"), path_of(dst, "dst"), to, _pattern(file_name_regex))
    rename = _rename(name_map, choice_func)
    maps = {name: renamed_map(os.path.join(found.source, name), found.renamed_in(name), rename) for name in found.maps}
    job = convert_job(found.inputs, access, rename, crc, maps, seal, digests)
    _warn_idle(name_map, choice_func, job)
    return _convert(found, job, run)


def encrypt(
    src: PathLike,
    dst: PathLike,
    *,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = GCM,
    file_name_regex: Optional[str] = None,
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
) -> Report:
    """Encrypt one checkpoint file or a tree of them, as they are: `decrypt` gives back the same bytes.

    Arguments, results and errors are those of `convert`; `enc_key` is needed. Parameter maps (`param_name_map.json`) of
    merged checkpoints go along and stay readable, and so do the names of parameters and files in them.
    """
    checked_words(encrypt, locals(), ("file_name_regex",))
    seal = seal_of(enc_key, enc_mode)
    if seal is None:
        raise UsageError(f"enc_key is needed: give the key, or set the environment variable {ENC_KEY_VARIABLE}")
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    return _copy(src, dst, PLAIN, seal, file_name_regex, digests, "encrypt", run)


def decrypt(
    src: PathLike,
    dst: PathLike,
    *,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    file_name_regex: Optional[str] = None,
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
) -> Report:
    """Decrypt one checkpoint file or a tree of them, to the very bytes that were encrypted.

    Arguments, results and errors are those of `convert`; `dec_key` is needed. Nothing appears in `dst` unless every
    file decrypted. For the chunked container this proves that the file is whole and as it was written; for
    MindSpore's AES-GCM blocks, that each block is, but not their order, nor that none is missing at the end; for CBC,
    only that the key fits. A checksum at the end of a `.ckpt` inside such blocks is verified, and shows more
    (ChecksumError). No mode notices that whole files under one key changed places. See docs/encryption.md, "What is
    noticed".
    """
    checked_words(decrypt, locals(), ("file_name_regex",))
    access = any_mode(dec_key, dec_mode)
    if access.key is None:
        raise UsageError(f"dec_key is needed: give the key, or set the environment variable {DEC_KEY_VARIABLE}")
    access = access._replace(optional=False)
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    return _copy(src, dst, access, None, file_name_regex, digests, "decrypt", run)


def _copy(
    src: PathLike,
    dst: PathLike,
    access: Access,
    seal: Optional[Seal],
    file_name_regex: Optional[str],
    digests: bool,
    title: str,
    run: Running,
) -> Report:
    """Copy every file, with its plaintext unchanged."""
    found = find_inputs(path_of(src, "src"), path_of(dst, "dst"), None, _pattern(file_name_regex))
    maps = {name: renamed_map(os.path.join(found.source, name), {}, str) for name in found.maps}
    job = copy_job(found.inputs, access, maps, seal, digests)
    return execute_with_progress(job, found.target, run, title)


def _as_mindspore(
    file_path: PathLike,
    save_path: Optional[PathLike],
    name_map: Optional[Mapping[str, str]],
    file_name_regex: Optional[str],
    processes_num: Optional[int],
    to: str,
) -> None:
    source, pattern, rename = path_of(file_path, "file_path"), _pattern(file_name_regex), _rename(name_map, None)
    target = None if save_path is None else path_of(save_path, "save_path")
    run = running(processes_num, argument="processes_num", least=0 if os.path.isfile(source) else 1)
    others = other_suffixes(to)
    if target and os.path.splitext(target)[1] and not os.path.isdir(target):
        raise UsageError(
            f"save_path must be a directory, and {target!r}, which is none, ends like a file's name; make it "
            "first if that is its name, or give another: a result keeps its file's name but for the suffix"
        )
    if os.path.isfile(source) and not source.endswith(others):
        raise UsageError(f"file_path must be a {' or '.join(others)} file or a directory, got {source!r}")
    if os.path.isfile(source) and pattern and not pattern.search(source):
        raise UsageError(f"file_name_regex {file_name_regex!r} is not found in file_path {source!r}")
    folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
    found = find_in_ranks(source, (target or folder) + os.sep, to, pattern)
    job = convert_job(found.inputs, any_mode(None, None), rename, seal=seal_of(None, GCM))
    _warn_idle(name_map, None, job)
    _convert(found, job, run)


def _convert(found: Inputs, job: Job, run: Running) -> Report:
    """Run a conversion, except for results that are already there, made by other means."""
    same: tuple[str, ...] = ()
    if found.beside:
        job, same = settle(job, found.target)
    if same:
        log.info("left in %s as they are, for they hold what would be written: %s", found.target, ", ".join(same))
    report = execute_with_progress(job, found.target, run, "convert")
    report.files_kept = (*same, *report.files_kept)
    return report


def _pattern(text: Optional[str]) -> Optional[re.Pattern[str]]:
    if text is not None and not isinstance(text, str):
        raise ArgumentTypeError(f"file_name_regex {text!r} is not a regular expression: it must be a str")
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UsageError(f"file_name_regex {text!r} is not a regular expression: {error}") from None


def _warn_idle(name_map: Optional[Mapping[str, str]], choice: Optional[Choice], job: Job) -> None:
    """Log names of the map that no input has."""
    if name_map:
        stored = {name for file in job.source.files for name in file.tensors}
        warn_unknown(name_map, filter(None, (chosen_name(choice, name) for name in stored)), "the input")


def _rename(name_map: Optional[Mapping[str, str]], choice: Optional[Choice]) -> RenameFunction:
    names = checked_name_map(name_map, _DIRECTION)
    checked_choice(choice)

    def rename(name: str) -> Optional[str]:
        chosen = chosen_name(choice, name)
        return None if chosen is None else names.get(chosen, chosen)

    return rename
