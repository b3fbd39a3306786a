"""What users may pass, checked once and turned into the values that jobs take."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Union

from ms_ckpt_ext import log
from ms_ckpt_ext.core.geometry.strategy import (
    Strategy,
    layouts_by_name,
    strategy_from_layout_dict,
    strategy_from_messages,
)
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError, also, integer, true_or_false
from ms_ckpt_ext.formats.crypto import GCM
from ms_ckpt_ext.formats.registry import DEC_KEY_VARIABLE, ENC_KEY_VARIABLE, Access
from ms_ckpt_ext.formats.table import FORMATS

if TYPE_CHECKING:
    from ms_ckpt_ext.core.geometry.supplement import StrategyPart
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.files.encrypted_sink import Seal
    from ms_ckpt_ext.engine.files.job import Job, Report
    from ms_ckpt_ext.engine.source.renaming import Choice, Naming
    from ms_ckpt_ext.formats.crypto import Key

PathLike = Union[str, "os.PathLike[str]"]
MODE_VARIABLE = "MS_CKPT_EXT_MODE"
BUFFER_BYTES = 64 << 20
"""Default buffer budget of one worker, in bytes."""
_MOST_WORKERS = 16


def require_path(path: str) -> None:
    """Raise DiscoveryError when there is no such path."""
    if not os.path.exists(path):
        raise also(DiscoveryError, FileNotFoundError)(f"no such file or directory: {path!r}; check the path")


def path_of(value: Any, argument: str) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        path = str(os.fspath(value))
        check_path(path, argument)
        return path
    if value is None or value == "":
        raise ArgumentTypeError(f"{argument} is needed here: give a path")
    raise ArgumentTypeError(f"{argument} must be a path, got {type(value).__name__}")


def check_path(path: str, argument: str) -> None:
    """Raise UsageError for a path that no file can have."""
    try:
        fits = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise UsageError(f"{argument} holds a character that no path can have, got {path!r}; give another")


def checked_format(value: Any, argument: str, optional: bool = False) -> None:
    """Raise UsageError for what is no format of checkpoint files; None is fine where it is `optional`."""
    if not (isinstance(value, str) and value in FORMATS) and not (optional and value is None):
        allowed = ", ".join(FORMATS) + (", or None" if optional else "")
        raise UsageError(f"{argument} must be one of {allowed}; got {value!r}")


def checked_flags(**flags: Any) -> None:
    """Raise ArgumentTypeError for a flag that is neither True nor False (numpy's are allowed, too)."""
    for argument, value in flags.items():
        true_or_false(value, argument)


def checked_words(function: Callable[..., Any], given: Mapping[str, Any], besides: Collection[str] = ()) -> None:
    """Raise ArgumentTypeError for an argument annotated `bool` that is no flag, or annotated `str` that is no text.

    Args:
        given: arguments by name: what `locals()` gives in the function's first line.
        besides: arguments that are not checked, because MindSpore takes other types, too.
    """
    for argument, kind in function.__annotations__.items():
        if argument in besides or argument not in given:
            continue
        value = given[argument]
        if kind == "bool":
            true_or_false(value, argument)
        elif kind in ("str", "Optional[str]") and not isinstance(value, str) and (value is not None or kind == "str"):
            allowed = "a str or None" if kind == "Optional[str]" else "a str"
            raise ArgumentTypeError(f"{argument} must be {allowed}, got {type(value).__name__}")  # it may be a key


def checked_name_map(
    name_map: Optional[Mapping[str, str]],
    direction: str = "names (str) in the network to names (str) in the checkpoint",
) -> Mapping[str, str]:
    if name_map is None:
        return {}
    if not isinstance(name_map, Mapping) or not all(isinstance(t, str) for pair in name_map.items() for t in pair):
        raise ArgumentTypeError(f"name_map must map {direction}")
    return name_map


def checked_choice(choice_func: Any) -> Optional[Choice]:
    if choice_func is not None and not callable(choice_func):
        raise ArgumentTypeError(f"choice_func must be callable, got {type(choice_func).__name__}")
    checked: Optional[Choice] = choice_func
    return checked


def checked_naming(choice_func: Any, name_map: Optional[Mapping[str, str]], **more: Any) -> Optional[Naming]:
    """`choice_func` and `name_map` (name in the result -> name in the checkpoint) as one value; None for no change.

    `more` are the other attributes of `Naming`. Warns of sources with several names, as of tied weights.
    """
    names, choice = checked_name_map(name_map), checked_choice(choice_func)
    if choice is None and not names:
        return None
    twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if twice:
        log.warning("name_map gives several parameters the same source: %s", twice)
    from ms_ckpt_ext.engine.source.renaming import Naming

    return Naming(choice, names, **more)


def checked_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    if isinstance(rules, (list, tuple)) and not rules:
        return ()
    from ms_ckpt_ext.core.planning.rule import Rule  # a dozen classes, which most calls do without

    if isinstance(rules, (list, tuple)) and all(isinstance(rule, Rule) for rule in rules):
        return tuple(rules)
    raise ArgumentTypeError("rules must be a list of rules from ms_ckpt_ext.rules")


def mode_of(mode: Optional[str]) -> str:
    """How ranks load together: as given, else as the environment says."""
    return mode or os.environ.get(MODE_VARIABLE) or "auto"


def workers_of(most: Optional[int], argument: str = "max_process_num", least: int = 1) -> int:
    """Threads to work with, at most `most`; None: as many as there are cores; 0, where it is allowed: one."""
    bound = _MOST_WORKERS if most is None else _number(most, argument, least)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, cores, _MOST_WORKERS))


def limits_of(buffer_bytes: int) -> Limits:
    return Limits(tile=min(Limits().tile, _number(buffer_bytes, "buffer_bytes", 1 << 16) // 4))


def _number(value: Any, argument: str, least: int) -> int:
    number = integer(value, argument, kind=f"an int of at least {least}")
    if number < least:
        raise UsageError(f"{argument} must be an int of at least {least}, got {number}")
    return number


def as_strategy(value: Any, rank: int = 0, argument: str = "a strategy") -> Optional[Strategy]:
    """Any form in which MindSpore gives layouts, as one value; None for one device.

    An empty dict, the layouts of a network that is not compiled, gives None, as in MindSpore. A list holds several of
    these forms, to be put together: MindSpore's strategy files list trainable parameters only, and what they lack may
    be given beside them, by another file or by name: `[file, {"dense.weight": (dev_matrix, tensor_map)}]`, see
    `core.geometry.supplement`.

    Args:
        value: the path of a strategy file (protobuf or JSON) or of a directory with one per pipeline stage, the dict of
            `build_searched_strategy`, `Cell.parameter_layout_dict`, a list of these, a `Strategy`, or None.
        rank: the rank from whose network a layout dict comes.
        argument: its name in messages.

    Returns:
        The layouts of all ranks, as every argument called `strategy` takes them; None for one device.

    Raises:
        StrategyError: the value is of a legal type but invalid, or the parts of a list contradict each other.
        ArgumentTypeError: it is none of the legal types.
    """
    if value is None or isinstance(value, Strategy):
        return value
    if isinstance(value, (str, os.PathLike)):
        from ms_ckpt_ext.formats.strategies.file import load_strategy

        return load_strategy(path_of(value, argument))
    if isinstance(value, Mapping):
        if not value:
            return None
        if all(hasattr(message, "dev_matrix") for message in value.values()):
            return strategy_from_messages(value)
        return strategy_from_layout_dict(value, rank, _group_size)
    if isinstance(value, (list, tuple)):
        return _of_several(value, rank, argument)
    raise ArgumentTypeError(
        f"{argument} must be a path, got {type(value).__name__}; the dict of build_searched_strategy, a layout dict, a "
        "list of these, and None are legal, too"
    )


def _of_several(values: Sequence[Any], rank: int, argument: str) -> Optional[Strategy]:
    from ms_ckpt_ext.core.geometry.supplement import ByName, put_together

    named = [f"{argument}[{number}]" for number in range(len(values))]
    parts = [_part(value, name) for value, name in zip(values, named) if value != {}]
    if not parts:
        raise ArgumentTypeError(f"{argument} is an empty list: give a strategy, or None for one device")
    if isinstance(parts[0], Strategy) and len(parts) == 1:
        return parts[0]
    first = next((layout for part in parts if isinstance(part, ByName) for layout in part.layouts.values()), None)
    return put_together(parts, 0 if first is None else rank // first.devices)


def _part(value: Any, argument: str) -> StrategyPart:
    if isinstance(value, Strategy):
        return value
    if isinstance(value, Mapping):
        from ms_ckpt_ext.core.geometry.supplement import ByName

        return ByName(layouts_by_name(value, _group_size, argument), argument)
    if value is None or isinstance(value, (list, tuple)):
        raise ArgumentTypeError(f"{argument} must be a path or a dict of layouts, got {type(value).__name__}")
    strategy = as_strategy(value, 0, argument)
    assert strategy is not None
    return strategy


def _group_size(group: str) -> int:
    from ms_ckpt_ext.bridge.world import group_size

    return group_size(group)


def access_of(dec_key: Any, dec_mode: Any, crc_check: bool = False) -> Access:
    """How source files may be opened. Without a key, the one in MS_CKPT_EXT_DEC_KEY serves files that are encrypted.

    Raises:
        ArgumentTypeError: the key is neither bytes nor what `load_key` gives, or the mode no string.
        UsageError: a key of a wrong length, or no such mode.
    """
    if not isinstance(dec_mode, str):
        raise ArgumentTypeError(f"dec_mode must be a str, got {type(dec_mode).__name__}")
    if dec_key is None and DEC_KEY_VARIABLE in os.environ:
        mode = None if dec_mode == GCM else dec_mode  # MindSpore's default, so nobody may have meant it
        return Access(_key_of(None, "dec_key", DEC_KEY_VARIABLE), mode, crc_check, optional=True)
    return Access(_key_of(dec_key, "dec_key"), dec_mode, crc_check)


def any_mode(dec_key: Any, dec_mode: Optional[str], crc_check: bool = False) -> Access:
    """`access_of`, where a mode of None allows any container."""
    access = access_of(dec_key, GCM if dec_mode is None else dec_mode, crc_check)
    return access._replace(mode=None) if dec_mode is None else access


def seal_of(enc_key: Any, enc_mode: Any) -> Optional[Seal]:
    """How outputs are encrypted. Without a key, by the one in MS_CKPT_EXT_ENC_KEY; without that, not at all.

    Raises: as `access_of`.
    """
    if not isinstance(enc_mode, str):
        raise ArgumentTypeError(f"enc_mode must be a str, got {type(enc_mode).__name__}")
    env = ENC_KEY_VARIABLE if enc_key is None and ENC_KEY_VARIABLE in os.environ else None
    key = _key_of(enc_key, "enc_key", env)
    if key is None:
        return None
    from ms_ckpt_ext.engine.files.encrypted_sink import Seal

    return Seal(key, enc_mode)


def _key_of(key: Any, argument: str, env: Optional[str] = None) -> Optional[Key]:
    """`load_key`, which is imported when there is something to load; errors name the argument."""
    if key is None and env is None:
        return None
    from ms_ckpt_ext.formats.crypto import load_key

    try:
        return load_key(key, env=env)
    except UsageError as error:
        raise type(error)(f"{argument}: {error}" if env is None else str(error)) from None


class Running(NamedTuple):
    """How a job is run: on how many threads, with which buffers, to the disk or to the page cache, or as a dry run."""

    workers: int
    limits: Limits
    sync: bool
    dry_run: bool


def running(
    max_process_num: Optional[int],
    buffer_bytes: int = BUFFER_BYTES,
    *,
    sync: bool = True,
    dry_run: bool = False,
    argument: str = "max_process_num",
    least: int = 1,
) -> Running:
    """The arguments that say how a job is run; `argument` is the name of the first. Raises UsageError.

    `least` is 0 where MindSpore ignores the number, so existing calls may pass 0.
    """
    return Running(workers_of(max_process_num, argument, least), limits_of(buffer_bytes), sync, dry_run)


def execute_with_progress(job: Job, target: str, run: Running, title: str) -> Report:
    """Run a job with a progress bar; or only report what it would do, as a `Preview`, which is a report too.

    Raises UsageError when one of several shares is to run without sync, and whatever the job raises.
    """
    from ms_ckpt_ext.engine.files import execution

    job, workers, limits = job.synced(run.sync), run.workers, run.limits
    if run.dry_run:
        from ms_ckpt_ext.engine.files.dry_run import preview

        return preview(job, target, workers, limits)
    total = sum(entry.nbytes for output in job.outputs for entry in output.layout.tensors.values())
    with log.progress_bar(title, total) as advance:
        report = execution.execute(job, target, workers, limits, advance)
    log.info("%s into %s: read %d bytes in %d reads, wrote %s", title, target, report.bytes_read, report.reads, report)
    return report
