"""Names that look alike, or are one for a file system: parameters stay apart, files never replace each other."""

from __future__ import annotations

import itertools
import logging
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext import log
from ms_ckpt_ext.cli.words import table, visible
from ms_ckpt_ext.errors import CheckpointError, MissingNameError, StorageError, UsageError, spelled
from ms_ckpt_ext.storage import claims

NFC, NFD = "caf\u00e9", "cafe\u0301"
ALIKE = [
    "w", "W", "w ", "w.", "w\u200b", "w\u202e", "w\ufe0f", "w\u3164", "w\0", "w\u00ad", NFC, NFD, NFC.upper(),
    "\u212b", "\u00c5", "A\u030a", "\uac00", "\u1100\u1161", "\u91cd", "\u2ea1", "\ufb01x", "fix",
]  # fmt: skip


def test_no_two_of_these_are_shown_alike() -> None:
    shown = [repr(CheckpointError(repr(name)).args[0]) and str(CheckpointError(repr(name))) for name in ALIKE]
    drawn = [unicodedata.normalize("NFC", "".join(each for each in text if each.isprintable())) for text in shown]
    assert len(set(drawn)) == len(ALIKE)
    assert not any(
        sign in text for text in shown for sign in "\u200b\u202e\ufe0f\u3164\0\u00ad\u0301\u030a\u212b\u1161"
    )


@pytest.mark.parametrize(
    "text", ["", "w", "\u6743\u91cd", "caf\u00e9", "\uac00", "\U0001f600", "na\u00efve \u2013 \u00df", "a\nb\tc"]
)
def test_what_people_write_stays(text: str) -> None:
    assert spelled(text) == text
    assert visible(text, "\n\t") == text


@given(st.text())
def test_what_is_spelled_is_so_for_good(text: str) -> None:
    once = spelled(text)
    assert spelled(once) == once
    assert unicodedata.normalize("NFC", once) == once
    assert text.isascii() is False or once == text


def test_every_error_and_every_message_tells_them_apart(caplog: pytest.LogCaptureFixture) -> None:
    for error in (
        UsageError(NFD),
        MissingNameError(NFD),
        StorageError(5, NFD),
        StorageError(2, NFD),
        CheckpointError(NFD),
    ):
        assert str(error) == r"cafe\u0301"
    with caplog.at_level(logging.INFO, "ms_ckpt_ext"):
        log.info("%r and %r: 100%%", NFC, NFD)
        log.warning(f"{NFD} at 50%")
    assert [record.getMessage() for record in caplog.records] == [
        r"'café' and 'cafe\u0301': 100%",
        r"cafe\u0301 at 50%",
    ]


def test_a_table_shows_where_a_name_ends() -> None:
    assert [*table(["name", "n"], [["w", "1"], ["w  ", "2"]])][1:] == ["w          1", r"w\x20\x20  2"]


def tensors() -> dict[str, np.ndarray]:
    return {name: np.full((2, 3), n, np.float32) for n, name in enumerate(ALIKE)}


def test_parameters_that_look_alike_are_different_ones(tmp_path: Path) -> None:
    """Through both formats and back, each keeps its own values."""
    save_file(tensors(), tmp_path / "net.safetensors")
    ms_ckpt_ext.convert(tmp_path / "net.safetensors", tmp_path / "there/net.ckpt", sync=False)
    ms_ckpt_ext.convert(tmp_path / "there/net.ckpt", tmp_path / "back/net.safetensors", sync=False)
    found = load_file(tmp_path / "back/net.safetensors")
    assert {name: held.tobytes() for name, held in found.items()} == {n: a.tobytes() for n, a in tensors().items()}
    assert ms_ckpt_ext.verify(tmp_path / "net.safetensors", tmp_path / "back/net.safetensors").ok


def test_a_difference_names_the_one_that_differs(tmp_path: Path, capsys: Any) -> None:
    from ms_ckpt_ext.cli.main import main

    save_file(tensors(), tmp_path / "one.safetensors")
    save_file({**tensors(), NFD: np.zeros((2, 3), np.float32)}, tmp_path / "two.safetensors")
    assert main(["verify", str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")]) != 0
    told = "".join(capsys.readouterr())
    assert r"cafe\u0301" in told and NFC not in told


@pytest.fixture
def folding(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A file system that takes two names for one where they differ in case, or in how a character is composed.

    Files that are made get the name that is there already. The names that were asked for are returned.
    """
    asked: set[str] = set()
    real = os.open

    def alike(name: str) -> str:
        return unicodedata.normalize("NFD", name).casefold()

    def open_(path: Any, flags: int, *more: Any, **named: Any) -> int:
        path = Path(os.fsdecode(path))
        if flags & os.O_CREAT and path.suffix in (".safetensors", ".ckpt"):
            asked.add("/".join(path.parts[-2:]))
            walked = Path(path.anchor)
            for part in path.parts[1:]:
                there = sorted(os.listdir(walked)) if walked.is_dir() else []
                walked /= next((each for each in there if alike(each) == alike(part)), part)
            path = walked
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", open_)
    return asked


PAIRS = [
    ("Model.safetensors", "model.safetensors"),
    (f"{NFC}.safetensors", f"{NFD}.safetensors"),
    ("A/net.safetensors", "a/net.safetensors"),
    ("x/stra\u00dfe.safetensors", "x/STRASSE.safetensors"),
]


def files(root: Path, pair: tuple[str, str]) -> Path:
    for number, name in enumerate((*pair, "other.safetensors")):
        (root / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": np.full(4, number, np.float32)}, root / "src" / name)
    return root / "src"


@pytest.mark.parametrize("pair", PAIRS)
def test_two_results_that_are_one_file(pair: tuple[str, str], folding: set[str], tmp_path: Path) -> None:
    source = files(tmp_path, pair)
    target = tmp_path / "out"
    with pytest.raises(StorageError, match="takes these names for one") as caught:
        ms_ckpt_ext.convert(source, target, to="ckpt", sync=False)
    assert all(spelled(Path(name).stem) in str(caught.value) for name in pair)
    assert not target.exists() or not [path for path in target.rglob("*") if path.is_file()]
    assert len(folding) == 2, "what is not alike is not tried out"


@pytest.mark.parametrize("pair", PAIRS)
def test_two_results_on_a_file_system_that_takes_both(pair: tuple[str, str], tmp_path: Path) -> None:
    source = files(tmp_path, pair)
    ms_ckpt_ext.convert(source, tmp_path / "out", to="ckpt", sync=False)
    ms_ckpt_ext.convert(tmp_path / "out", tmp_path / "back", to="safetensors", sync=False)
    for number, name in enumerate(pair):
        assert load_file(tmp_path / "back" / name)["w"].tobytes() == np.full(4, number, np.float32).tobytes()
    hidden = [path for path in (tmp_path / "out").rglob("*") if "tmp" in path.name]
    assert hidden == [], "nothing is left of the trial"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *itertools.combinations(
            ["a.ckpt", "A.ckpt", "a\u200b.ckpt", "\uff21.ckpt", "a.ckpt.", "a.ckpt  ", "a\ufe0f.ckpt"], 2
        ),
        (NFC, NFD),
        ("d./x", "D /x"),
        ("\u0130", "i\u0307"),
    ],
)
def test_names_that_some_file_system_may_take_for_one(one: str, other: str) -> None:
    assert claims._folded(one) == claims._folded(other)


@pytest.mark.parametrize(
    ("one", "other"), [("a", "b"), ("a/b", "ab"), ("a", "\u0430"), ("rank_1", "rank_10"), ("e", "\u00e9")]
)
def test_names_that_none_does(one: str, other: str) -> None:
    assert claims._folded(one) != claims._folded(other)


def test_a_result_that_is_its_source_by_another_way(tmp_path: Path) -> None:
    """As on a file system that ignores case, where the names differ and the file is one."""
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "net.safetensors")
    before = (tmp_path / "net.safetensors").read_bytes()
    same = os.lstat(tmp_path / "net.safetensors")
    real = os.lstat

    def lstat(path: Any, **named: Any) -> os.stat_result:
        return same if os.path.basename(os.fsdecode(path)) == "NET.safetensors" else real(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        with pytest.raises(UsageError, match=r"NET\.safetensors' is a file of the source"):
            ms_ckpt_ext.convert(tmp_path / "net.safetensors", tmp_path / "NET.safetensors", sync=False)
    assert (tmp_path / "net.safetensors").read_bytes() == before


def test_a_hard_link_of_the_source_is_a_file_of_its_own(tmp_path: Path) -> None:
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "net.safetensors")
    before = (tmp_path / "net.safetensors").read_bytes()
    os.link(tmp_path / "net.safetensors", tmp_path / "other.safetensors")
    ms_ckpt_ext.convert(tmp_path / "net.safetensors", tmp_path / "other.safetensors", name_map={"w": "v"}, sync=False)
    assert (tmp_path / "net.safetensors").read_bytes() == before
    assert set(load_file(tmp_path / "other.safetensors")) == {"v"}
