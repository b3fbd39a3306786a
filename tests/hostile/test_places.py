"""Names in notes do not lead out of their folder, whatever is done with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ms_ckpt_ext
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, FileDigests, Manifest, size_of
from ms_ckpt_ext.engine.resume.records import record_from_json
from ms_ckpt_ext.errors import CheckpointError, FormatError
from ms_ckpt_ext.formats.discovery.mindformers import read_cuts
from ms_ckpt_ext.formats.discovery.rank_folders import rank_folders
from ms_ckpt_ext.formats.discovery.whole_models import unified_files
from ms_ckpt_ext.storage import publishing
from ms_ckpt_ext.storage.linux import is_below
from tests.hostile.seeds import JOURNAL, MAP, RECORD
from tests.support.checkpoints import source
from tests.support.mindformers_folder import saved

AWAY = ["../x", "..", ".", "", "/etc/passwd", "a/../../x", "a//x", "./x", "a/..", "a\0b", "\ud800", "/", "a/"]


@pytest.mark.parametrize("name", AWAY)
def test_names_that_lead_away(name: str, tmp_path: Path) -> None:
    assert not is_below(name)
    assert size_of(str(tmp_path), name) is None


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_names_that_stay(parts: list[str]) -> None:
    assert is_below("/".join(parts)) is not bool({".", ".."} & {*parts})


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder beside a target, whose contents nobody may touch."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "thesis").write_text("years of work")
    return folder


def interrupted(root: Path, name: str = "j", **said: Any) -> Path:
    """A target with what seems to be the journal of an earlier job."""
    hidden = root / "target/.ms_ckpt_ext"
    hidden.mkdir(parents=True)
    (hidden / f"{name}.journal").write_text(json.dumps({**JOURNAL, "files": {}, "indexes": {}, "gone": [], **said}))
    return root / "target"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("j", {"job": "../../precious"}),
        ("j", {"job": "../.."}),
        ("j", {"job": "other"}),
        ("..", {"job": ".."}),
        ("j", {"job": "j", "gone": ["../precious/thesis"]}),
        ("j", {"job": "j", "files": {"../precious/thesis": [1, 1]}}),
        ("j", {"job": "j", "indexes": {"../precious/thesis": "{}"}}),
        ("j", {"job": "j", "gone": ["a\0b"]}),
        ("j", {"job": "j", "gone": ["\ud800"]}),
        ("j", {"job": "j", "indexes": {"i.json": "\ud800"}}),
        ("j", {"job": "j\0"}),
    ],
)
def test_a_journal_reaches_no_further_than_its_folder(
    name: str, said: dict[str, Any], precious: Path, tmp_path: Path
) -> None:
    made, target = source(tmp_path / "made", seed=1), interrupted(tmp_path, name, **said)
    (target / "mine").write_text("keep")
    assert publishing.read_journal(target / f".ms_ckpt_ext/{name}.journal") is None
    ms_ckpt_ext.merge(made / "shards", target, strategy=made / "strategy.ckpt", sync=False)
    assert (precious / "thesis").read_text() == "years of work"
    assert (target / "mine").read_text() == "keep"


def test_a_journal_that_is_one_is_read(tmp_path: Path) -> None:
    target = interrupted(tmp_path, "a.b", job="a.b", files={"x/y": [1, 2]}, gone=["z"])
    found = publishing.read_journal(target / ".ms_ckpt_ext/a.b.journal")
    assert found is not None and found.job == "a.b" and found.names >= {"x/y", "z"}


@pytest.mark.parametrize("name", AWAY)
def test_a_manifest_lists_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "x").write_bytes(bytes(5))
    text = Manifest({name: FileDigests(5, {})}).to_json()
    (tmp_path / "in" / MANIFEST_NAME).write_bytes(text)
    found = ms_ckpt_ext.verify(tmp_path / "in", manifest=True)
    assert not found.ok and [fault.found for fault in found.faults] == ["no file"]


@pytest.mark.parametrize("name", AWAY)
def test_a_record_names_no_file_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="bad file"):
        record_from_json({**RECORD, "step": 3, "loss_scale": 1.0, "file": name})


@pytest.mark.parametrize("name", AWAY)
def test_an_index_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({**MAP, "weight_map": {"w": name}}))
    with pytest.raises(CheckpointError) as caught:
        unified_files(str(tmp_path))
    assert "index.json" in str(caught.value) and "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/b"])
def test_metadata_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "metadata.json"
    told = json.loads(path.read_text())
    told["storage_data"][next(iter(told["storage_data"]))][0]["file_name"] = name
    path.write_text(json.dumps(told))
    with pytest.raises(FormatError, match="not the name of a file"):
        read_cuts(str(path))


@pytest.mark.parametrize("name", ["rank_0\n", "rank_\u0663", "rank_0 ", "rank_+1", "rank_", "xrank_0", "rank_0_1"])
def test_what_is_no_rank_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert rank_folders(str(tmp_path)) == {}
