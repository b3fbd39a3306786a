"""Small files are read whole, and nothing that is put in their place stops a job."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME
from ms_ckpt_ext.errors import CheckpointError, FormatError, StorageError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.storage import publishing
from ms_ckpt_ext.storage.linux import read_small
from ms_ckpt_ext.storage.reader import read_json
from tests.support.checkpoints import source
from tests.support.damage import memory_limit, time_limit


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


ODD = [a_pipe, a_folder, a_device, a_hole, a_loop]


@pytest.mark.parametrize("make", ODD)
def test_what_is_no_small_file_is_not_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    with time_limit(), memory_limit(1 << 20), pytest.raises(OSError):
        read_small(tmp_path / "x")
    with time_limit(), memory_limit(1 << 20), pytest.raises((StorageError, FormatError), match="'"):
        read_json(str(tmp_path / "x"), "the configuration")


@pytest.mark.parametrize("make", ODD)
def test_nothing_stays_open(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(OSError):
            read_small(tmp_path / "x")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_the_longest_that_is_read(size: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    if size <= 8:
        assert read_small(tmp_path / "x", most=8) == bytes(size)
        return
    with pytest.raises(OSError, match="more than 8 bytes"):
        read_small(tmp_path / "x", most=8)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_a_name_that_no_file_has(name: str) -> None:
    with pytest.raises(OSError):
        read_small(name)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\0\xff" * 100_000)
    assert read_small(tmp_path / "x") == b"\0\xff" * 100_000
    (tmp_path / "link").symlink_to("x")
    assert read_small(tmp_path / "link") == b"\0\xff" * 100_000


def test_an_argument_may_be_a_pipe_that_a_shell_makes() -> None:
    """As of `--name-map <(command)`: the writer may be slow, and write more than a pipe holds."""
    names = {str(n): "x" * 50 for n in range(5000)}
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "w") as file:
            json.dump(names, file)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with time_limit():
            assert read_json(f"/dev/fd/{reading}", "the name map") == names
    finally:
        os.close(reading)
        thread.join()


def test_a_pipe_without_an_end_is_given_up() -> None:
    reading, writing = os.pipe()

    def write() -> None:
        with open(writing, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except BrokenPipeError:
                return

    thread = threading.Thread(target=write)
    thread.start()
    with time_limit(), pytest.raises(OSError, match="read whole"):
        read_small(f"/dev/fd/{reading}", pipe=True, most=1 << 17)
    os.close(reading)
    thread.join()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source(tmp_path_factory.mktemp("small"), seed=1)


NOTES = [MANIFEST_NAME, publishing.RECORD, "param_name_map.json", ".ms_ckpt_ext/claims", ".ms_ckpt_ext/j.journal"]


@pytest.mark.parametrize("make", [a_pipe, a_device, a_hole])
@pytest.mark.parametrize("note", NOTES)
def test_no_note_stops_a_job(note: str, make: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    """Whatever stands in place of a note in a folder: jobs from it and into it end, with what is right or an error."""
    target = tmp_path / "out"

    def merge() -> Any:
        return ms_ckpt_ext.merge(made / "shards", target, strategy=made / "strategy.ckpt", sync=False)

    def loaded() -> dict[str, bytes]:
        with ms_ckpt_ext.load(target, verify="full") as held:
            return {name: held[name].numpy().tobytes() for name in held}

    merge()
    truth = loaded()
    (target / note).parent.mkdir(exist_ok=True)
    (target / note).unlink(missing_ok=True)
    make(target / note)
    for job in (loaded, lambda: ms_ckpt_ext.verify(target, manifest=True), merge):
        with time_limit(), memory_limit(64 << 20):
            try:
                found = job()
                assert not isinstance(found, dict) or found == truth
            except CheckpointError as error:
                assert len(str(error)) > 20
    shutil.rmtree(target)


@pytest.mark.parametrize("make", ODD)
def test_strategies(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "s.ckpt")
    with time_limit(), memory_limit(8 << 20), pytest.raises(CheckpointError, match=r"s\.ckpt"):
        load_strategy(tmp_path / "s.ckpt")
