"""A small checkpoint as MindFormers saves it, made without it.

Two data-parallel times two tensor-parallel ranks, weights and optimizer states, with every replica or without.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext

WHOLE = {
    "rows": np.arange(24, dtype=np.float32).reshape(4, 6),
    "columns": np.arange(24, 48, dtype=np.float32).reshape(4, 6),
    "norm": np.arange(6, dtype=np.float32),
    "both": np.arange(48, 96, dtype=np.float32).reshape(8, 6),
}
STATES = {f"adam_m.{name}": array + 1000 for name, array in WHOLE.items()}
TENSOR_MAPS: dict[str, list[Any]] = {"rows": [0, -1], "columns": [-1, 0], "norm": [-1], "both": [[1, 0], -1]}
RANKS = range(4)


def number_of(name: str, rank: int) -> int:
    """The slice that a rank holds."""
    plain = name.split(".")[-1]
    return {"norm": 0, "both": rank}.get(plain, rank % 2)


def slice_of(name: str, array: np.ndarray, rank: int) -> np.ndarray:
    axis, parts = {"rows": (0, 2), "columns": (1, 2), "norm": (0, 1), "both": (0, 4)}[name.split(".")[-1]]
    return np.ascontiguousarray(np.split(array, parts, axis)[number_of(name, rank)])


def saved(root: Path, lean: bool = False, savers: Sequence[int] = RANKS) -> Path:
    """An iteration's folder.

    Lean: the first two of the savers save everything but `both`, which is left out unless all save; who saves nothing
    has no number.
    """
    folder = root / "iteration_00000010"
    folder.mkdir(parents=True)
    told: dict[str, Any] = {"state_dict_metadata": {}, "storage_data": {}}
    for kind, arrays in (("model", WHOLE), ("opt", STATES)):
        for number, rank in enumerate(savers):
            mine = {n: a for n, a in arrays.items() if not lean or number < 2 or n.endswith("both")}
            held = {n: slice_of(n, a, rank) for n, a in mine.items() if len(savers) == 4 or not n.endswith("both")}
            file = f"toy-{kind}-{number:07d}-{len(savers):07d}.safetensors"
            save_file(held, folder / file, {"format": "ms"})
            for name, piece in held.items():
                _tell(told, name, arrays[name], piece, rank, file)
    (folder / "metadata.json").write_text(json.dumps(told))
    (folder / "common.json").write_text(json.dumps({"epoch_num": 1, "global_step": 10, "ckpt_status": 0}))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def _tell(told: dict[str, Any], name: str, array: np.ndarray, piece: np.ndarray, rank: int, file: str) -> None:
    tensor_map = TENSOR_MAPS[name.split(".")[-1]]
    layout = {"device_matrix": [2, 2], "tensor_map": tensor_map, "interleaved_parallel": False}
    layout.update(alias_name=["dp", "tp"], rank_list=[*RANKS])
    parts = [a // b for a, b in zip(array.shape, piece.shape)]
    entry = {"properties": {"dtype": "Float32"}, "global_shape": array.shape, "axis_fragmentations": parts}
    entry = told["state_dict_metadata"].setdefault(name, {**entry, "layout": layout, "chunk": []})
    chunk = {"global_offset": [number_of(name, rank)], "local_shape": piece.shape}
    if chunk not in entry["chunk"]:
        entry["chunk"].append(chunk)
    owners = [r for r in RANKS if number_of(name, r) == number_of(name, rank)]
    place = {"file_name": file, "storage_rank": rank, "rank_group": owners}
    told["storage_data"].setdefault(str((name, (number_of(name, rank),))), []).append(place)


def metadata(folder: Path) -> Any:
    """What the folder's `metadata.json` says."""
    return json.loads((folder / "metadata.json").read_text())


def edited(folder: Path, edit: Callable[[Any], Any]) -> None:
    """Change the folder's `metadata.json`."""
    told = metadata(folder)
    edit(told)
    (folder / "metadata.json").write_text(json.dumps(told))


def merged(source: Path, target: Path, **more: Any) -> dict[str, bytes]:
    """Merge a folder; the contents of the result by name."""
    ms_ckpt_ext.merge(source, target, **more)
    return {n: a.tobytes() for part in target.glob("part*.safetensors") for n, a in load_file(part).items()}


def chunks_of(told: Any, name: str) -> list[Any]:
    """The slices that `metadata.json` lists of a parameter."""
    return told["state_dict_metadata"][name]["chunk"]
