"""The files that lie beside a model's weights: configuration, tokenizer, code. Copied unchanged, except for two keys.

`config.json` tells transformers which dtype the weights have and how they are quantised. Where an export changes that,
it changes these keys as well; else the model would be loaded wrongly.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.engine.huggingface.sizes import CONFIG_NAME
from ms_ckpt_ext.errors import FormatError, storage_error
from ms_ckpt_ext.storage.linux import read_small, status_of
from ms_ckpt_ext.storage.reader import from_json

_GLOBS = ("config.json", "configuration.json", "generation_config.json", "*processor_config.json", "tokenizer*") + (
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.py",
)
_MOST = 256 << 20
"""Limit of bytes of one file; tokenizers have some tens of MiB at most."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def read_companions(folder: str) -> dict[str, bytes]:
    """Name -> contents of the files beside the weights in a folder, or of the one file that is given.

    Raises StorageError.
    """
    if os.path.isfile(folder):
        paths = {CONFIG_NAME: folder}
    else:
        names = (name for name in _listed(folder) if any(fnmatchcase(name, glob) for glob in _GLOBS))
        paths = {name: os.path.join(folder, name) for name in names}
    return {name: read_companion(path) for name, path in paths.items() if _is_copied(path)}


def _is_copied(path: str) -> bool:
    status = status_of(path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return False
    if status.st_size > _MOST:
        log.warning("%r is too large to be a tokenizer or a configuration, and is not copied", path)
    return status.st_size <= _MOST


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise storage_error("list the folder of config.json", folder, error) from error


def read_companion(path: str) -> bytes:
    """The contents of a file. Raises StorageError."""
    try:
        return read_small(path)
    except OSError as error:
        raise storage_error("read", path, error) from error


def adapted(files: Mapping[str, bytes], names: Iterable[str], dtype: Optional[str]) -> dict[str, bytes]:
    """The files, with a config.json that matches the exported weights.

    Args:
        names: of the exported tensors.
        dtype: theirs, if it was chosen.

    Raises FormatError: config.json is no JSON object.
    """
    found = dict(files)
    if CONFIG_NAME not in found:
        return found
    config = _object(found[CONFIG_NAME])
    changed = dict(config)
    if dtype in _DTYPES:
        changed.update({key: _DTYPES[dtype] for key in ("torch_dtype", "dtype") if key in config})
    scaled = any(name.endswith(("_scale_inv", "_scale", "_scales")) for name in names)
    if "quantization_config" in config and not scaled:
        log.warning("config.json speaks of quantisation, and the exported weights are plain: the entry is left out")
        del changed["quantization_config"]
    if changed != config:
        found[CONFIG_NAME] = _text(changed)
    return found


def _object(text: bytes) -> dict[str, Any]:
    try:
        config = from_json(text)
    except ValueError as error:
        raise FormatError(f"{CONFIG_NAME} beside the weights is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG_NAME} beside the weights is no JSON object, but {type(config).__name__}")
    return config


def _text(config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        return (json.dumps(config, indent=2) + "\n").encode()
