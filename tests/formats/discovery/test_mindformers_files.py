"""Folders of MindFormers in which files are missing, or hold what no metadata lists."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, FormatError, LayoutMismatchError
from ms_ckpt_ext.formats.discovery.mindformers import find_folder
from tests.support.mindformers_folder import STATES, WHOLE, chunks_of, edited, merged, saved


def _without_file(told: Any, name: str) -> None:
    for key in [key for key in told["storage_data"] if key.startswith(f"('{name}'")]:
        del told["storage_data"][key]


MISSING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a parameter without any file": (
        lambda told: _without_file(told, "rows"),
        "'rows' should be in several files, and metadata.json names none for slice 0 of 2",
    ),
    "a whole parameter without any file": (
        lambda told: _without_file(told, "norm"),
        "'norm' should be in .* slice 0 of 1",
    ),
    "no last slice": (lambda told: chunks_of(told, "both").pop(), "'both' should be in .* names none for slice 3 of 4"),
    "no last slices, nor their files": (
        lambda told: [chunks_of(told, "both").pop() and told["storage_data"].pop(f"('both', ({n},))") for n in (3, 2)],
        "'both' should be in .* names none for slice 2 of 4",
    ),
    "no slice at all": (lambda told: chunks_of(told, "rows").clear(), "'rows' should be in .* slice 0 of 2"),
    "no file for one slice": (
        lambda told: told["storage_data"].update({"('columns', (1,))": []}),
        "'columns' should be in .* names none for slice 1 of 2",
    ),
    "a parameter that no file has": (
        lambda told: (
            told["state_dict_metadata"].update(other=copy.deepcopy(told["state_dict_metadata"]["rows"])),
            told["storage_data"].update(
                {f"('other', ({n},))": told["storage_data"][f"('rows', ({n},))"] for n in (0, 1)}
            ),
        ),
        "'other' should be in 'toy-model-0000000-0000004.safetensors' .slice 0 of 2, .*, which does not hold it",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_what_no_file_holds_is_an_error_by_name_for_who_wants_it(what: str, tmp_path: Path) -> None:
    edit, words = MISSING[what]
    folder = saved(tmp_path / "c")
    edited(folder, edit)
    with pytest.raises(CoverageError, match=words):
        merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CoverageError, match=words):
        ms_ckpt_ext.load(folder)
    name = words.split("'")[1]
    rest = merged(folder, tmp_path / "rest", choice_func=lambda each: each != name)
    assert rest == {n: a.tobytes() for n, a in {**WHOLE, **STATES}.items() if n != name}


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (3,), (1, 3)])
def test_weights_without_the_optimizers_files(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """Files that were deleted to save space; a replica elsewhere is as good."""
    folder = saved(tmp_path / "c")
    for rank in ranks:
        (folder / f"toy-opt-{rank:07d}-0000004.safetensors").unlink()
    with pytest.raises(CoverageError, match="'adam_m.*' .*should be in 'toy-opt-.*, which is not there"):
        merged(folder, tmp_path / "all")
    weights = merged(folder, tmp_path / "weights", exclude=["adam_m.*"])
    assert weights == {name: array.tobytes() for name, array in WHOLE.items()}
    catalog = open_catalog(str(folder), None)
    gone = {"adam_m.both"} | ({"adam_m.rows", "adam_m.columns"} if ranks != (3,) else set())
    assert set(catalog.absent) == gone | ({"adam_m.norm"} if len(ranks) == 4 else set())


def test_a_lost_model_file_is_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", lean=True)
    (folder / "toy-model-0000001-0000004.safetensors").unlink()
    with pytest.raises(CoverageError, match="'rows' .*should be in 'toy-model-0000001-.* .slice 1 of 2, .*not there"):
        merged(folder, tmp_path / "out")


def test_a_file_that_holds_another_slice_than_told(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    file = folder / "toy-model-0000002-0000004.safetensors"
    save_file({**load_file(file), "both": WHOLE["both"]}, file)
    with pytest.raises(LayoutMismatchError, match=r"'both' is F32\[8, 6\] in .*0000002.* says F32\[2, 6\]"):
        merged(folder, tmp_path / "out")


def _beside(folder: Path, kind: str, **arrays: Callable[[int], np.ndarray]) -> None:
    """Tensors in every rank's file that no metadata lists."""
    for rank in range(4):
        file = folder / f"toy-{kind}-{rank:07d}-0000004.safetensors"
        save_file({**load_file(file), **{name: array(rank) for name, array in arrays.items()}}, file)


def test_what_no_metadata_lists_is_kept_where_it_is_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "c")
    frozen = np.arange(5000, dtype=np.float32)
    _beside(folder, "model", frozen=lambda rank: frozen)
    _beside(folder, "opt", global_step=lambda rank: np.array([10], np.int32))
    for rank in range(4):
        others = {"global_step": np.zeros(1, np.int32), "adam_m.rows": np.zeros((2, 6), np.float32)}
        save_file(others, folder / f"other-opt-{rank:07d}-0000004.safetensors")
        save_file(others, folder / f"zeta-opt-{rank:07d}-0000004.safetensors")
    want = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        assert merged(folder, tmp_path / "out") == want
    assert "'other-opt-0000000-0000004.safetensors': left aside" in caplog.text
    held = {n: a.tobytes() for n, a in load_file(tmp_path / "out/hyper_param.safetensors").items()}
    assert {name: held[name] for name in ("frozen", "global_step")} == {
        "frozen": frozen.tobytes(),
        "global_step": np.array([10], np.int32).tobytes(),
    }


@pytest.mark.parametrize("kind", ["model", "opt"])
@pytest.mark.parametrize("nbytes", [4, 40_000])
def test_what_no_metadata_lists_and_differs_is_an_error_by_name(kind: str, nbytes: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c")
    _beside(folder, kind, frozen=lambda rank: np.full(nbytes // 4, rank % 2, np.float32))
    with pytest.raises(
        LayoutMismatchError, match="'frozen' is not in metadata.json of .*, and the ranks' files differ"
    ):
        merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    want = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}
    assert merged(folder, tmp_path / "out", exclude=["frozen"]) == want


@pytest.mark.parametrize("count", [4, 1])
def test_files_of_several_ranks_without_metadata(count: int, tmp_path: Path) -> None:
    """The first rank's file alone looks like a whole model, but its name says that there are more."""
    folder = saved(tmp_path / "c")
    (folder / "metadata.json").unlink()
    for rank in range(count, 4):
        for kind in ("model", "opt"):
            (folder / f"toy-{kind}-{rank:07d}-0000004.safetensors").unlink()
    with pytest.raises(DiscoveryError, match="holds files of 4 ranks, .*no metadata.json that says how"):
        merged(folder, tmp_path / "out")


def test_what_one_device_saved_without_a_prefix(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model-0000000-0000001.safetensors")
    save_file(STATES, tmp_path / "opt-0000000-0000001.safetensors")
    want = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}
    assert merged(tmp_path, tmp_path / "out") == want


def test_what_two_prefixes_saved_is_not_one_checkpoint(tmp_path: Path) -> None:
    save_file(WHOLE, tmp_path / "model-0000000-0000001.safetensors")
    save_file(STATES, tmp_path / "net-opt-0000000-0000001.safetensors")
    with pytest.raises(DiscoveryError, match="files of several checkpoints, '' and 'net'"):
        merged(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["", "abc", "²", "\u0661", "-1", "1.0", "1e1", "release", "9" * 5000, "10 11", "0x0a", b"\xff\xfe1", "\0"]
)
def test_a_tracker_that_is_not_a_number(text: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError, match="should hold the number of the newest iteration, and holds"):
        find_folder(str(tmp_path))
