"""Go on training, or serve, from whatever a training job left in a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, TypeVar

from ms_ckpt_ext import log
from ms_ckpt_ext.api.arguments import (
    BUFFER_BYTES,
    PathLike,
    access_of,
    as_strategy,
    checked_format,
    checked_naming,
    checked_rules,
    checked_words,
    limits_of,
    mode_of,
    path_of,
    workers_of,
)
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.resume.newest import Chosen, ResumeRequest, Skipped
from ms_ckpt_ext.errors import ArgumentTypeError, CheckpointError, DiscoveryError, UsageError, integer, true_or_false
from ms_ckpt_ext.formats.discovery.whole_models import instead
from ms_ckpt_ext.storage.threads import few_collections

if TYPE_CHECKING:
    from ms_ckpt_ext.bridge.request import LoadRequest
    from ms_ckpt_ext.bridge.restore import Resumed
    from ms_ckpt_ext.core.geometry.strategy import Strategy
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.resume.scalars import Value
    from ms_ckpt_ext.engine.source.renaming import Choice

N = TypeVar("N", int, float)
DIRECTORY_VARIABLE = "MS_CKPT_EXT_CHECKPOINT_DIR"
STRATEGY_VARIABLE = "MS_CKPT_EXT_TRAIN_STRATEGY"
PREFIX_VARIABLE = "MS_CKPT_EXT_PREFIX"
CHECKS = ("headers", "digests")


@dataclass(frozen=True)
class Restored:
    """What was loaded.

    Attributes:
        checkpoint: path of the chosen one: its folder, and what its files' names share; None if there was none.
        epoch, step, loss_scale: of the training when it was saved, from the records, else from the file; None where
            neither says. Without a checkpoint, epoch and step are 0.
        scalars: what the file holds outside the strategy: name -> numpy array of one element, or text.
        not_loaded: Parameters that got nothing: with `allow_missing`, or learning rates of another shape, which are of
            another schedule and stay as the network has them.
        unused: names in the checkpoint that went nowhere.
        skipped: newer checkpoints that are not complete, newest first, and others that might be taken for newer:
            (name, reason).
        mode: "direct" or "cooperative"; "peers" where nothing was read from files.
        bytes_read: bytes that this rank read from storage, without headers.
        bytes_from_peers: bytes that this rank received from ranks whose Parameters are good.
    """

    checkpoint: Optional[str]
    epoch: Optional[int] = 0
    step: Optional[int] = 0
    loss_scale: Optional[float] = None
    scalars: Mapping[str, Value] = field(default_factory=dict)
    not_loaded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    mode: str = ""
    bytes_read: int = 0
    bytes_from_peers: int = 0


@few_collections()
def resume(
    network: Any,
    optimizer: Any = None,
    checkpoint_dir: Optional[PathLike] = None,
    *,
    predict_strategy: Any = None,
    train_strategy_filename: Any = None,
    required: bool = True,
    allow_missing: bool = False,
    strict_load: bool = True,
    format: Optional[str] = None,
    prefix: Optional[str] = None,
    choice_func: Optional[Choice] = None,
    name_map: Optional[Mapping[str, str]] = None,
    rules: Sequence[Rule] = (),
    dec_key: Any = None,
    dec_mode: str = "AES-GCM",
    check: str = "headers",
    mode: Optional[str] = None,
    bucket_bytes: Optional[int] = None,
    prefetch: int = 1,
    verify: str = "none",
    trace: Optional[PathLike] = None,
    hardware: PathLike = "",
    max_process_num: int = 64,
    timeout: float = 600.0,
    allow_equal_slices: bool = False,
    alive: Optional[bool] = None,
    alive_step: Optional[int] = None,
) -> Restored:
    """Load the newest complete checkpoint of a directory, saved under any strategy, and say where the training was.

    Collective: all ranks call it and take the same checkpoint. One that is not complete is skipped, and the log says
    why: files of ranks missing or cut short, layouts missing or of another job, records that do not fit.

    Args:
        network: the train cell, compiled where it is parallel.
        optimizer: the optimizer, if its states are not in `network`.
        checkpoint_dir: see `engine.resume.candidates` for what is found there; or one file, or the index of a model in
            parts.
            Default: MS_CKPT_EXT_CHECKPOINT_DIR.
        predict_strategy: layouts of this job, in any form that `load_distributed_checkpoint` takes. Default:
            `network.parameter_layout_dict`.
        train_strategy_filename: layouts of the job that saved. Default: MS_CKPT_EXT_TRAIN_STRATEGY, else those that
            `CheckpointRecorder` noted, else what lies in `strategy/` in or beside the checkpoint's folder.
        required: raise when there is no complete checkpoint; else start anew, from what the network holds.
        allow_missing: Parameters that the checkpoint lacks keep their values; else they are an error.
        strict_load: refuse to cast between dtypes of a family and to match names by suffix. Unlike in
            `load_distributed_checkpoint` this is the default: a training goes on exactly as it was, or not at all.
        format: "safetensors" or "ckpt", where a directory holds both.
        prefix: of the saves that count, as `ModelCheckpoint` was given it, where several savers share a directory. Its
            later runs (`net_1`, …) are meant, too. Default: MS_CKPT_EXT_PREFIX, else all.
        choice_func, name_map: as in `load_distributed_checkpoint`: name in the checkpoint -> True (take it), False
            (leave it) or a str (new name); then name in the network -> that name.
        rules: weight rules (`ms_ckpt_ext.rules`), as in `load_distributed_checkpoint`.
        dec_key, dec_mode: of encrypted files, as in `load_distributed_checkpoint`.
        check: "headers": all files are there and long enough. "digests": also every tensor is as it was saved, where
            digests were recorded; reads the checkpoint once more.
        mode, bucket_bytes, prefetch, verify, trace, hardware, timeout: see
            `ms_ckpt_ext.engine.load.options.LoadOptions`; the default of `mode` is MS_CKPT_EXT_MODE, else "auto"; of
            `hardware` MS_CKPT_EXT_HARDWARE, else what fits the NPU.
        max_process_num, allow_equal_slices: as in `load_distributed_checkpoint`.
        alive: whether this rank's Parameters still hold what the training made of them; given by all ranks, or by none.
            What a rank lost and another has comes from that rank; only what no rank has is read from files. The
            checkpoint must then be of the same step, and the layouts of this job those of the ranks that are alive.
        alive_step: the step of these Parameters. Default: the network's Parameter `step_num` or `global_step`.

    Returns:
        What was loaded, of which epoch and step; `Restored(None)`, of step 0, where nothing is there and `required` is
        False.

    Raises:
        UsageError, ArgumentTypeError: wrong arguments.
        DiscoveryError: no complete checkpoint, and one is required; says what was skipped and why. Or several whole
            ones are equally new, of different prefixes, formats or folders, and it is not clear which is meant.
        DisagreementError: ranks look into different directories, or for different things.
        LayoutMismatchError, CoverageError, LoadError, PeerError, TransportError: as in `load_distributed_checkpoint`.
    """
    checked_words(resume, locals())
    if isinstance(optimizer, (str, os.PathLike)):
        raise ArgumentTypeError("optimizer must be a Cell or None; give the directory as checkpoint_dir=…")
    from ms_ckpt_ext.bridge.request import LoadRequest
    from ms_ckpt_ext.bridge.restore import fill_newest
    from ms_ckpt_ext.bridge.settle import Manner
    from ms_ckpt_ext.bridge.together import host_name

    directory = path_of(checkpoint_dir or os.environ.get(DIRECTORY_VARIABLE), "checkpoint_dir")
    checked_format(format, "format", optional=True)
    peers = _alive(alive, alive_step)
    if check not in CHECKS:
        raise UsageError(f"check must be one of {', '.join(CHECKS)}; got {check!r}")
    naming = checked_naming(choice_func, name_map)
    options = LoadOptions(
        mode_of(mode),
        bucket_bytes,
        prefetch,
        verify=verify,
        trace="" if trace is None else path_of(trace, "trace"),
        timeout=timeout,
        hardware=hardware,
    )
    access, weight_rules = access_of(dec_key, dec_mode), checked_rules(rules)
    ready = _ready(network, optimizer, predict_strategy, train_strategy_filename, timeout)
    named = prefix or os.environ.get(PREFIX_VARIABLE) or None
    wanted = ResumeRequest(
        directory, host_name(options), ready.trained, format, access, check == "digests", named, peers=peers is not None
    )
    request = LoadRequest(
        ready.cell,
        ready.target,
        ready.rank,
        Manner(strict_load, exact=strict_load, require_all=not allow_missing),
        weight_rules,
        naming,
        allow_equal_slices,
        options,
        workers_of(max_process_num),
        limits_of(BUFFER_BYTES),
    )
    if peers is not None:
        return _from_peers(request, wanted, peers, required)
    resumed, skipped = fill_newest(request, wanted)
    if resumed is None:
        return _nothing(directory, required, skipped)
    return _restored(directory, resumed, skipped)


def _alive(alive: Optional[bool], step: Optional[int]) -> Optional[tuple[bool, Optional[int]]]:
    """What this rank says of its Parameters; None where nobody is asked."""
    if alive is None:
        if step is not None:
            raise UsageError("alive_step is the step of Parameters that are good: give alive=True with it")
        return None
    return true_or_false(alive, "alive"), None if step is None else integer(step, "alive_step", 0)


def _from_peers(
    request: LoadRequest, wanted: ResumeRequest, alive: tuple[bool, Optional[int]], required: bool
) -> Restored:
    """A resume in which ranks give each other what they have."""
    from ms_ckpt_ext.bridge.peers import Alive, fill_with_peers

    found = fill_with_peers(request, wanted, Alive(*alive), lambda chosen: _progress(chosen)[1])
    if found.resumed is not None:
        return replace(_restored(wanted.directory, found.resumed, found.skipped), bytes_from_peers=found.received)
    if found.step is None:
        return _nothing(wanted.directory, required, found.skipped)
    log.info("resumed from ranks whose Parameters are good: step %s", found.step)
    return Restored(None, None, found.step, mode="peers", bytes_from_peers=found.received)


class _Ready(NamedTuple):
    """What this rank fills, and the layouts: of the job that saved, where they were given, and of this one."""

    cell: Any
    rank: int
    trained: Optional[Strategy]
    target: Optional[Strategy]


def _ready(network: Any, optimizer: Any, predicted: Any, trained: Any, timeout: float) -> _Ready:
    """Raises what is wrong with the arguments; the other ranks are informed."""
    from ms_ckpt_ext.bridge.restore import both, layouts_of
    from ms_ckpt_ext.bridge.together import give_up
    from ms_ckpt_ext.bridge.world import own_rank

    rank, given = own_rank(), trained or os.environ.get(STRATEGY_VARIABLE) or None
    try:
        cell = both(network, optimizer)
        strategy = as_strategy(given, argument="train_strategy_filename")
        target = as_strategy(layouts_of(network) if predicted is None else predicted, rank, "predict_strategy")
    except CheckpointError as error:
        give_up(error, timeout)
    return _Ready(cell, rank, strategy, target)


def _restored(directory: str, resumed: Resumed, skipped: tuple[Skipped, ...]) -> Restored:
    """The result of a load from a directory, which is also logged."""
    chosen, filled = resumed
    restored = Restored(
        directory if os.path.isfile(directory) else os.path.normpath(os.path.join(directory, chosen.candidate.title)),
        *_progress(chosen),
        chosen.scalars,
        tuple(filled.missing),
        tuple(filled.unused),
        skipped,
        filled.report.mode,
        filled.report.reads.nbytes,
    )
    log.info("resumed from %s: epoch %s, step %s", restored.checkpoint, restored.epoch, restored.step)
    return restored


@few_collections()
def load_for_inference(
    network: Any, checkpoint_dir: Optional[PathLike] = None, *, strict_load: bool = False, **options: Any
) -> Restored:
    """Fill a network that has no optimizer from a training job's checkpoint, a merged one or a Hugging Face directory.

    As `resume`, and with the same keywords. What the network has no Parameter for is not read: of a training
    checkpoint only the weights are read, not the optimizer states, which are usually two thirds of it. With
    data-parallel replicas every byte is read by one rank and exchanged, unless reading is the cheaper way (see `mode`).

    Args:
        network: the network to serve, compiled where it is parallel.
        checkpoint_dir: as in `resume`.
        strict_load: as in `resume`. By default dtypes are cast (a float32 training, a bfloat16 network), and names
            matched by suffix where the training wrapped the network (see `core.planning.suffixes`).
        **options: the other keywords of `resume`, above all `predict_strategy`, `name_map` and `rules`.

    Returns:
        What was loaded, and from which checkpoint and step.

    Raises:
        as `resume`; a Parameter that got nothing is an error unless `allow_missing` is set.
    """
    return resume(network, None, checkpoint_dir, strict_load=strict_load, **options)


def _nothing(directory: str, required: bool, skipped: tuple[Skipped, ...]) -> Restored:
    told = "".join(f"\n  {name}: {reason}" for name, reason in skipped)
    if required:
        raise DiscoveryError(
            f"{directory!r} holds no complete checkpoint; "
            + (
                f"these were skipped:{told}"
                if told
                else f"nothing there looks like one{instead(directory)}: check the path"
            )
        )
    log.warning("no complete checkpoint in %r: training starts anew%s", directory, told)
    return Restored(None, skipped=skipped)


def _progress(chosen: Chosen) -> tuple[Optional[int], Optional[int], Optional[float]]:
    """(epoch, step, loss scale): as recorded, else as MindSpore and MindFormers keep them among the parameters."""
    record = chosen.candidate.records[0] if chosen.candidate.records else None

    def told(noted: Any, *names: str) -> Any:
        kept = (chosen.scalars[name] for name in names if name in chosen.scalars)
        return noted if noted is not None else next((v.item() for v in kept if not isinstance(v, str)), None)

    return (
        _number(int, "epoch", told(record and record.epoch, "epoch_num")),
        _number(int, "step", told(record and record.step, "step_num", "global_step")),
        _number(float, "loss scale", told(record and record.loss_scale, "loss_scale", "scale_sense")),
    )


def _number(kind: Callable[[Any], N], what: str, value: Any) -> Optional[N]:
    """A number of a checkpoint; None, with a warning, for what is not one, such as an infinite step."""
    try:
        return None if value is None else kind(value)
    except (TypeError, ValueError, OverflowError):
        log.warning("the checkpoint has %r for the %s, which is no such number", value, what)
        return None
