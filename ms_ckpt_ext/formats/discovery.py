"""Which file of which folder is meant: MindSpore's directory and naming rules.

A sharded checkpoint is `dir/rank_{N}/*.{suffix}`. With several files in a rank folder and no `file_suffix`, the
newest counts: the one with the largest last two numbers in its name (`...-{epoch}_{step}`). A `file_suffix` of the
forms `_T-E_S`, `-E_S`, `E_S`, `_S`, `S` selects by task, epoch and step; any other must match one file.
Where stock MindSpore would pick one of several equally good files by chance, this raises and lists them; and where
nobody says which format is meant, a directory that holds both is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple, Optional

from ms_ckpt_ext.errors import DiscoveryError, FormatError, name_ranks, storage_error
from ms_ckpt_ext.formats.kind import CHECKPOINT, kind_of, pointer_fault

FORMATS = ("safetensors", "ckpt")
MAP_NAME = "param_name_map.json"
HYPER_STEM = "hyper_param"
HYPER_NAMES = tuple(f"{HYPER_STEM}.{suffix}" for suffix in FORMATS)
HF_INDEX_NAME = "model.safetensors.index.json"
_RANK_DIR = re.compile(r"^rank_(\d+)$")
_OF_STEP = re.compile(rf"-(\d+)_(\d+)(?:_breakpoint)?\.(?:{'|'.join(FORMATS)})$")
_SUFFIX_FORMS = (
    (re.compile(r"^_?\d+-\d+_\d+$"), "_"),  # task-epoch_step
    (re.compile(r"^-?\d+_\d+$"), "-"),  # epoch_step
    (re.compile(r"^_?\d+$"), "_"),  # step
)


class UnifiedFiles(NamedTuple):
    """A merged checkpoint: where each parameter is, and the file of training scalars if there is one."""

    files: dict[str, str]
    names: Optional[dict[str, str]]
    hyper: Optional[str]


def inside(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """What of a folder is wanted, in the order of names.

    Raises:
        DiscoveryError: there is no such folder.
        StorageError: the operating system does not let us look into it.
    """
    try:
        return sorted(child for child in folder.iterdir() if wanted(child))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DiscoveryError(f"no such checkpoint directory: {str(folder)!r}; check the path") from error
    except OSError as error:
        raise storage_error("look into", str(folder), error) from error


def is_sharded(directory: str) -> bool:
    """True when `directory` holds `rank_{N}` folders."""
    return bool(_rank_dirs(directory))


def kinds(directory: str) -> set[str]:
    """Which of the known formats the rank folders hold files of."""
    children = [child for folder in _rank_dirs(directory).values() for child in inside(folder)]
    return {kind for kind in FORMATS if any(c.name.endswith(f".{kind}") and not c.is_dir() for c in children)}


def _rank_dirs(directory: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for child in inside(Path(directory), lambda path: _RANK_DIR.match(path.name) is not None and path.is_dir()):
        rank = int(child.name[len("rank_") :])
        before = found.setdefault(rank, child)
        if before is not child:
            raise DiscoveryError(
                f"{directory!r} holds two folders of rank {rank}, {before.name!r} and {child.name!r}; "
                "move the one that does not belong to the checkpoint away"
            )
    return dict(sorted(found.items()))


def rank_files(
    directory: str, suffix: Optional[str] = "safetensors", file_suffix: Optional[str] = None
) -> dict[int, str]:
    """The file of every rank: rank -> path, ranks ascending. A rank folder without a file of the kind is left out.

    Args:
        directory: holds the `rank_{N}` folders.
        suffix: "safetensors", "ckpt", or None for whichever is there.
        file_suffix: end of the wanted file's name, without `.suffix`; None for the newest.

    Raises:
        DiscoveryError: no such directory, no rank folder with such a file, two folders of one rank, or several equally
            good files; with a `suffix` of None also when there are files of both formats.
    """
    folders = _rank_dirs(directory)
    if not folders:
        raise DiscoveryError(
            f"{directory!r} holds no rank_0, rank_1, … folders; a sharded checkpoint is DIR/rank_N/*{_or(suffix)}"
        )
    if suffix is None:
        suffix = _only_kind(kinds(directory), f"the rank folders of {directory!r}") or FORMATS[0]
    found = {rank: _rank_file(folder, suffix, file_suffix) for rank, folder in folders.items()}
    files = {rank: path for rank, path in found.items() if path}
    if not files:
        raise DiscoveryError(
            f"none of the {len(folders)} rank folders in {directory!r} holds a *.{suffix} file; check format and path"
        )
    return files


def step_of(path: str) -> Optional[tuple[int, int]]:
    """Epoch and step of a name that ends in `-{epoch}_{step}`; None of another."""
    found = _OF_STEP.search(path)
    return (int(found[1]), int(found[2])) if found else None


def check_one_step(files: Mapping[int, str]) -> None:
    """See that the files of ranks, as far as their names end in `-{epoch}_{step}`, are of one step.

    Stock MindSpore merges the newest file of every rank, whatever step it is of, when a save was cut short. Names
    whose last number is the rank's, as a prefix like `net-3_` makes them, tell no step.

    Raises:
        DiscoveryError: they are of several steps.
    """
    steps = {rank: step for rank, path in sorted(files.items()) if (step := step_of(path)) is not None}
    if all(step == rank for rank, (_, step) in steps.items()):
        return
    ranks: dict[tuple[int, int], list[int]] = {}
    for rank, step in steps.items():
        ranks.setdefault(step, []).append(rank)
    if len(ranks) > 1:
        told = [f"{epoch}_{step} ({name_ranks(of)}: {files[of[0]]!r})" for (epoch, step), of in ranks.items()]
        more = f" and {len(told) - 4} more" if len(told) > 4 else ""
        raise DiscoveryError(
            f"the files of {len(files)} ranks are of different epochs and steps: {', '.join(told[:4])}{more}; probably "
            "a save was cut short: name files of one step that every rank has (in rank folders, with file_suffix)"
        )


def _only_kind(found: set[str], where: str) -> Optional[str]:
    if len(found) > 1:
        raise DiscoveryError(
            f"{where} hold both .safetensors and .ckpt files; say which format is meant, or move one kind away"
        )
    return next(iter(found), None)


def _or(suffix: Optional[str]) -> str:
    return " or ".join(f".{each}" for each in ([suffix] if suffix else FORMATS))


def _rank_file(folder: Path, suffix: str, file_suffix: Optional[str]) -> Optional[str]:
    files = [str(path) for path in inside(folder, lambda path: path.name.endswith(f".{suffix}") and path.is_file())]
    if file_suffix is None:
        return _newest(files, folder) if files else None
    matching = [f for f in files if f.endswith(f"{file_suffix}.{suffix}")]
    if not matching:
        raise DiscoveryError(
            f"no file in {str(folder)!r} ends with '{file_suffix}.{suffix}'; it holds "
            f"{[os.path.basename(f) for f in files]}: give the longest common suffix of the wanted files"
        )
    return matching[0] if len(matching) == 1 else _by_suffix(matching, suffix, file_suffix, folder)


def _newest(files: list[str], folder: Path) -> str:
    def age(path: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", os.path.basename(path))][-2:]

    newest = max(map(age, files))
    return _only([f for f in files if age(f) == newest], folder, "are equally new by the numbers in their names")


def _by_suffix(matching: list[str], suffix: str, file_suffix: str, folder: Path) -> str:
    for form, lead in _SUFFIX_FORMS:
        if form.match(file_suffix):
            wanted = file_suffix if file_suffix.startswith(lead) else lead + file_suffix
            exact = [f for f in matching if f.endswith(f"{wanted}.{suffix}")]
            if "-" in wanted[1:]:  # a task number is not a rank number
                exact = [f for f in exact if not f.endswith(f"rank{wanted}.{suffix}")]
            shortest = min((len(os.path.basename(f)) for f in exact), default=0)
            exact = [f for f in exact if len(os.path.basename(f)) == shortest]
            return _only(exact or matching, folder, f"match file_suffix {file_suffix!r} equally well")
    return _only(matching, folder, f"match file_suffix {file_suffix!r} equally well")


def _only(files: list[str], folder: Path, why: str) -> str:
    if len(files) == 1:
        return files[0]
    raise DiscoveryError(
        f"{len(files)} files in {str(folder)!r} {why}: {[os.path.basename(f) for f in files]}; "
        "set file_suffix to the longest common suffix of the wanted files, or move the others away"
    )


def unified_files(directory: str, suffix: Optional[str] = None) -> UnifiedFiles:
    """The files of a merged checkpoint: MindSpore's map, Hugging Face's index, or a single file.

    Args:
        directory: holds the files.
        suffix: "safetensors", "ckpt", or None for whichever the map names or is there.

    Raises:
        DiscoveryError: no such directory, no file, several files and no map, or files of both formats.
        FormatError: the map is not what it should be.
    """
    root = Path(directory)
    there = [path.name for path in inside(root, Path.is_file)]
    index, names = _map_of([root / name for name in (MAP_NAME, HF_INDEX_NAME) if name in there])
    listed = {os.path.splitext(file)[1][1:] for file in (names or {}).values()}
    suffix = suffix or _only_kind(listed & {*FORMATS}, f"the files that {str(index)!r} lists")
    present = {kind: _checkpoints(root, there, kind) for kind in (FORMATS if suffix is None else (suffix,))}
    suffix = suffix or _only_kind({kind for kind, files in present.items() if files}, f"the files in {directory!r}")
    if suffix is None or not present[suffix]:
        raise DiscoveryError(f"{directory!r} holds no {_or(suffix)} file; check the path and the format")
    files = present[suffix]
    if names is None and len(files) == 1:
        return UnifiedFiles({files[0]: str(root / files[0])}, None, None)
    if names is None:
        raise DiscoveryError(
            f"{directory!r} holds {len(files)} .{suffix} files but neither {MAP_NAME} nor {HF_INDEX_NAME}, so "
            "nothing says which parameter is where: the merge that wrote it did not finish; run it again"
        )
    missing = sorted(set(names.values()) - set(files))
    if missing:
        raise DiscoveryError(
            f"{str(index)!r} names {missing}, which {directory!r} does not hold as .{suffix} files; restore them"
        )
    hyper = next((str(root / name) for name in HYPER_NAMES if name in files and len(files) > 1), None)
    return UnifiedFiles({file: str(root / file) for file in sorted(set(names.values()))}, names, hyper)


def _map_of(found: list[Path]) -> tuple[Optional[Path], Optional[dict[str, str]]]:
    """The map that counts, and what it says.

    MindFormers leaves a map of its own names beside Hugging Face's index, of the same files, whose names the index has.
    """
    if not found:
        return None, None
    names = _read_map(found[0])
    with suppress(FormatError):  # of an index that is not needed
        for index in found[1:]:
            listed = _read_map(index)
            if set(names.values()) <= set(listed.values()):
                return index, listed
    return found[0], names


def _checkpoints(root: Path, names: list[str], suffix: str) -> list[str]:
    """Those of the files in a folder that are checkpoints of one format."""
    return [n for n in names if n.endswith(f".{suffix}") and kind_of(str(root / n)) == CHECKPOINT]


def _read_map(path: Path) -> dict[str, str]:
    try:
        raw = path.read_bytes()
        fault = pointer_fault(str(path), raw)
        if fault is not None:
            raise FormatError(fault)
        content = json.loads(raw)
        names = content.get("weight_map", content)
    except FormatError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise FormatError(f"{str(path)!r} is not a parameter map ({error}); run the merge again") from error
    ok = isinstance(names, dict) and all(
        isinstance(v, str) and os.path.basename(v) == v and v not in ("", ".", "..") for v in names.values()
    )
    if not ok or not names:
        raise FormatError(f"{str(path)!r} must map parameter names to file names in its folder; run the merge again")
    return dict(names)
