"""MindFormers' folders from their JSON alone: what is found, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, FormatError, LayoutMismatchError, StrategyError
from ms_ckpt_ext.formats.discovery.mindformers import find_folder, layout_of, read_cuts


def described(**changes: Any) -> dict[str, Any]:
    """A layout of dp2 x tp2, rows over tp, as `mindspore.Layout.to_dict` gives it."""
    layout = {"device_matrix": [2, 2], "tensor_map": [0, -1], "interleaved_parallel": False}
    return {**layout, "alias_name": ["dp", "tp"], "rank_list": [0, 1, 2, 3], **changes}


def content(
    layout: Any, shape: Any = (4, 6), local: Any = (2, 6), numbers: tuple[int, ...] = (0, 1), ranks: Any = None
) -> dict[str, Any]:
    """A metadata.json of one parameter, every slice in the file of its number, saved by the rank of that number."""
    chunks = [{"global_offset": [number], "local_shape": local} for number in numbers]
    places = {
        str(("w", (n,))): [{"file_name": f"f{n}.safetensors", "storage_rank": (ranks or numbers)[n]}] for n in numbers
    }
    entry = {"properties": {"dtype": "Float32"}, "global_shape": shape, "layout": layout, "chunk": chunks}
    return {"state_dict_metadata": {"w": entry}, "storage_data": places}


def written(root: Path, told: Any) -> str:
    path = root / "metadata.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return str(path)


def test_slices_are_numbered_row_major(tmp_path: Path) -> None:
    layout = described(tensor_map=[0, 1])
    cut = read_cuts(written(tmp_path, content(layout, (4, 6), (2, 3), (0, 1, 2, 3), (0, 2, 1, 3))))["w"]  # type: ignore[index]
    assert cut.holders == {
        (0, 0): ("f0.safetensors",),
        (0, 1): ("f1.safetensors",),
        (1, 0): ("f2.safetensors",),
        (1, 1): ("f3.safetensors",),
    }
    assert (cut.shape, cut.layout.parts) == ((4, 6), (2, 2))


@pytest.mark.parametrize(
    ("raw", "parts", "cell"),
    [
        (described(), (2, 1), (1, 0)),
        (described(tensor_map=[[1, 0], -1]), (4, 1), (3, 0)),
        (described(tensor_map=[-1, -1]), (1, 1), (0, 0)),
        (described(rank_list=[4, 5, 6, 7]), (2, 1), (1, 0)),
    ],
)
def test_layouts(raw: dict[str, Any], parts: tuple[int, ...], cell: tuple[int, ...]) -> None:
    layout = layout_of("w", raw, "here")
    assert (layout.parts, layout.cells[3]) == (parts, cell)


@pytest.mark.parametrize(
    ("told", "error", "words"),
    [
        ("{", FormatError, "not readable JSON"),
        (content(described(interleaved_parallel=True)), StrategyError, "'w' has an interleaved_parallel layout"),
        (content(described(rank_list=[0, 2, 4, 6])), StrategyError, "no pipeline stage in order"),
        (content(described(device_matrix=[2, 4])), StrategyError, "8 devices, but 4 ranks"),
        (content(described(), local=(4, 6)), FormatError, "'w' has a slice 0 of shape [4, 6]"),
        (content(described(tensor_map=[0])), FormatError, "a layout of 1 axes"),
        ({"state_dict_metadata": {"w": {}}, "storage_data": {}}, FormatError, "KeyError"),
        ({"state_dict_metadata": {}, "storage_data": {"open('x')": []}}, FormatError, "not laid out as MindFormers"),
        (
            {"state_dict_metadata": {}, "storage_data": {"('w', (0,))": [{"file_name": "../../etc/passwd"}]}},
            FormatError,
            "not the name of a file beside",
        ),
    ],
)
def test_refused(told: Any, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error) as caught:
        read_cuts(written(tmp_path, told))
    assert words in str(caught.value)


def test_other_metadata_is_none_of_ours(tmp_path: Path) -> None:
    written(tmp_path, {"format": "something else"})
    assert find_folder(str(tmp_path)) is None


def test_a_lost_file_and_a_lost_iteration_are_told(tmp_path: Path) -> None:
    written(tmp_path, content(described()))
    with pytest.raises(DiscoveryError, match="names 2 files, 'f0.safetensors' and so on, and .* holds none"):
        find_folder(str(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(DiscoveryError, match="no 'iteration_00000007' beside it"):
        find_folder(str(tmp_path))


def test_a_folder_is_read(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    folder = tmp_path / "iteration_00000007"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    written(folder, content(described()))
    for number in range(2):
        save_file({"w": whole[2 * number : 2 * number + 2]}, folder / f"f{number}.safetensors")
    catalog = open_catalog(str(tmp_path), None)
    assert catalog.tensors["w"].meta.shape == (4, 6)
    save_file({"w": whole[:1]}, folder / "f1.safetensors")
    with pytest.raises(LayoutMismatchError, match=r"is F32\[1, 6\] in .*f1.safetensors"):
        open_catalog(str(tmp_path), None)
    save_file({"v": whole[:2]}, folder / "f0.safetensors")
    save_file({"v": whole[:2]}, folder / "f1.safetensors")
    assert not open_catalog(str(tmp_path), None).tensors
    with pytest.raises(CoverageError, match="'w' should be in 'f0.safetensors' .slice 0 of 2, .*does not hold it"):
        ms_ckpt_ext.merge(tmp_path, tmp_path / "out")


def test_what_one_device_saved_needs_no_metadata(tmp_path: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "toy-model-0000000-0000001.safetensors")
    save_file({"adam_m.w": np.ones(2, np.float32)}, tmp_path / "toy-opt-0000000-0000001.safetensors")
    assert sorted(open_catalog(str(tmp_path), None).tensors) == ["adam_m.w", "w"]
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "toy-opt-0000000-0000001.safetensors")
    with pytest.raises(LayoutMismatchError, match=r"no metadata.json to say how it is cut"):
        open_catalog(str(tmp_path), None)
