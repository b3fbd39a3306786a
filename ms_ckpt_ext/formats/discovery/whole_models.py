"""Whole models in one folder: which of its files belong together, and the message where that cannot be known.

    param_name_map.json and the files it lists         MindSpore's merge, and this package's
    *.safetensors.index.json and its files             Hugging Face's, of any name: transformers, diffusers, variants
    NAME-00001-of-00003.safetensors, …                 the same without their index, if all exist
    one file                                           whatever its name
    PREFIX-EPOCH_STEP.ckpt, PREFIX_rank_N-…            saves of a training in one folder: the newest, as in rank folders

Everything else is ambiguous, or not a model: several unrelated files, a part of a model, an adapter, training scalars
alone. The message fits whoever downloaded the folder, or ran the merge that wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.errors import DiscoveryError, FormatError, also
from ms_ckpt_ext.formats.discovery.rank_folders import (
    HF_INDEX_NAME,
    HYPER_NAMES,
    MAP_NAME,
    by_suffix,
    checkpoint_names,
    folders_in,
    inside,
    is_sharded,
    newest_of,
    only_kind,
    or_suffixes,
)
from ms_ckpt_ext.formats.discovery.saves import grouped_flat, is_step, names_rank
from ms_ckpt_ext.formats.table import FOREIGN, FORMATS, STRATEGY, SUFFIXES, kind_of, pointer_fault

_INDEX = re.compile(r".\.safetensors\.index(?:\.[\w-]+)?\.json$")
_PART = re.compile(r"^(?P<model>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)$")
_MERGED_PART = re.compile(r"^part(\d+)\.\w+$")
_ADAPTER = "adapter_model"
_NOT_READ = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".mindir", ".pdparams")
_SHOWN = 4
_NO_MAP = (
    f"neither {MAP_NAME} nor an index says which parameter is where, so the merge that wrote them did not finish: run "
    "it again"
)
_ADAPTER_FAULT = "that is an adapter to a model, and no model: give its path, if its parameters are what is wanted"


class UnifiedFiles(NamedTuple):
    """A checkpoint whose files lie in one folder.

    Attributes:
        files: name -> path, of whole parameters.
        names: parameter -> name of its file; None where only the files say it.
        hyper: the file of training scalars, if there is one.
        ranks: rank -> path, instead of `files`, where the files are those of ranks.
    """

    files: dict[str, str]
    names: Optional[dict[str, str]] = None
    hyper: Optional[str] = None
    ranks: Mapping[int, str] = MappingProxyType({})


class Loose(NamedTuple):
    """What may be a checkpoint in a folder without a map, by the names of its files.

    Attributes:
        files: number -> file: the ranks' of a save, or the parts of one model.
        parts: whether the numbers are those of parts.
        fault: why it is not a checkpoint; "" where nothing speaks against it.
    """

    files: dict[int, str]
    parts: bool = False
    fault: str = ""


def is_map(name: str) -> bool:
    """Whether a file of this name says which parameter is in which file."""
    return name == MAP_NAME or _INDEX.search(name) is not None


def unified_files(
    directory: str,
    suffix: Optional[str] = None,
    file_suffix: Optional[str] = None,
    index: Optional[str] = None,
    ranked: bool = False,
) -> UnifiedFiles:
    """The files of the checkpoint in a folder: those of a map, a whole model's, or the newest save's.

    Args:
        directory: holds the files.
        suffix: "safetensors", "ckpt", or None for whichever the map names or exists.
        file_suffix: which of several saves, see `formats.discovery.rank_folders`.
        index: name of the map to use; None for the one that exists.
        ranked: several ranks saved, as their strategy says, so `_rank_N` in a name is a rank, even if only one.

    Raises:
        DiscoveryError: no such directory, no file, several unrelated ones, a part of a model, or both formats.
        FormatError: the map is not what it should be.
    """
    root = Path(directory)
    there = [path.name for path in inside(root, lambda path: path.is_file() and not path.name.startswith("."))]
    if index is None:
        path, names = _map_of(root, [name for name in there if is_map(name)])
    else:
        path, names = root / index, _read_map(root / index)
    if path is not None and names is not None:
        return _listed(root, there, path, names, suffix)
    held = checkpoint_names(root, FORMATS if suffix is None else (suffix,))
    suffix = suffix or only_kind(
        {kind for kind in FORMATS if any(n.endswith(kind) for n in held)}, f"the files in {directory!r}"
    )
    if suffix is None or not held:
        raise DiscoveryError(
            f"{directory!r} holds no {or_suffixes(suffix)} file{instead(directory)}; check the path and the format"
        )
    if file_suffix is not None:
        held = [name for name in held if name.endswith(f"{file_suffix}.{suffix}")] or [
            by_suffix(held, suffix, file_suffix, directory)
        ]
    chosen = _choose(loose(held, ranked), directory, suffix)
    paths = {number: str(root / name) for number, name in sorted(chosen.files.items())}
    of_ranks = len(paths) > 1 or (ranked and names_rank(next(iter(chosen.files.values()))))
    if chosen.parts or not of_ranks:
        return UnifiedFiles({os.path.basename(path): path for path in paths.values()})
    return UnifiedFiles({}, ranks=paths)


def _choose(found: Mapping[str, Loose], directory: str, suffix: str) -> Loose:
    if len(found) > 1 and all(is_step(name) and not held.fault for name, held in found.items()):
        best = newest_of({name: held.files for name, held in found.items()}, lambda _: directory)
        return found[best]
    faults = list(dict.fromkeys(held.fault for held in found.values() if held.fault))
    files = [name for held in found.values() for name in held.files.values()]
    if faults:
        raise DiscoveryError(f"{directory!r} holds {_some(files)}: {'; '.join(faults)}")
    if len(found) > 1 and _are_of_ranks(files):
        from ms_ckpt_ext.formats.discovery.torch_slices import JOIN

        raise DiscoveryError(
            f"{directory!r} holds {_some(files)}, by their names slices of torch's distributed checkpoint: {JOIN}"
        )
    if len(found) > 1:
        raise DiscoveryError(
            f"{directory!r} holds {len(files)} .{suffix} files that nothing relates to each other, {_some(files)}: "
            "give the path of the one that is meant; or, where they are one model, fetch the index that belongs to "
            "them (*.safetensors.index.json)"
        )
    return next(iter(found.values()))


def loose(names: Iterable[str], ranked: bool = False) -> dict[str, Loose]:
    """What may be a checkpoint among the files of a folder without a map.

    Returns:
        what the files' names have in common -> the files, and what speaks against them.
    """
    held = sorted(names)
    hyper = [name for name in held if name in HYPER_NAMES]
    adapters = [name for name in held if name.startswith(_ADAPTER)]
    parts = {name: match for name in held if name not in adapters and (match := _PART.match(name))}
    merged = [name for name in held if _MERGED_PART.match(name)]
    lone = len(merged) == 1 and not hyper and merged[0].startswith("part0.")
    rest = [name for name in held if name not in (*hyper, *adapters, *parts, *(() if lone else merged))]
    beside = _beside(hyper, adapters)
    found = {
        name: Loose(files, fault="" if is_step(name) else beside) for name, files in grouped_flat(rest, ranked).items()
    }
    for name, files in _models(parts).items():
        found[name] = files._replace(fault=files.fault or beside)
    if hyper or (merged and not lone):
        found.setdefault(
            hyper[0] if hyper else merged[0], Loose(dict(enumerate((*hyper, *merged))), True, _unfinished(merged))
        )
    found.update({name: Loose({0: name}, fault=_ADAPTER_FAULT) for name in adapters if not rest and not parts})
    return found


def _beside(hyper: Sequence[str], adapters: Sequence[str]) -> str:
    """What speaks against a model beside these files."""
    if adapters:
        return f"{adapters[0]!r} is an adapter to a model, which is not applied here: give the path of the model's file"
    return _NO_MAP if hyper else ""


def _unfinished(merged: Sequence[str]) -> str:
    return _NO_MAP if merged else "that is the training scalars of a merged checkpoint, without its parameters"


def _models(parts: Mapping[str, re.Match[str]]) -> dict[str, Loose]:
    """Models in numbered parts without an index: whole if all parts exist."""
    found: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for name, match in parts.items():
        title = f"{match['model']}-of-{match['count']}{match['suffix']}"
        found.setdefault(title, {})[int(match["number"])] = name
        counts[title] = int(match["count"])
    return {
        title: Loose(files, True, "" if _is_all(files, counts[title]) else _lacking(title, files, counts[title]))
        for title, files in found.items()
    }


def _is_all(numbers: Iterable[int], count: int) -> bool:
    there = sorted(numbers)
    return len(there) == count and there in ([*range(1, len(there) + 1)], [*range(len(there))])


def _lacking(title: str, files: Mapping[int, str], count: int) -> str:
    return (
        f"of the {count} parts of a model only {len(files)} {'are' if len(files) > 1 else 'is'} there, "
        f"{_some(files.values())}: fetch the others and the index"
    )


def _listed(
    root: Path, there: Sequence[str], index: Path, names: dict[str, str], suffix: Optional[str]
) -> UnifiedFiles:
    """The files that a map lists."""
    wanted = sorted(set(names.values()))
    found = {os.path.splitext(file)[1][1:] for file in wanted} & {*FORMATS}
    suffix = suffix or only_kind(found, f"the files that {str(index)!r} lists")
    missing = [name for name in wanted if name not in there or not name.endswith(f".{suffix}")]
    if missing:
        broken = [name for name in missing if os.path.islink(root / name)]
        raise also(DiscoveryError, FileNotFoundError)(
            f"{str(index)!r} names {_some(missing)}, which {str(root)!r} does not hold as .{suffix} files"
            + (f" ({broken[0]!r} is a link to what is not there)" if broken else "")
            + f"; {_restore(index)}"
        )
    hyper = next((str(root / name) for name in HYPER_NAMES if name in there and name.endswith(f".{suffix}")), None)
    others = [name for name in there if name.startswith(_ADAPTER) and name not in wanted]
    if others:
        log.warning("%r beside the model in %r is an adapter, which is not applied", others[0], str(root))
    return UnifiedFiles({file: str(root / file) for file in wanted}, names, hyper)


def _restore(index: Path) -> str:
    if index.name == MAP_NAME:
        return "restore them, or, of a merge in shares, put those of the other shares there"
    return "fetch them: a download that was cut short leaves such a folder"


def _map_of(root: Path, found: Sequence[str]) -> tuple[Optional[Path], Optional[dict[str, str]]]:
    """The map to use, and what it says.

    MindFormers leaves a map with its own names beside Hugging Face's index of the same files, which use the index's.
    """
    indexes = [root / name for name in found if name != MAP_NAME]
    if MAP_NAME not in found:
        chosen = _only_index(indexes)
        return chosen, None if chosen is None else _read_map(chosen)
    names = _read_map(root / MAP_NAME)
    with suppress(FormatError):  # of an index that is not needed
        for index in indexes:
            listed = _read_map(index)
            if set(names.values()) <= set(listed.values()):
                return index, listed
    return root / MAP_NAME, names


def _only_index(indexes: Sequence[Path]) -> Optional[Path]:
    if len(indexes) < 2:
        return next(iter(indexes), None)
    names = [index.name for index in indexes]
    if HF_INDEX_NAME not in names:
        raise DiscoveryError(
            f"{str(indexes[0].parent)!r} holds {len(names)} indexes of parameters, {_some(names)}: give the path of "
            "the one that is meant"
        )
    log.warning(
        "%r is taken; beside it there are the indexes %s", HF_INDEX_NAME, _some(n for n in names if n != HF_INDEX_NAME)
    )
    return indexes[names.index(HF_INDEX_NAME)]


def _read_map(path: Path) -> dict[str, str]:
    advice = "run the merge again" if path.name == MAP_NAME else "fetch it again"
    from ms_ckpt_ext.storage.linux import read_small

    try:
        raw = read_small(path)
        fault = pointer_fault(str(path), raw)
        if fault is not None:
            raise FormatError(fault)
        from ms_ckpt_ext.storage.reader import from_json

        content = from_json(raw)
        if not isinstance(content, dict):
            raise ValueError(f"a dictionary is expected, and it holds a {type(content).__name__}")
    except FormatError:
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"{str(path)!r} is not a parameter map ({error}); {advice}") from error
    names = content.get("weight_map", content)
    ok = isinstance(names, dict) and all(isinstance(file, str) for file in names.values())
    ok = ok and all(os.path.basename(file) == file and file not in ("", ".", "..") for file in {*names.values()})
    if not ok or not names:
        raise FormatError(f"{str(path)!r} must map parameter names to file names in its folder; {advice}")
    return dict(names)


def _are_of_ranks(names: Iterable[str]) -> bool:
    from ms_ckpt_ext.formats.discovery.torch_slices import is_of_a_rank

    return all(map(is_of_a_rank, names))


def instead(directory: str) -> str:
    """What a folder without a checkpoint holds instead, as `, but …` for a message; "" where nothing explains it."""
    root = Path(directory)
    there = [path.name for path in inside(root, Path.is_file)] if root.is_dir() else []
    other = [name for name in there if name.endswith(_NOT_READ)]
    other += [name for name in there if name.endswith(SUFFIXES) and kind_of(str(root / name)) == FOREIGN]
    if other:
        return f", but {_some(other)}, of formats that are not read"
    if any(name.endswith(SUFFIXES) and kind_of(str(root / name)) == STRATEGY for name in there):
        return ", but strategy files, which are no checkpoints"
    if (root / "snapshots").is_dir():
        return ", but the snapshots of a download, which are such folders: give the path of one of them"
    below = [folder.name for folder in folders_in(root) if _is_model(folder)]
    return f", but its folders {_some(below)} do: give the path of one of them" if below else ""


def _is_model(folder: Path) -> bool:
    return bool(checkpoint_names(folder, FORMATS, {})) or is_sharded(str(folder))


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(map(repr, listed[:_SHOWN])) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
