"""The argument `adapter` of jobs and loads: a folder with LoRA's products, which are added to a model's weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ms_ckpt_ext.api.arguments import PathLike, path_of

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.huggingface.adapter import Adapter
    from ms_ckpt_ext.engine.source.catalog import Catalog
    from ms_ckpt_ext.formats.registry import Access


def adapter_of(folder: PathLike, access: Access, model: str) -> Adapter:
    """An adapter, for the model in the directory or file `model`; "" where it is in several places.

    Raises UsageError when it changes what the model's config.json ties; else as `read_adapter`.
    """
    from ms_ckpt_ext.engine.huggingface.adapter import read_adapter
    from ms_ckpt_ext.engine.huggingface.sizes import read_config

    found = read_adapter(path_of(folder, "adapter"), access)
    beside = model if os.path.isdir(model) else os.path.dirname(os.path.abspath(model))
    found.require_untied_by(read_config(beside if model else None))
    return found


def with_adapter(catalog: Catalog, rules: Sequence[Rule], folder: PathLike, access: Access, model: str) -> Catalog:
    """A checkpoint as weight rules present it, an adapter's products added before they move weights.

    Raises CoverageError when the checkpoint lacks a weight that it changes, and as `adapter_of` and `proven.ruled`.
    """
    from ms_ckpt_ext.engine.unlisted.proven import ruled

    adapter = adapter_of(folder, access, model)
    return ruled(adapter.added(catalog), adapter.among(rules))
