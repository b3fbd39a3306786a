"""What only MindSpore's own `load_checkpoint` serves: refused, so that `install` notices and calls it."""

from __future__ import annotations

import os
from typing import Any

from ms_ckpt_ext.engine.source.catalog import Catalog, file_catalog
from ms_ckpt_ext.errors import MapParameterError, UnsupportedError
from ms_ckpt_ext.formats.registry import Access

_CACHE_KEY = ".__param_key__"
"""Part of the names under which MindSpore's parameter server stores its cache of an embedding table."""


def refuse_what_is_no_file(given: Any) -> None:
    """Raise UnsupportedError for contents in memory, and where checkpoints are not kept in files."""
    if hasattr(given, "read"):
        raise UnsupportedError(
            "ckpt_file_name must be a path; contents in memory are for mindspore.load_checkpoint", "ckpt_file_name"
        )
    if os.environ.get("AITURBO") == "1":
        raise UnsupportedError(
            "AITURBO=1 keeps checkpoints in a store of its own, which mindspore.load_checkpoint reads", "ckpt_file_name"
        )


def file_without_tables(source: str, access: Access) -> Catalog:
    """Open a file. Raises UnsupportedError for what a parameter server keeps beside or instead of parameters."""
    try:
        catalog = file_catalog(source, access)
    except MapParameterError as error:
        raise UnsupportedError(str(error), "ckpt_file_name") from error
    cached = next((name for name in catalog.tensors if _CACHE_KEY in name), None)
    if cached is not None:
        raise UnsupportedError(
            f"{source!r} holds {cached!r}, of a parameter server's cache; load it with mindspore.load_checkpoint",
            "ckpt_file_name",
        )
    return catalog
