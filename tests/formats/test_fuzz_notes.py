"""Every JSON or INI file that this package reads, damaged: one of our errors, or what is right; never Python's own.

What holds tensors or layouts in binary form is damaged in tests/formats; MindFormers' metadata.json there, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.api.resume import _progress
from ms_ckpt_ext.cli import settings as ini
from ms_ckpt_ext.cli.main import main
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.resume.newest import ResumeRequest, choose_checkpoint
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage import claims, publishing
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.checkpoints import arrays, scalars, source
from tests.support.damage import HOPELESS, damaged, edits, mutate, time_limit
from tests.support.mindformers_folder import STATES, WHOLE, saved
from tests.support.saved import save

TRUTH = {name: array.tobytes() for name, array in {**arrays(1), **scalars(1)}.items()}
FOLDER_TRUTH = {name: array.tobytes() for name, array in {**WHOLE, **STATES}.items()}


class Note(NamedTuple):
    """A file to damage, what reads it, and every result that reading may give."""

    path: Path
    read: Callable[[], Any]
    truth: Optional[dict[str, bytes]] = None


def loaded(directory: Path, **more: Any) -> dict[str, bytes]:
    with ms_ckpt_ext.load(directory, **more) as held:
        return {name: held[name].numpy().tobytes() for name in held}


def merged(root: Path, naming: str = "mindspore") -> Path:
    made = source(root / "made", seed=1)
    ms_ckpt_ext.merge(
        made / "shards", root / "merged", strategy=made / "strategy.ckpt", part_bytes=9000, naming=naming, sync=False
    )
    return root / "merged"


def chosen(directory: Path) -> None:
    found, _ = choose_checkpoint(LocalTransport(), ResumeRequest(str(directory), "here"))
    if found is not None:
        _progress(found)
        json.dumps({name: np.asarray(value).tolist() for name, value in found.scalars.items()})


def recorded(root: Path, name: str) -> Note:
    """What four ranks noted of a save: each by itself, or all together."""
    save(root / "saves", 3)
    notes = root / "saves/ms_ckpt_ext/net-1_3.safetensors"
    if name != "complete.json":
        (notes / "complete.json").unlink()
    return Note(notes / name, lambda: chosen(root / "saves"))


def strategy(root: Path) -> Note:
    """In JSON, merged under."""
    made = source(root / "made", seed=1)
    path = root / "strategy.json"
    layouts = {
        "a.w": {"dev_matrix": [2, 2], "tensor_map": [0, -1], "opt_weight_shard_step": 1, "opt_weight_shard_size": -1},
        "b.w": {"dev_matrix": [2, 2], "tensor_map": [-1, 0]},
        "c.w": {"dev_matrix": [2, 2], "tensor_map": [1, 0]},
        "d.w": {"dev_matrix": [2, 2], "tensor_map": [-1, -1]},
    }
    operators = {"Default/MatMul-op0": {"stage": 0, "parallel_strategy": [[2, 1], [1, 2]]}}
    said = {"current_stage": 2, "parallel_strategy_item": operators, "parallel_layout_item": layouts}
    path.write_text(json.dumps(said))

    def read() -> None:
        load_strategy(path)
        ms_ckpt_ext.merge(made / "shards", root / "out", strategy=path, sync=False, dry_run=True)
        ms_ckpt_ext.merge_pipeline_strategys(str(root / "stages"), str(root / "joined.json"))

    (root / "stages").mkdir()
    (root / "stages/strategy_0.json").symlink_to(path)
    return Note(path, read)


def shapes(root: Path, read: Callable[[Path, Path], Any]) -> Note:
    made, path = source(root / "made", seed=1), root / "shapes.json"
    path.write_text(json.dumps({name: {"dtype": "F32", "shape": [64, 32]} for name in arrays(1)}))
    return Note(path, lambda: read(path, made / "strategy.ckpt"))


def profile(root: Path) -> Note:
    path = root / "machine.json"
    path.write_bytes((profiles.HARDWARE_FOLDER / f"{profiles.names()[0]}.json").read_bytes())
    return Note(path, lambda: profiles.profile(str(path)))


def name_map(root: Path) -> Note:
    path, file = root / "names.json", root / "net.safetensors"
    path.write_text(json.dumps({"a": "b", "c": "d"}))
    save_file({"a": np.zeros(2, np.float32), "c": np.zeros(2, np.float32)}, file)

    def read() -> None:
        words = ["convert", str(file), str(root / "out.ckpt"), "--name-map", str(path), "--no-sync"]
        assert main(words) in (0, 1, 2, 3, 4, 5)

    return Note(path, read)


def again(root: Path) -> Note:
    """What is on record of a result, when it is made once more from other values, and loaded."""
    target = merged(root)
    made = source(root / "other", seed=1)

    def read() -> dict[str, bytes]:
        ms_ckpt_ext.merge(made / "shards", target, strategy=made / "strategy.ckpt", part_bytes=9000, sync=False)
        return loaded(target)

    return Note(target / publishing.RECORD, read, TRUTH)


def hidden(root: Path, name: str, document: Any, read: Callable[[Path], Any]) -> Note:
    folder = root / ".ms_ckpt_ext"
    folder.mkdir()
    (folder / name).write_text(json.dumps(document))
    return Note(folder / name, lambda: read(root))


def interrupted(root: Path) -> Note:
    """A journal of an earlier job, which the next job into this folder finishes before it begins."""
    made, target = source(root / "made", seed=1), root / "out"
    left = {
        "job": "j",
        "files": {"old.safetensors": [1, 2]},
        "indexes": {"i.json": "{}"},
        "gone": ["older.safetensors"],
    }
    left.update(digests={"old.safetensors": {"size": 1, "tensors": {}}}, missing=["x"], boot=None)
    path = target / ".ms_ckpt_ext/j.journal"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(left))

    def read() -> dict[str, bytes]:
        data = path.read_bytes()
        shutil.rmtree(target)
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        try:
            ms_ckpt_ext.merge(made / "shards", target, strategy=made / "strategy.ckpt", sync=False)
            return loaded(target)
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)

    return Note(path, read, TRUTH)


JOURNAL = {"job": "j", "files": {"a": [1, 2]}, "indexes": {"i": "{}"}, "gone": ["b"], "digests": {}, "missing": []}
NOTES: dict[str, Callable[[Path], Note]] = {
    "map": lambda root: Note(merged(root) / "param_name_map.json", lambda: loaded(root / "merged"), TRUTH),
    "index": lambda root: Note(
        merged(root, "huggingface") / "model.safetensors.index.json", lambda: loaded(root / "merged"), TRUTH
    ),
    "digests": lambda root: Note(
        merged(root) / MANIFEST_NAME, lambda: loaded(root / "merged", verify="full"), TRUTH
    ),
    "digests, verified": lambda root: Note(
        merged(root) / MANIFEST_NAME, lambda: ms_ckpt_ext.verify(root / "merged", manifest=True)
    ),
    "metadata": lambda root: Note(saved(root) / "metadata.json", lambda: loaded(root), FOLDER_TRUTH),
    "common": lambda root: Note(saved(root) / "common.json", lambda: chosen(root)),
    "tracker": lambda root: Note(
        saved(root).parent / "latest_checkpointed_iteration.txt", lambda: loaded(root), FOLDER_TRUTH
    ),
    "record of all": lambda root: recorded(root, "complete.json"),
    "record of one": lambda root: recorded(root, "rank_2.json"),
    "strategy": strategy,
    "shapes to plan": lambda root: shapes(
        root, lambda path, cut: ms_ckpt_ext.plan(None, shapes=path, dst_strategy=cut)
    ),
    "shapes to diff": lambda root: shapes(root, lambda path, cut: ms_ckpt_ext.diff_strategy(cut, cut, shapes=path)),
    "profile": profile,
    "name map": name_map,
    "published": again,
    "journal": lambda root: hidden(
        root, "j.journal", JOURNAL, lambda at: publishing.read_journal(at / ".ms_ckpt_ext/j.journal")
    ),
    "journal of an interrupted job": interrupted,
    "claims": lambda root: hidden(
        root, "claims", {"job": "j", "names": ["a", "b"]}, lambda at: claims._claims(HiddenFolder(at))
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def note(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Note]:
    root = tmp_path_factory.mktemp("notes")
    yield NOTES[request.param](root)
    shutil.rmtree(root)


def refused_or_right(note: Note, data: bytes) -> None:
    note.path.write_bytes(data)
    with time_limit():
        try:
            found = note.read()
        except CheckpointError as error:
            assert len(str(error)) > 20
            return
    if note.truth is not None:
        assert found.items() <= note.truth.items()


@pytest.mark.parametrize("note", NOTES, indirect=True)
def test_damaged_notes_are_refused_or_right(note: Note) -> None:
    whole = note.path.read_bytes()
    refused_or_right(note, whole)
    for data in HOPELESS:
        refused_or_right(note, data)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(damaged(json.loads(whole)))
    def check(document: Any) -> None:
        refused_or_right(note, json.dumps(document).encode())

    @settings(max_examples=20, deadline=None)
    @given(edits)
    def scratch(changes: list[Any]) -> None:
        refused_or_right(note, mutate(whole, changes))

    check()
    scratch()


@settings(max_examples=100, deadline=None)
@given(edits, st.sampled_from(["8", "\xb2", "-1", "1e3", "9" * 5000]))
def test_damaged_configurations(tmp_path_factory: pytest.TempPathFactory, changes: list[Any], number: str) -> None:
    text = (
        f"[launch]\nscript = a.py\nhosts = 2\nhost_rank = 0\nport = {number}\nstart_timeout = {number}\n"
        "[load]\ncheckpoint_dir = c\nmode = auto\n[environment]\nA = 1\n"
    )
    path = tmp_path_factory.getbasetemp() / "job.ini"
    path.write_bytes(mutate(text.encode(), changes))
    try:
        read = ini.read_settings(str(path))
    except CheckpointError:
        return
    assert all(isinstance(value, (str, int)) for value in read.values.values())
