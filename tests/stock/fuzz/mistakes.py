"""A mistake in a call: an argument of a wrong type or value, a path that leads nowhere, a file that is damaged."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Callable

import numpy as np

from tests.stock.fuzz.cases import Case, Place

_VALUES: list[Any] = [None, 3, -1, "no_such_thing", b"bytes", [], {}, 1.5, True, np.int64(1), ""]
_BY_NAME: dict[str, list[Any]] = {
    "output_format": ["npz", None],
    "format": ["npz", None, "safetensors", "ckpt"],
    "process_num": [0, None, -1, "2"],
    "processes_num": [0, None, -1],
    "max_process_num": [0, None, -1],
    "rank_id": [-1, 99, "0", np.int64(0), None],
    "choice_func": [lambda name: 3, "name", lambda name: None],
    "name_map": [["a"], {"a": 1}, {}],
    "split_dst_file": [(0, 1), (2, 1), (1,), 3],
    "dec_key": ["text", b"short", 3],
    "predict_strategy": [{}, "no_such_file.ckpt", 3],
}


def mistaken(rng: Random, case: Case, root: Path) -> Case:
    """The case with one thing wrong; what comes of it is compared by the type of the error."""
    ways: list[Callable[[Random, Case, Path], Case]] = [_argument, _named, _path, _damage, _damage]
    changed = rng.choice(ways)(rng, case, root)
    tags = case.tags | {"mistake"} | ({"torn"} if case.refusal else set())
    return changed._replace(expected={}, refusal="a mistake", tags=tags)


def _argument(rng: Random, case: Case, root: Path) -> Case:
    number = rng.randrange(len(case.arguments))
    arguments = list(case.arguments)
    arguments[number] = rng.choice(_VALUES)
    return case._replace(arguments=tuple(arguments))


def _named(rng: Random, case: Case, root: Path) -> Case:
    if not case.named:
        return _argument(rng, case, root)
    name = rng.choice(sorted(case.named))
    return case._replace(named={**case.named, name: rng.choice(_BY_NAME.get(name, _VALUES))})


def _path(rng: Random, case: Case, root: Path) -> Case:
    """A path that is not there, or a file for a directory, or a directory for a file."""
    places = [n for n, value in enumerate(case.arguments) if isinstance(value, Place)]
    if not places:
        return _named(rng, case, root)
    arguments = list(case.arguments)
    number = rng.choice(places)
    (root / "a_file.txt").write_text("text")
    (root / "a_directory").mkdir()
    arguments[number] = Place(rng.choice(["nowhere", "nowhere/at/all", "a_file.txt", "a_directory"]))
    return case._replace(arguments=tuple(arguments))


def _damage(rng: Random, case: Case, root: Path) -> Case:
    """A file of the input that is empty, cut short or overwritten, or gone."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    if not files:
        return _argument(rng, case, root)
    path = rng.choice(files)
    data = path.read_bytes()
    way = rng.randrange(4)
    if way == 0:
        path.write_bytes(b"")
    elif way == 1:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif way == 2:
        path.write_bytes(rng.randbytes(min(len(data), 200)))
    else:
        path.unlink()
    return case
