"""A training's checkpoint to Hugging Face's files: a merge by the inverse of the rules that a load takes.

1. Rules: of a family by its name, of a rule file, or as given; inverted.
2. Names: weights are exported, optimizer states and training scalars are not, and what no rule names is refused.
3. Tied tensors are compared, and written once; a dtype is chosen, or kept.
4. The rest is `merge` with Hugging Face's names: streaming, resumable, whole or not at all.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    any_mode,
    checked_rules,
    checked_words,
    execute_with_progress,
    path_of,
    running,
)
from ms_ckpt_ext.api.huggingface.adapters import adapter_of
from ms_ckpt_ext.api.huggingface.families import SizesLike, family_from
from ms_ckpt_ext.api.jobs import share_of
from ms_ckpt_ext.api.source import Filter, Globs, find_source
from ms_ckpt_ext.engine.files.job import Report, check_apart
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.overwrite import Records
from ms_ckpt_ext.engine.huggingface.companions import adapted, read_companion, read_companions
from ms_ckpt_ext.engine.huggingface.rule_file import Family, family_of_rules
from ms_ckpt_ext.engine.huggingface.sizes import read_config
from ms_ckpt_ext.engine.huggingface.weights import cast, only, require_shapes, require_weights, sort_names, without_ties
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.proven import judged, ruled
from ms_ckpt_ext.errors import UsageError, integer
from ms_ckpt_ext.formats.registry import ENC_KEY_VARIABLE
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.formats.crypto import KeyLike

SHARD_SIZE = "5GB"
"""What transformers takes by default."""
_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
    **dict.fromkeys(("f16", "fp16", "float16"), "F16"),
    **dict.fromkeys(("f32", "fp32", "float32"), "F32"),
}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


@few_collections()
def export(
    src: PathLike,
    dst: PathLike,
    *,
    rules: Optional[Union[PathLike, Sequence[Rule]]] = None,
    config: Optional[PathLike] = None,
    sizes: Optional[SizesLike] = None,
    strategy: Any = None,
    adapter: Optional[PathLike] = None,
    dtype: Optional[str] = None,
    exclude: Globs = (),
    max_shard_size: Union[int, str] = SHARD_SIZE,
    share: Union[tuple[int, int], str] = (1, 1),
    file_suffix: Optional[str] = None,
    format: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    crc_check: bool = False,
    digests: bool = True,
    max_process_num: int = 64,
    buffer_bytes: int = BUFFER_BYTES,
    sync: bool = True,
    dry_run: bool = False,
    allow_equal_slices: bool = False,
) -> Report:
    """Write the weights of a training's checkpoint as Hugging Face's libraries read them, in bounded memory.

    Args:
        src: rank folders, a folder of MindFormers, a merged directory, or a file.
        dst: the directory for `model-0000N-of-0000M.safetensors`, their index, and what lies beside them.
        rules: a family's name ("llama", "qwen2", "qwen3", "qwen3-moe", "deepseek-v3"), the path of a rule file, or a
            list of weight rules: from Hugging Face's names to the training's, as a load takes them. By default those
            of the family that has the architecture of `config`.
        config: the folder of the model on the hub, or its config.json: gives numbers of heads, layers and experts, and
            is copied, with the tokenizer's files if it is a folder. By default config.json in `src`, not copied.
        sizes: key of config.json -> number, and switch of the rule file -> value; they take precedence.
        strategy: of the job that saved rank folders, in any form that `as_strategy` takes.
        adapter: a folder with a LoRA adapter, as PEFT saves it (adapter_config.json, adapter_model.safetensors): its
            products are added to the weights that are exported, in F32, and rounded once.
        dtype: of the floats that are written: "bfloat16", "float16" or "float32"; None for that of the training. Values
            are rounded to the nearest, ties to even. What a rule file exempts keeps its dtype.
        exclude: shell-style globs of names in the training that are left out.
        max_shard_size: bytes of a file at most, or a text as transformers takes it: "5GB" is 5 * 10**9, "5GiB" 5 << 30.
            Only a single larger tensor exceeds it.

    The other arguments, the result and the handling of older results in `dst` are those of `merge`.

    Returns:
        What was read and written; of a dry run, a `Preview`.

    Raises:
        UsageError: wrong arguments; no rule for a parameter that is neither optimizer state nor single value; files of
            others in `dst`. Nothing was written.
        CoverageError: a parameter of the model is not in the checkpoint, or only a part of it.
        LayoutMismatchError: shapes that the rules cannot have made, or tied tensors that differ; an adapter of another
            model.
        others: as `merge`.
    """
    checked_words(export, locals(), ("dtype",))
    target, wanted = path_of(dst, "dst"), Filter((), exclude)
    if ENC_KEY_VARIABLE in os.environ:
        log.warning(
            "%s is set, and what is exported is plain: Hugging Face's libraries read no other", ENC_KEY_VARIABLE
        )
    task, tasks = share_of(share, "share")
    options = MergeOptions(task, tasks, "huggingface", _bytes_of(max_shard_size), digests=digests)
    run = running(max_process_num, buffer_bytes, sync=sync, dry_run=dry_run)
    wanted_dtype = _dtype_of(dtype)
    named = None if config is None else path_of(config, "config")
    family = _family(rules, path_of(src, "src"), named, sizes)
    beside = {} if named is None else read_companions(named)
    source = find_source(src, strategy, file_suffix, any_mode(dec_key, dec_mode, crc_check), format, "src")
    catalog = outgoing(source.slices(allow_equal_slices), family, wanted)
    if adapter is not None:
        added = adapter_of(adapter, source.access, source.path)
        added.require_untied(family.tied)
        catalog = added.merged(catalog, wanted_dtype)
    if wanted_dtype is not None:
        catalog = cast(catalog, wanted_dtype, family.keeps)
    files = adapted(beside, catalog.tensors, wanted_dtype)
    job = merge_job(catalog, target, options).beside(files)
    _refuse_others(target, files)
    check_apart(job, target)
    return execute_with_progress(job, target, run, "export")


def outgoing(catalog: Catalog, family: Family, wanted: Filter) -> Catalog:
    """The weights of a training under Hugging Face's names. Raises as `export`."""
    back = family.back
    found = sort_names(only(catalog, wanted), back, family.leaves)
    require_weights(found, catalog, family, back)
    catalog = only(catalog, set(found.weights).__contains__)
    catalog = judged(ruled(catalog, back))
    require_shapes(catalog, family)
    return without_ties(catalog, family)


def _family(
    rules: Optional[Union[PathLike, Sequence[Rule]]], src: str, named: Optional[str], sizes: Optional[SizesLike]
) -> Family:
    config = read_config(src) if named is None else read_config(named, needed=True)
    if rules is None or isinstance(rules, (str, os.PathLike)):
        return family_from(rules, config, sizes)
    return family_of_rules(checked_rules(rules), config, sizes or {})


def _dtype_of(dtype: Optional[str]) -> Optional[str]:
    if dtype is None:
        return None
    found = _DTYPES.get(str(dtype).rpartition(".")[2].lower())  # torch.bfloat16 is one, too
    if found is None:
        raise UsageError(f"dtype must be one of bfloat16, float16 and float32, or None, got {dtype!r:.60}")
    return found


def _bytes_of(size: Union[int, str]) -> int:
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if isinstance(size, str) and found is None:
        raise UsageError(f"max_shard_size must be a number of bytes or a text such as '5GB' or '500MiB', got {size!r}")
    if found is None:
        return integer(size, "max_shard_size", kind="an int, a number of bytes, or a text such as '5GB'")
    power = "KMGT".index(found[2].upper()) + 1 if found[2] else 0
    base = 1024 if found[3] else 1000
    return int(found[1]) * math.prod([base] * power)


def _refuse_others(target: str, files: Mapping[str, bytes]) -> None:
    """Raise UsageError when a configuration or tokenizer in a folder without a result of ours would be replaced."""
    there = [name for name in files if os.path.lexists(os.path.join(target, name))]
    if not there or Records().names(target):
        return
    for name in there:
        path = os.path.join(target, name)
        if not os.path.isfile(path) or read_companion(path) != files[name]:
            raise UsageError(
                f"{path!r} is not of an earlier export, and this one would replace it by another: choose another "
                "target directory, or move that file away"
            )
