"""A `metadata.json` against itself and against its files: never another slice's bytes, never a parameter that vanishes.

See `mindformers_folder` for the small checkpoint that is edited here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ms_ckpt_ext
from ms_ckpt_ext.errors import CheckpointError, FormatError
from ms_ckpt_ext.formats.discovery.mindformers import find_folder, read_common, read_cuts
from tests.support.mindformers_folder import STATES, WHOLE, chunks_of, edited, merged, metadata, saved


@pytest.mark.parametrize("lean", [False, True])
def test_what_is_right_is_merged(lean: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", lean)
    want = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}
    assert merged(tmp_path / "c", tmp_path / "out") == merged(folder, tmp_path / "again") == want


@pytest.mark.parametrize("savers", [(0, 1), (1, 2), (0, 3), (2, 3)])
def test_files_of_those_who_have_anything_are_numbered_anew(savers: tuple[int, ...], tmp_path: Path) -> None:
    """Without replicas a rank may have nothing to save; the files of the others are numbered without it."""
    folder = saved(tmp_path / "c", lean=True, savers=savers)
    want = {n: a.tobytes() for n, a in {**WHOLE, **STATES}.items() if not n.endswith("both")}
    assert merged(folder, tmp_path / "out") == want
    edited(folder, lambda told: [p.update(storage_rank=sum(savers) - p["storage_rank"]) for p in _places(told, "")])
    with pytest.raises(FormatError, match=r"of \[2\] were saved by ranks \[\d, \d\], which contradicts their names"):
        merged(folder, tmp_path / "other")


def _places(told: Any, name: str) -> list[Any]:
    return [place for key, held in told["storage_data"].items() if key.startswith(f"('{name}") for place in held]


def _beyond(told: Any) -> None:
    chunks_of(told, "both")[0]["global_offset"] = [4]
    told["storage_data"]["('both', (4,))"] = told["storage_data"].pop("('both', (0,))")


def _two_in_one(told: Any) -> None:
    for place in told["storage_data"]["('both', (1,))"]:
        place.update(file_name="toy-model-0000000-0000004.safetensors", storage_rank=0, rank_group=[0])


def _swapped(told: Any) -> None:
    """The files of two slices have changed places."""
    held = told["storage_data"]
    held["('both', (0,))"], held["('both', (1,))"] = held["('both', (1,))"], held["('both', (0,))"]


def _renamed_files(told: Any) -> None:
    names = {"toy-model-0000000-0000004.safetensors": "toy-model-0000001-0000004.safetensors"}
    names.update({file: other for other, file in names.items()})
    for held in told["storage_data"].values():
        for place in held:
            place["file_name"] = names.get(place["file_name"], place["file_name"])


CONTRADICTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "slice 4 of 4": (_beyond, "'both' has a slice 4, but its layout cuts it into 4, numbered from 0"),
    "a slice of nothing": (
        lambda told: told["storage_data"].update({"('norm', (1,))": _places(told, "norm")[:1]}),
        "'norm' has a slice 1, but its layout cuts it into 1",
    ),
    "a negative slice": (lambda told: chunks_of(told, "rows")[0].update(global_offset=[-1]), "'rows': .*negative"),
    "half a slice": (lambda told: chunks_of(told, "rows")[0].update(global_offset=[0.5]), "'rows': .*whole numbers"),
    "an offset of elements": (lambda told: chunks_of(told, "rows")[1].update(global_offset=[2, 0]), "'rows'"),
    "a slice of another shape": (
        lambda told: chunks_of(told, "rows")[1].update(local_shape=[1, 6]),
        r"'rows' has a slice 1 of shape \[1, 6\]",
    ),
    "another full shape": (
        lambda told: told["state_dict_metadata"]["rows"].update(global_shape=[8, 6]),
        r"'rows' has a slice 0 of shape \[2, 6\], but its layout cuts \[8, 6\]",
    ),
    "a shape that is not cut evenly": (
        lambda told: told["state_dict_metadata"]["rows"].update(global_shape=[5, 6]),
        "'rows': .*cannot be cut into 2",
    ),
    "other fragmentations": (
        lambda told: told["state_dict_metadata"]["rows"].update(axis_fragmentations=[4, 1]),
        r"'rows' is cut \[2, 1\] by its layout, and \[4, 1\]",
    ),
    "two slices in one file": (_two_in_one, "'both' has its slices 0 and 1 in 'toy-model-0000000"),
    "files of two slices swapped": (_swapped, "'both' has its slice 0 on rank 1 .*another by the layout"),
    "names of two files swapped": (_renamed_files, r"model files \[0, 1, 2, 3\] of \[4\] were saved by ranks \[1, 0"),
    "a file of two ranks": (
        lambda told: _places(told, "norm")[0].update(storage_rank=1),
        "'toy-model-0000000-0000004.safetensors' was saved by ranks 0, 1",
    ),
    "a rank beyond all files": (
        lambda told: [
            p.update(storage_rank=7) for k in WHOLE for p in _places(told, k) if "0000003-" in p["file_name"]
        ],
        "'rows' has its slice 1 on ranks 1, 3, and rank 7 saved it",
    ),
    "a saver that is none of the slice's ranks": (
        lambda told: [p.update(rank_group=[1, 2, 3]) for p in _places(told, "norm")],
        "'norm' has its slice 0 on ranks 1, 2, 3, and rank 0 saved it",
    ),
    "files of two worlds": (
        lambda told: _places(told, "norm")[3].update(file_name="toy-model-0000003-0000008.safetensors"),
        r"of \[4, 8\]",
    ),
    "no word about how it is cut": (
        lambda told: told["state_dict_metadata"].pop("rows"),
        "in which files parameter 'rows' lies, but not how it is cut",
    ),
    "no layout": (lambda told: told["state_dict_metadata"]["rows"].update(layout=None), "'rows'"),
    "no ranks": (
        lambda told: told["state_dict_metadata"]["rows"]["layout"].update(rank_list=[]),
        "'rows' lies on ranks",
    ),
    "a device axis too many": (
        lambda told: told["state_dict_metadata"]["rows"]["layout"].update(tensor_map=[2, -1]),
        "'rows': tensor map",
    ),
    "a file elsewhere": (lambda told: _places(told, "rows")[0].update(file_name="../x"), "not the name of a file"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_contradiction_is_an_error_by_name(what: str, tmp_path: Path) -> None:
    edit, words = CONTRADICTIONS[what]
    folder = saved(tmp_path / "c")
    edited(folder, edit)
    with pytest.raises(CheckpointError, match=words):
        merged(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["10", "10\n", "  10 \r\n", "0000010", "00000000000010"])
def test_a_tracker_with_a_number(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    found = find_folder(str(tmp_path))
    assert found is not None and found.path == str(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> Any:
    """The metadata above with a value somewhere replaced, or taken away."""
    told = copy.deepcopy(_TOLD)
    place: Any = told
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or draw(st.integers(0, 5)) == 0:
            break
        place = place[key]
    if draw(st.booleans()):
        place[key] = draw(JSON)
    else:
        del place[key]
    return told


_TOLD: Any = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = saved(tmp_path_factory.mktemp("fuzz"))
    _TOLD.update(metadata(made))
    return made


def test_damaged_metadata_is_refused_or_right(folder: Path) -> None:
    want = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}

    @settings(max_examples=150, deadline=None)
    @given(damaged())
    def check(told: Any) -> None:
        (folder / "metadata.json").write_text(json.dumps(told))
        try:
            cuts = read_cuts(str(folder / "metadata.json"))
            if cuts is None:
                return
            with ms_ckpt_ext.load(folder) as held:
                found = {name: held[name].numpy().tobytes() for name in held}
        except CheckpointError:
            return
        assert found.items() <= want.items()
        listed = told["state_dict_metadata"].keys()
        assert found.keys() == {name for name in want if name in listed}

    check()


@pytest.mark.parametrize("key", ["both", "(1, 2)", "('x')", "f(1)", "('w', 0, 1)", "(" * 300, ""])
def test_a_key_that_names_no_slice_is_told_as_it_stands(key: str, tmp_path: Path) -> None:
    """The same text on every rank and in every process."""
    folder = saved(tmp_path / "c")
    edited(folder, lambda told: told["storage_data"].update({key: []}))
    with pytest.raises(FormatError) as caught:
        ms_ckpt_ext.load(folder)
    assert f"{key!r} names no slice of a parameter" in str(caught.value)
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "null"])
def test_common_json_that_is_no_dictionary(content: str, tmp_path: Path) -> None:
    (saved(tmp_path / "c") / "common.json").write_text(content)
    with pytest.raises(FormatError, match="a dictionary is expected"):
        read_common(str(tmp_path / "c" / "iteration_00000010"))
