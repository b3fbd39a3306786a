"""A checkpoint into a network under another strategy, or cut anew into files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    Running,
    access_of,
    as_strategy,
    checked_format,
    checked_naming,
    checked_rules,
    checked_words,
    execute_with_progress,
    mode_of,
    path_of,
    running,
    seal_of,
)
from ms_ckpt_ext.api.mindspore.given_files import FilesToLoad, GivenFiles
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.errors import CheckpointError, UsageError, integer
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Choice, Naming
    from ms_ckpt_ext.formats.crypto import KeyLike


@few_collections()
def load_distributed_checkpoint(
    network: Any,
    checkpoint_filenames: Optional[Union[Sequence[PathLike], PathLike]] = None,
    predict_strategy: Any = None,
    train_strategy_filename: Any = None,
    strict_load: bool = False,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    format: str = "ckpt",
    unified_safetensors_dir: Optional[PathLike] = None,
    dst_safetensors_dir: Optional[PathLike] = None,
    rank_id: Optional[int] = None,
    output_format: str = "safetensors",
    name_map: Optional[Mapping[str, str]] = None,
    max_process_num: Optional[int] = 64,
    return_param_dict: bool = False,
    *,
    file_suffix: Optional[str] = None,
    buffer_bytes: int = BUFFER_BYTES,
    digests: bool = True,
    sync: bool = True,
    mode: Optional[str] = None,
    bucket_bytes: Optional[int] = None,
    prefetch: int = 1,
    verify: str = "none",
    trace: Optional[PathLike] = None,
    timeout: float = 600.0,
    crc_check: bool = False,
    crc: bool = False,
    enc_key: Optional[KeyLike] = None,
    enc_mode: str = "AES-GCM",
    rules: Sequence[Rule] = (),
    adapter: Optional[PathLike] = None,
    choice_func: Optional[Choice] = None,
    allow_equal_slices: bool = False,
    hardware: PathLike = "",
) -> Any:
    """Load a checkpoint into a network under another strategy, or cut it anew into files.

    Drop-in for `mindspore.load_distributed_checkpoint`; the arguments up to `return_param_dict` are MindSpore's.

    With a network, this is a collective call: either each rank reads just the bytes of its own slices, straight into
    its Parameters, or all ranks together read every byte once and exchange (see `mode`). With
    `network=None` (save mode) the slices of `rank_id`, or of every rank, go to
    `dst_safetensors_dir/rank_{N}/net.{output_format}`.

    Args:
        network: the `Cell` to fill, or None.
        checkpoint_filenames: with format="ckpt": the file of every rank of the job that saved, in the order of ranks;
            or a directory, as `unified_safetensors_dir`. Of a list of files only what the strategies list is
            loaded, as in MindSpore: learning rates, counters and frozen parameters stay as the network has them.
        predict_strategy: layouts of the target: a strategy file or directory, the dict of
            `build_searched_strategy`, `Cell.parameter_layout_dict` or `Model.infer_predict_layout()`, or None for one
            device.
        train_strategy_filename: strategy that cut the source, in any form that `as_strategy` takes, also a list of a
            file and what it lacks; needed when that is sharded. With
            `checkpoint_filenames` the default is the one that `AutoParallel` or the context names.
        strict_load: refuse to cast between dtypes of a family and to match names by suffix. Suffixes match
            names that differ by a wrapper's prefix; never an optimizer's state, and never where several would fit, see
            `core.planning.suffixes`.
        dec_key, dec_mode: of an encrypted source, of either format; as in `unified_safetensors`.
        format: "ckpt" or "safetensors".
        unified_safetensors_dir: a merged checkpoint, or a sharded one (`rank_{N}/…`): no merge is needed first.
        dst_safetensors_dir: target of save mode.
        output_format: of save mode: "safetensors" or "ckpt".
        rank_id: rank of save mode; None for all.
        name_map: name in the network (or target strategy) -> name in the checkpoint (as `choice_func` left it). It
            takes precedence over a parameter that already has that name; several names may share a source, and a source
            keeps its own name, too (in save mode, where `predict_strategy` lists it).
        max_process_num: upper bound on worker threads; None for as many as help.
        return_param_dict: with a network: return `{name: Parameter}` instead of filling it.
        file_suffix, buffer_bytes, crc_check, allow_equal_slices: as in `unified_safetensors`.
        digests, sync, crc, enc_key, enc_mode: the same, for save mode.
        mode, bucket_bytes, prefetch, verify, trace, timeout, hardware: of a load into a network, see
            `ms_ckpt_ext.engine.load.options.LoadOptions`. Defaults are in the environment variables
            MS_CKPT_EXT_MODE and MS_CKPT_EXT_HARDWARE.
        rules: weight rules (`ms_ckpt_ext.rules`) that make the network's parameters from the checkpoint's: renamed,
            joined, interleaved, stacked, transposed. `choice_func` and `name_map` then speak of what the rules make.
        adapter: a folder with a LoRA adapter, as PEFT saves it, of a model by Hugging Face's names; every host sees it.
            Its products are added to the weights before the rules move them.
        choice_func: name in the checkpoint -> True (keep), False (leave out) or a str (new name); before `name_map`.

    Returns:
        `(param_not_load, ckpt_not_load)` as `load_param_into_net` gives them, or the parameter dict; True in save mode,
        and for calls with `checkpoint_filenames` as MindSpore takes them: the log says what is missing.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments, also those of a load into a network in save mode; nothing was
            changed.
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was changed.
            LayoutMismatchError also for names that suffixes match in several ways.
        DisagreementError, PeerError, TransportError: ranks differ in their inputs, another rank failed, or is gone.
        ChecksumError: verify="full", and the files do not match their digests; nothing was changed.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    checked_words(load_distributed_checkpoint, locals(), ("return_param_dict",))
    mindspores = _is_mindspores(locals())
    checked_format(format, "format")
    checked_format(output_format, "output_format")
    asked = _Asked(
        GivenFiles(format, checkpoint_filenames, unified_safetensors_dir, file_suffix, adapter),
        train_strategy_filename,
        predict_strategy,
        access_of(dec_key, dec_mode, crc_check),
        checked_naming(choice_func, name_map),
        checked_rules(rules),
        allow_equal_slices,
        running(max_process_num, buffer_bytes, sync=sync, least=1 if network is None and rank_id is None else 0),
    )
    seal = seal_of(enc_key, enc_mode)
    options = LoadOptions(
        mode=mode_of(mode) if network is not None else mode or "auto",
        bucket_bytes=bucket_bytes,
        prefetch=prefetch,
        verify=verify,
        trace="" if trace is None else path_of(trace, "trace"),
        timeout=timeout,
        hardware=hardware,
    )
    if network is None:
        _refuse_live(options, mode)
        _save(asked, dst_safetensors_dir, rank_id, output_format, crc=crc, seal=seal, digests=digests)
        return True
    if return_param_dict and verify != "none":
        raise UsageError(f"verify={verify!r} is for loads into a network, not for return_param_dict")
    found = _load(network, asked, strict_load, options, return_param_dict)
    return True if mindspores and not return_param_dict else found


class _Asked(NamedTuple):
    """What a load into a network and save mode have in common: the source, the layouts, and what is made of it."""

    files: GivenFiles
    trained: Any
    target: Any
    access: Access
    naming: Optional[Naming]
    rules: tuple[Rule, ...]
    allow_equal_slices: bool
    run: Running

    def place(self, network: Any) -> FilesToLoad:
        """Where the source is, with the strategy that cut it; for `checkpoint_filenames` by default the network's."""
        filename = self.trained
        if filename is None and network is not None and self.files.filenames is not None:
            from ms_ckpt_ext.bridge.world import training_strategy_file

            filename = training_strategy_file(network)
        return self.files.checked(as_strategy(filename, argument="train_strategy_filename"), self.access)


def _load(network: Any, asked: _Asked, strict: bool, options: LoadOptions, as_dict: bool) -> Any:
    """Load into a network, or as a dictionary of Parameters; returns what the call returns."""
    from ms_ckpt_ext.bridge.request import LoadRequest
    from ms_ckpt_ext.bridge.settle import Manner
    from ms_ckpt_ext.bridge.world import own_rank, world_size

    alone = as_dict or (options.mode == "direct" and options.verify == "none")
    rank = own_rank()
    try:
        place = asked.place(network)
        target = as_strategy(asked.target, rank, "predict_strategy")
    except CheckpointError as error:
        if alone:
            raise
        from ms_ckpt_ext.bridge.together import give_up

        give_up(error, options.timeout)
    request = LoadRequest(
        network,
        target,
        rank,
        Manner(strict, exact=strict, listed=asked.files.listed),
        place.rules(asked.rules),
        asked.naming,
        asked.allow_equal_slices,
        options,
        asked.run.workers,
        asked.run.limits,
    )
    if not alone:
        from ms_ckpt_ext.bridge.together import SharedSource, fill_together

        named = {str(number): path for number, path in enumerate(place.named)}
        return fill_together(request, SharedSource(place.look, place.trained, asked.access, named))[:2]
    from ms_ckpt_ext.bridge import network as live

    if world_size() == 1:
        place.require_named()
    catalog = request.read(place.look(), place.trained, asked.access)
    return live.network_dict(request, catalog) if as_dict else live.fill(request, catalog)[:2]


def _save(asked: _Asked, directory: Any, rank_id: Optional[int], form: str, **how: Any) -> None:
    """Write files; for `how`, see `engine.files.reshard.folders_job`."""
    from ms_ckpt_ext.engine.files.reshard import folders_job
    from ms_ckpt_ext.engine.unlisted.proven import ruled
    from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices

    place = asked.place(None)
    target = path_of(directory, "dst_safetensors_dir")
    rank_id = None if rank_id is None else integer(rank_id, "rank_id", 0, "an int or None")
    strategy = as_strategy(asked.target, rank_id or 0, "predict_strategy")
    ranks = _ranks_of(rank_id, strategy)
    place.require_named()
    stored = read_slices(place.look(), place.trained, asked.access, asked.allow_equal_slices)
    catalog = ruled(stored, place.rules(asked.rules)).called(asked.naming)
    job, target = folders_job(catalog, strategy, ranks, rank_id is not None, target, form, **how)
    execute_with_progress(job, target, asked.run, "reshard")


def _is_mindspores(given: Mapping[str, Any]) -> bool:
    """Whether a call names files one by one and MindSpore would take it, too: then it returns True."""
    trained, wanted = given["train_strategy_filename"], given["predict_strategy"]
    return (
        isinstance(given["checkpoint_filenames"], (list, tuple))
        and all(given[name] == default for name, default in _DEFAULTS.items())
        and (trained is None or (isinstance(trained, str) and not os.path.isdir(trained)))
        and (wanted is None or isinstance(wanted, Mapping))
    )


_DEFAULTS: Mapping[str, Any] = vars(load_distributed_checkpoint)["__wrapped__"].__kwdefaults__
_INSTEAD = {
    "verify": "check the source with ms_ckpt_ext.verify before, or the result after; crc_check=True verifies checksums",
    "mode": "a job without a network is always read directly",
    "bucket_bytes": "buffer_bytes and max_process_num bound the memory of a job that writes files",
    "prefetch": "max_process_num says how many reads are under way",
    "trace": "the report of ms_ckpt_ext.reshard tells what was read and written",
    "timeout": "ranks that write files do not wait for each other",
    "hardware": "it chooses between ways of an exchange, and nothing is exchanged",
}
"""Arguments of this package that only apply to loads into a network, and what to do in save mode."""


def _refuse_live(options: LoadOptions, mode: Optional[str]) -> None:
    """Raise UsageError for what save mode would ignore: a check that was asked for must not seem to be made."""
    given, plain = vars(options), vars(LoadOptions())
    for name in _INSTEAD:
        if mode is not None if name == "mode" else given[name] != plain[name]:
            raise UsageError(f"{name} is for loads into a network, and there is none (save mode): {_INSTEAD[name]}")


def _ranks_of(rank_id: Optional[int], strategy: Optional[Strategy]) -> list[int]:
    if rank_id is None:
        if strategy is not None:
            strategy.check_complete()
        return list(range(strategy.world if strategy else 1))
    if strategy is not None and rank_id >= strategy.world:
        raise UsageError(f"rank_id must be between 0 and {strategy.world - 1} under predict_strategy, got {rank_id}")
    return [rank_id]
