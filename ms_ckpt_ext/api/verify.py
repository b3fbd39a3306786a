"""Proof that a checkpoint is what it should be: against another one, against its digests, against its strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import (
    PathLike,
    any_mode,
    checked_name_map,
    checked_naming,
    checked_rules,
    checked_words,
    path_of,
    workers_of,
)
from ms_ckpt_ext.api.source import Filter, Globs, find_source
from ms_ckpt_ext.engine.integrity import soundness
from ms_ckpt_ext.engine.integrity.compare import Comparison, compare
from ms_ckpt_ext.engine.integrity.folder import ManifestCheck, check_listed, find_listed
from ms_ckpt_ext.engine.integrity.pairing import Kept, everything, pair_up
from ms_ckpt_ext.engine.integrity.soundness import Health
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.renaming import Choice
from ms_ckpt_ext.engine.unlisted.alike import Depth, compared
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.crypto import KeyLike
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule


@few_collections()
def verify(
    a: PathLike,
    b: Optional[PathLike] = None,
    *,
    strategy: Any = None,
    strategy_b: Any = None,
    manifest: bool = False,
    match: Globs = (),
    exclude: Globs = (),
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    rules: Sequence[Rule] = (),
    adapter: Optional[PathLike] = None,
    file_suffix: Optional[str] = None,
    file_suffix_b: Optional[str] = None,
    dec_key: Optional[KeyLike] = None,
    dec_key_b: Optional[KeyLike] = None,
    dec_mode: Optional[str] = None,
    dec_mode_b: Optional[str] = None,
    max_process_num: int = 64,
    allow_equal_slices: bool = False,
) -> Union[Comparison, Health, ManifestCheck]:
    """Verify a checkpoint against another one, against its manifest of digests, or by itself.

    With `b`: are both the same model? Layouts, formats and encryption may differ; values are compared bit for bit,
    region by region, in memory that does not grow with the model. With `manifest`: does every tensor have the digest
    that `ms_ckpt_ext.digests.json` gives it? Digests of encrypted files need their key, without which these files count
    as not checked. An encrypted file without digests is decrypted whole instead; in a mode without authentication it
    counts as not checked. Otherwise: is every slice there, are all copies of a slice equal, is no slice a whole
    parameter, and what is NaN or infinite? Without `b`, checksums that files carry are verified as well.

    Args:
        a, b: checkpoints: a file, rank folders, or a merged directory.
        strategy, strategy_b: of the jobs that saved them, where they are rank folders.
        manifest: compare `a` with the digests in its `ms_ckpt_ext.digests.json`.
        match, exclude: shell-style globs of parameter names (as `a` has them after `choice_func`); all by default.
            Findings have the names in `b`.
        choice_func: with `b`: parameter name in `a` -> True (compare it), False (leave it out) or a str (a new name).
        name_map: with `b`: parameter name in `b` -> name in `a` after that. Give both as the job that made `b` from `a`
            had them, but turn the map of a conversion round: it goes from `a` to `b`.
        rules: with `b`: weight rules (`ms_ckpt_ext.rules`) that made `b` from `a`, applied to `a` first. What they
            compute is computed again, and compared bit for bit.
        adapter: with `b`: the folder of the adapter that was added to `a`, as `merge` and `reshard` take it.
        file_suffix, file_suffix_b: which file of a rank folder; None for the newest.
        dec_key, dec_key_b: keys of encrypted checkpoints; by default the one in MS_CKPT_EXT_DEC_KEY, where needed.
        dec_mode, dec_mode_b: the container that is expected; None for whatever a file is.
        max_process_num: upper bound on worker threads.
        allow_equal_slices: without `b`: slices that are all equal are intended, and no fault; see
            `engine.unlisted.whole_slices`.

    Returns:
        What was compared and what was found; its `ok` says whether all is as it should be.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, or globs that leave nothing to verify.
        DiscoveryError: no checkpoint, or no manifest, there.
        CoverageError: one of two checkpoints lacks a region that it should hold.
        StrategyError, FormatError, LayoutMismatchError, StorageError: an input cannot be read.
    """
    checked_words(verify, locals())
    workers, wanted, access = workers_of(max_process_num), Filter(match, exclude), any_mode(dec_key, dec_mode)
    naming, names = checked_naming(choice_func, None), checked_name_map(name_map)
    weight_rules = checked_rules(rules)
    if b is None and (choice_func is not None or names or weight_rules or adapter is not None):
        raise UsageError("choice_func, name_map, rules and adapter say how b was made of a: give b, or leave them out")
    if manifest:
        if b is not None or strategy is not None or wanted:
            raise UsageError("manifest compares files with their digests: it takes no b, strategy, match or exclude")
        return _by_manifest(path_of(a, "a"), access, workers)
    first = find_source(a, strategy, file_suffix, access, argument="a")
    if b is None:
        return _by_itself(first.open(), first.strategy, wanted, workers, allow_equal_slices)
    second = find_source(b, strategy_b, file_suffix_b, any_mode(dec_key_b, dec_mode_b), argument="b")
    catalog = first.ruled(first.open(), weight_rules, adapter).called(naming)
    return _against(catalog, second.open(), names, wanted, workers)


def _against(a: Catalog, b: Catalog, names: Mapping[str, str], wanted: Filter, workers: int) -> Comparison:
    """Compare what is `wanted` of two checkpoints; `names` maps names in `b` to names in `a`."""
    one = compared(a, filter(wanted, a.unproven), depth=Depth.ALL)
    two = compared(b, [name for name in b.unproven if wanted(names.get(name, name))], depth=Depth.ALL)
    held = everything(two)
    known = {name: source for name, source in names.items() if name in held}
    mine = _by_names_of_b(everything(one), held, known)
    wanted.check(known.get(name, name) for name in (*mine, *held))
    one.require(filter(wanted, one.absent))
    two.require(name for name in two.absent if wanted(names.get(name, name)))
    pairing = pair_up(wanted.of(mine, known), wanted.of(held, known))
    with log.progress_bar("verify", pairing.nbytes) as advance:
        return compare(pairing, one, two, workers, progress=advance)


def _by_names_of_b(a: Mapping[str, Kept], b: Mapping[str, Kept], names: Mapping[str, str]) -> dict[str, Kept]:
    """What should be in `b`: what `a` holds, by the names that a job with this map gives it.

    A source that `b` has only under another name is not missing.
    """
    found = {name: tensor for name, tensor in a.items() if name not in names}
    found.update({name: a[source] for name, source in names.items() if source in a})
    for source in set(names.values()) - names.keys() - b.keys():
        found.pop(source, None)
    return found


def _by_itself(catalog: Catalog, strategy: Any, wanted: Filter, workers: int, allow_equal: bool) -> Health:
    outside = {**catalog.extras, **catalog.unproven, **catalog.own}
    wanted.check((*catalog.tensors, *outside, *(strategy.layouts if strategy else ())))
    tensors = wanted.of(catalog.tensors)
    with log.progress_bar("verify", soundness.bytes_to_read(catalog, tensors, wanted)) as advance:
        return soundness.check_values(catalog, tensors, strategy, wanted, workers, advance, allow_equal)


def _by_manifest(path: str, access: Access, workers: int) -> ManifestCheck:
    listed = find_listed(path)
    with log.progress_bar("verify", listed.nbytes) as advance:
        return check_listed(listed, access, workers, advance)
