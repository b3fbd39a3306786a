"""Which file of which folder is meant: MindSpore's directory and naming rules.

A sharded checkpoint is `dir/rank_{N}/*.{suffix}`. With several files in a rank folder and no `file_suffix`, the newest
save counts (`formats.discovery.saves`): the one with the largest last two numbers in its name (`...-{epoch}_{step}`),
the same in all rank folders. A `file_suffix` of the forms `_T-E_S`, `-E_S`, `E_S`, `_S`, `S` selects by task, epoch
and step; any other must match one file. Where stock MindSpore would pick one of several equally good files by chance,
this raises and lists them; and where no format is given, a directory that holds both is an error. Files
without rank folders are `formats.discovery.whole_models`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Callable, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import DiscoveryError, also, name_ranks, storage_error
from ms_ckpt_ext.formats.table import CHECKPOINT, FORMATS, SAFETENSORS, format_of, kind_of

MAP_NAME = "param_name_map.json"
HYPER_STEM = "hyper_param"
HYPER_NAMES = tuple(f"{HYPER_STEM}.{suffix}" for suffix in FORMATS)
HF_INDEX_NAME = "model.safetensors.index.json"
INDEX_NAMES = {"mindspore": MAP_NAME, "huggingface": HF_INDEX_NAME}
"""Naming of a merge -> its index."""
RANK_FOLDER = re.compile(r"^rank_([0-9]+)\Z")
_SUFFIX_FORMS = (
    (re.compile(r"^_?\d+-\d+_\d+$"), "_"),  # task-epoch_step
    (re.compile(r"^-?\d+_\d+$"), "-"),  # epoch_step
    (re.compile(r"^_?\d+$"), "_"),  # step
)


def inside(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """The wanted entries of a folder, in the order of names.

    Raises:
        DiscoveryError: there is no such folder, or it is a file.
        StorageError: the operating system does not let it be listed.
    """
    try:
        return sorted(child for child in folder.iterdir() if wanted(child))
    except NotADirectoryError as error:
        kind = also(DiscoveryError, NotADirectoryError)
        raise kind(f"{str(folder)!r} is a file, and a directory is needed here") from error
    except FileNotFoundError as error:
        kind = also(DiscoveryError, FileNotFoundError)
        raise kind(f"no such checkpoint directory: {str(folder)!r}; check the path") from error
    except OSError as error:
        raise storage_error("look into", str(folder), error) from error


def folders_in(directory: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """Folders below a directory, in the order of names.

    One that cannot be listed and is not a rank's, such as a disk's `lost+found`, is logged and passed over.

    Raises as `inside`.
    """
    found = []
    for folder in inside(directory, lambda path: path.is_dir() and wanted(path)):
        reason = None if RANK_FOLDER.match(folder.name) else _closed(folder)
        if reason is None:
            found.append(folder)
        else:
            log.warning("%r is passed over: it cannot be looked into (%s)", str(folder), reason)
    return found


def _closed(folder: Path) -> Optional[str]:
    """Why a folder cannot be listed or searched; None when it can."""
    try:
        with os.scandir(folder):
            os.stat(os.path.join(folder, os.curdir))
    except OSError as error:
        return os.strerror(error.errno or 0)
    return None


def is_sharded(directory: str) -> bool:
    """True when `directory` holds `rank_{N}` folders."""
    return bool(rank_folders(directory))


def rank_folders(directory: str) -> dict[int, Path]:
    """Rank -> its folder, ranks ascending; empty where there are none.

    Raises:
        DiscoveryError: no such directory, or two folders of one rank.
    """
    found: dict[int, Path] = {}
    for child in inside(Path(directory), lambda path: RANK_FOLDER.match(path.name) is not None and path.is_dir()):
        rank = int(child.name[len("rank_") :])
        before = found.setdefault(rank, child)
        if before is not child:
            raise DiscoveryError(
                f"{directory!r} holds two folders of rank {rank}, {before.name!r} and {child.name!r}; "
                "move the one that does not belong to the checkpoint away"
            )
    return dict(sorted(found.items()))


def checkpoint_names(folder: Path, suffixes: Iterable[str], known: Optional[dict[str, str]] = None) -> list[str]:
    """Names of the files in a folder that are checkpoints of these formats, in order, without hidden ones.

    Args:
        known: kinds of `.ckpt` files by their names without numbers: one file of a family is looked into, for the
            others are written by the same code. If None, every file is.
    """
    endings = tuple(f".{suffix}" for suffix in suffixes)

    def may_be(path: Path) -> bool:
        return path.name.endswith(endings) and not path.name.startswith(".") and not path.is_dir()

    names = [path.name for path in inside(folder, may_be)]
    return [name for name in names if _kind(folder, name, known) == CHECKPOINT]


def _kind(folder: Path, name: str, known: Optional[dict[str, str]]) -> str:
    form = format_of(name)
    if known is None or form is None or not form.mixed:
        return kind_of(str(folder / name))
    family = re.sub(r"\d+", "#", name)
    if family not in known:
        known[family] = kind_of(str(folder / name))
    return known[family]


def _names_by_rank(folders: Mapping[int, Path], suffixes: Iterable[str]) -> dict[int, list[str]]:
    known: dict[str, str] = {}
    return {rank: checkpoint_names(folder, suffixes, known) for rank, folder in folders.items()}


def rank_files(
    directory: str,
    suffix: Optional[str] = SAFETENSORS.name,
    file_suffix: Optional[str] = None,
    world: Optional[int] = None,
) -> dict[int, str]:
    """The file of every rank: rank -> path, ranks ascending. A rank folder without such a file is left out.

    Args:
        directory: holds the `rank_{N}` folders.
        suffix: "safetensors", "ckpt", or None for whichever exists.
        file_suffix: end of the wanted file's name, without `.suffix`; None for the newest.
        world: how many ranks saved, if that is known. Folders of higher ranks are of another run, and need not hold the
            save that the others hold: then their own newest is returned.

    Raises:
        DiscoveryError: no such directory, no rank folder with such a file, two folders of one rank, several equally
            good files, or ranks without the newest save but with others; with a `suffix` of None also when there are
            files of both formats.
    """
    folders = rank_folders(directory)
    if not folders:
        raise DiscoveryError(
            f"{directory!r} holds no rank_0, rank_1, … folders; a sharded checkpoint is DIR/rank_N/*"
            f"{or_suffixes(suffix)}"
        )
    names = _names_by_rank(folders, FORMATS if suffix is None else (suffix,))
    if suffix is None:
        there = {kind for kind in FORMATS if any(n.endswith(f".{kind}") for held in names.values() for n in held)}
        suffix = only_kind(there, f"the rank folders of {directory!r}") or SAFETENSORS.name
    names = {rank: held for rank, held in names.items() if held or file_suffix is not None}
    if file_suffix is not None:
        chosen = {rank: by_suffix(held, suffix, file_suffix, str(folders[rank])) for rank, held in names.items()}
    else:
        chosen = _newest(names, folders, world)
    if not chosen:
        raise DiscoveryError(
            f"none of the {len(folders)} rank folders in {directory!r} holds a *.{suffix} file; check format and path"
        )
    return {rank: str(folders[rank] / name) for rank, name in sorted(chosen.items())}


def _newest(names: Mapping[int, Sequence[str]], folders: Mapping[int, Path], world: Optional[int]) -> dict[int, str]:
    """Rank -> its file of the newest save."""
    every = {name for held in names.values() for name in held}
    if len(every) == 1:
        return dict.fromkeys(names, every.pop())
    from ms_ckpt_ext.formats.discovery.saves import grouped, step_of, unlike

    groups = grouped(names)
    if not groups:
        return {}
    best = newest_of(groups, lambda rank: str(folders[rank]))
    rest = {rank: held for rank, held in names.items() if rank not in groups[best]}
    own = {
        rank: newest_of({name: {rank: name} for name in held}, lambda rank: str(folders[rank]))
        for rank, held in rest.items()
    }
    for rank, name in own.items():
        known, wanted = step_of(name), step_of(best)
        if (world is None or rank < world) and (None in (known, wanted) or known == wanted):  # else the steps differ
            first = next(iter(groups[best]))
            raise DiscoveryError(
                f"rank {rank} has no file of the newest save: {str(folders[rank])!r} holds {list(rest[rank])}, but "
                f"rank {first} has {groups[best][first]!r}; probably a save was cut short: name files of one save that "
                "every rank has, with file_suffix; if every folder's only file is meant, with file_suffix=''"
            )
    differing = unlike(groups[best])
    if differing is not None:
        log.warning("%r and %r of different ranks are taken for files of one save", *differing)
    return {**groups[best], **own}


def newest_of(groups: Mapping[str, Mapping[int, str]], folder_of: Callable[[int], str]) -> str:
    """The newest of several saves, by what the names of their ranks' files share; logs those of other prefixes.

    Args:
        groups: shared name -> rank -> file.
        folder_of: the folder of a rank, for messages.

    Raises:
        DiscoveryError: several are equally new, or the one with the largest numbers is of an older run than another.
    """
    from ms_ckpt_ext.formats.discovery.saves import newest, save_of

    found = newest(groups)
    if len(found.equal) > 1:
        rank, names = _rivals(found.equal, groups)
        raise DiscoveryError(_equal(names, folder_of(rank), "are equally new by the numbers in their names"))
    (best,) = found.equal
    if found.later_run is not None:
        raise DiscoveryError(
            f"{best!r} has the largest epoch and step in {folder_of(min(groups[best]))!r}, but {found.later_run!r} is "
            "of a later run, for MindSpore numbers the prefix of every further run in a folder; say with file_suffix "
            "which is meant, or move the others away"
        )
    others = [name for name in found.others if save_of(name).prefix != save_of(best).prefix]
    if others:
        log.warning(
            "%r is taken for the newest save; of other prefixes there are %s", best, ", ".join(map(repr, others))
        )
    return best


def _rivals(equal: Sequence[str], groups: Mapping[str, Mapping[int, str]]) -> tuple[int, list[str]]:
    """A rank that holds several of the saves, and its files; where none does, any rank and a file of each save."""
    for rank in sorted({rank for name in equal for rank in groups[name]}):
        files = [groups[name][rank] for name in equal if rank in groups[name]]
        if len(files) > 1:
            return rank, files
    return next(iter(groups[equal[0]])), [next(iter(groups[name].values())) for name in equal]


def check_one_step(files: Mapping[int, str]) -> None:
    """Check that the files of ranks whose names end in `-{epoch}_{step}` are of one step and one saver.

    Stock MindSpore merges the newest file of every rank, whatever step it is of, when a save was cut short. Names
    whose last number is the rank's, as with a prefix like `net-3_`, state no step.

    Raises:
        DiscoveryError: they are of several steps, or of prefixes that differ in more than numbers.
    """
    if len({os.path.basename(path) for path in files.values()}) == 1:
        return
    from ms_ckpt_ext.formats.discovery.saves import save_of, step_of

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
    savers = {re.sub(r"\d+", "#", save_of(os.path.basename(files[rank])).prefix): rank for rank in reversed(steps)}
    if len(savers) > 1:
        told = [f"{files[rank]!r} of rank {rank}" for rank in sorted(savers.values())]
        raise DiscoveryError(
            f"the files of {len(files)} ranks are of different prefixes: {', '.join(told[:4])}; probably a save was "
            "cut short: name files of one save that every rank has (in rank folders, with file_suffix)"
        )


def only_kind(found: set[str], where: str) -> Optional[str]:
    """The one format that was found; None when there is none. Raises DiscoveryError when there are both."""
    if len(found) > 1:
        both = " and ".join(f".{each}" for each in FORMATS if each in found)
        raise DiscoveryError(f"{where} hold both {both} files; say which format is meant, or move one kind away")
    return next(iter(found), None)


def or_suffixes(suffix: Optional[str]) -> str:
    """The format that is wanted, or all of them, for a message."""
    return " or ".join(f".{each}" for each in ([suffix] if suffix else FORMATS))


def by_suffix(names: Sequence[str], suffix: str, file_suffix: str, folder: str) -> str:
    """The file that `file_suffix` selects.

    Raises:
        DiscoveryError: no file ends with it, or several match equally well.
    """
    matching = [name for name in names if name.endswith(f"{file_suffix}.{suffix}")]
    if not matching:
        raise DiscoveryError(
            f"no file in {folder!r} ends with '{file_suffix}.{suffix}'; it holds {list(names)}: "
            "give the longest common suffix of the wanted files as file_suffix"
        )
    best = _exact(matching, suffix, file_suffix) if len(matching) > 1 else matching
    if len(best) > 1:
        raise DiscoveryError(_equal(best, folder, f"match file_suffix {file_suffix!r} equally well"))
    return best[0]


def _exact(matching: list[str], suffix: str, file_suffix: str) -> list[str]:
    """Those of the files in which `file_suffix` is the whole task, epoch and step, epoch and step, or step."""
    for form, lead in _SUFFIX_FORMS:
        if form.match(file_suffix):
            wanted = file_suffix if file_suffix.startswith(lead) else lead + file_suffix
            exact = [name for name in matching if name.endswith(f"{wanted}.{suffix}")]
            if "-" in wanted[1:]:  # a task number is not a rank number
                exact = [name for name in exact if not name.endswith(f"rank{wanted}.{suffix}")]
            shortest = min(map(len, exact), default=0)
            return [name for name in exact if len(name) == shortest] or matching
    return matching


def _equal(names: Sequence[str], folder: str, why: str) -> str:
    return (
        f"{len(names)} files in {folder!r} {why}: {sorted(names)}; "
        "set file_suffix to the longest common suffix of the wanted files, or move the others away"
    )
