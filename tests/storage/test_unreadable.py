"""Storage that fails at any look at a target: what cannot be read is not taken for absent."""

from __future__ import annotations

import errno
import io
import os
import pathlib
from pathlib import Path
from typing import Any, Callable

import pytest

from ms_ckpt_ext import errors
from ms_ckpt_ext.storage import publishing
from ms_ckpt_ext.storage.locks import HiddenFolder, held
from tests.support.checkpoints import assert_merged, assert_nothing_complete, merge, source, tree

LOOKS = ("stat", "listdir", "scandir", "open")


class Failing:
    """From now on the n-th look at a file below a folder fails; all other calls are made."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
        self.seen, self._number, self._folder = 0, number, str(folder)
        for name in LOOKS:
            patch.setattr(os, name, self._watched(getattr(os, name)))
            if hasattr(getattr(pathlib, "_normal_accessor", None), name):  # paths of Python 3.9 and 3.10 keep their own
                kept = getattr(pathlib._normal_accessor, name)
                patch.setattr(pathlib._normal_accessor, name, self._watched(kept))
        patch.setattr(io, "open", self._watched(io.open))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any, *args: Any, **more: Any) -> Any:
            if isinstance(path, (str, Path)) and str(path).startswith(self._folder):
                self.seen += 1
                if self.seen == self._number:
                    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return call(path, *args, **more)

        return wrapper


def sweep(tmp_path: Path, step: int, prepare: Callable[[Path], object]) -> int:
    """A merge with a failure at every `step`-th look: right, or an error and nothing; then again."""
    made = source(tmp_path / "src")
    for number in range(1, 100_000, step):
        target = tmp_path / f"out{number}"
        prepare(target)
        before = tree(target)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, target, number)
            try:
                merge(made, target, max_process_num=1)
                done = True
            except errors.StorageError as error:
                assert str(target) in str(error)
                done = False
        if done:
            assert_merged(target)
        elif tree(target) != before:
            assert_nothing_complete_but_by_mark(target)

        merge(made, target)
        assert_merged(target)
        if failing.seen < number:
            return number
    raise AssertionError("no run came to its end")


def assert_nothing_complete_but_by_mark(target: Path) -> None:
    """Whole, or nothing at all, or with the mark that loaders refuse."""
    index = target / "param_name_map.json"
    if index.exists() and not publishing.is_unfinished(index):
        assert_merged(target)
    elif not index.exists():
        assert_nothing_complete(target)


def test_into_an_empty_target(tmp_path: Path) -> None:
    assert sweep(tmp_path, 3, lambda _: None) > 50


def test_over_another_result(tmp_path: Path) -> None:
    other = source(tmp_path / "other", seed=5)
    assert sweep(tmp_path, 5, lambda target: merge(other, target)) > 50


def test_what_cannot_be_told_is_an_error(tmp_path: Path) -> None:
    hidden = HiddenFolder(tmp_path)
    looks: dict[str, Callable[[], object]] = {
        "state": lambda: publishing.state_of(tmp_path / "x"),
        "record": lambda: publishing.read_published(tmp_path),
        "journal": lambda: publishing.read_journal(hidden.journal("job")),
        "mark": lambda: publishing.is_unfinished(tmp_path / "x"),
        "journals": hidden.journals,
        "locks": lambda: [*held(tmp_path)],
        "folder": lambda: hidden.is_there,
    }
    for name, look in looks.items():
        look()  # there is nothing, which is no error
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, tmp_path, 1)
            with pytest.raises(errors.StorageError, match="Input/output error") as caught:
                look()
        assert str(tmp_path) in str(caught.value), name
