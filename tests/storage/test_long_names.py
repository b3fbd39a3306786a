"""File names as long as the file system takes, 255 bytes: temporary and hidden names are short."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import (
    ckpt_to_safetensors,
    convert,
    decrypt,
    encrypt,
    errors,
    reshard,
    safetensors_to_ckpt,
    transform_checkpoint_by_rank,
    transform_checkpoints,
)
from ms_ckpt_ext.engine.resume.records import Record, home_of, read_records, write_record
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from ms_ckpt_ext.storage.linux import derived
from tests.support.checkpoints import source, tree
from tests.support.dying import changes_names, nth, survives
from tests.support.formats import KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents


def long(ending: str, length: int, letter: str = "q") -> str:
    """A name of so many bytes."""
    filled, rest = divmod(length - len(ending), len(letter.encode()))
    return letter * filled + "x" * rest + ending


def by_rank(at: Path, name: str) -> None:
    root = source(at / "src")
    files = {rank: root / f"shards/rank_{rank}/net.safetensors" for rank in range(4)}
    for form in (".ckpt", ".safetensors"):
        path = at / "out" / (name[: -len(form)] + form)
        transform_checkpoint_by_rank(0, files, path, root / "strategy.ckpt", crc=form == ".ckpt")


def prefixed(at: Path, name: str) -> None:
    root = source(at / "src")
    strategy, ending = root / "strategy.ckpt", name[name.rindex("0.") + 1 :]
    prefix = name[: -len("0" + ending)]
    transform_checkpoints(root / "shards", at / "out", prefix, strategy, strategy, output_format=ending[1:])
    assert f"{prefix}3{ending}" in os.listdir(at / "out/rank_3")


def sealed(at: Path, name: str) -> None:
    there = write_ckpt(at / "in/rank_0" / name)
    encrypt(at / "in", at / "out", enc_key=KEY)
    encrypt(there, at / "one", enc_key=KEY, enc_mode="AES-CBC")
    for folder in ("out", "one"):
        decrypt(at / folder, at / f"back_{folder}", dec_key=KEY)
    assert tree(at / "back_out") == tree(at / "in") and tree(at / "back_one") == tree(at / "in/rank_0")


def converted(at: Path, name: str) -> None:
    there = write_ckpt(at / "in/rank_0" / (name[: -len(".safetensors")] + ".ckpt"))
    ckpt_to_safetensors(at / "in", at / "out")
    ckpt_to_safetensors(there)
    safetensors_to_ckpt(at / "out", at / "back")
    convert(at / "out", at / "sealed", to="ckpt", enc_key=KEY, crc=True)
    assert contents(next((at / "back/rank_0").glob("*.ckpt"))) == contents(there)


JOBS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "by rank": (".safetensors", by_rank),
    "a prefix": ("0.safetensors", prefixed),
    "a prefix, .ckpt": ("0.ckpt", prefixed),
    "encrypt and decrypt": (".ckpt", sealed),
    "convert": (".safetensors", converted),
}


@pytest.mark.parametrize("length", [248, 255])
@pytest.mark.parametrize("letter", ["q", "é", "权", "😀"])
@pytest.mark.parametrize("job", JOBS)
def test_every_job(job: str, letter: str, length: int, tmp_path: Path) -> None:
    ending, run = JOBS[job]
    name = long(ending, length, letter)
    assert len(os.fsencode(name)) == length
    run(tmp_path, name)
    assert name in {os.path.basename(each) for each in tree(tmp_path / "out")}
    assert not list(tmp_path.rglob(".ms_ckpt_ext"))


def test_folders_and_sources(tmp_path: Path) -> None:
    """Long names of folders in a tree, and of what is read."""
    folder, name = long("", 255), long(".safetensors", 255)
    (tmp_path / "in" / folder / "rank_0").mkdir(parents=True)
    save_file({"w": np.ones((2, 3), np.float32)}, tmp_path / "in" / folder / "rank_0" / name)
    convert(tmp_path / "in", tmp_path / "out", to="ckpt", file_name_regex="q")
    assert set(tree(tmp_path / "out")) == {f"{folder}/rank_0/{name[: -len('.safetensors')]}.ckpt"}
    reshard(tmp_path / "in" / folder, tmp_path / "cut" / folder)
    assert set(tree(tmp_path / "cut")) == {f"{folder}/rank_0/net.safetensors"}


def test_names_alike_but_for_their_ends(tmp_path: Path) -> None:
    """They are kept apart while they are written."""
    names = [long(f"{number}.ckpt", 255) for number in range(4)]
    for number, name in enumerate(names):
        write_ckpt(tmp_path / "in" / name, crc=bool(number % 2))
    convert(tmp_path / "in", tmp_path / "out", crc=True)
    assert {*tree(tmp_path / "out")} == {*names}
    for name in names:
        assert contents(tmp_path / "out" / name) == contents(tmp_path / "in" / name)


def test_killed_anywhere(tmp_path: Path) -> None:
    name = long(".ckpt", 255)
    for stop_at in range(1, 30):
        at = tmp_path / str(stop_at)
        write_ckpt(at / "in" / name)
        finished = survives(lambda at=at: convert(at / "in", at / "out", crc=True), nth(stop_at, changes_names))
        convert(at / "in", at / "out", crc=True)
        assert set(tree(at / "out")) == {name}
        if finished:
            return
    raise AssertionError("never came to its end")


def test_records_and_strategies(tmp_path: Path) -> None:
    name, strategy = long(".safetensors", 255), long(".json", 255)
    (tmp_path / "rank_0").mkdir()
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "rank_0" / name)
    home = home_of(str(tmp_path / "rank_0" / name), 0)
    record = Record(0, 1, home.file, 3, 0.0, True)
    assert write_record(home, record, None)
    assert read_records(str(tmp_path), home.name) == [record]
    known = load_strategy(source(tmp_path / "src") / "strategy.ckpt")
    save_strategy(known, tmp_path / strategy)
    assert load_strategy(tmp_path / strategy).layouts == known.layouts


def test_one_byte_too_many(tmp_path: Path) -> None:
    """Counted in bytes, not in letters."""
    root = source(tmp_path / "src")
    for letter in ("q", "权"):
        prefix = long("", 243, letter)
        with pytest.raises(errors.StorageError, match="File name too long: it has 256 bytes"):
            transform_checkpoints(
                root / "shards", tmp_path / "out", prefix, root / "strategy.ckpt", output_format="safetensors"
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.ckpt", "é" * 120, "q" * 255, "权" * 85, "\udcff" * 200, "." * 200])
def test_derived_names(name: str) -> None:
    names = {os.fsencode(derived(Path("out") / name, ending).name) for ending in (".partial", ".note")}
    assert len(names) == 2 and all(len(each) <= 143 for each in names)
    assert derived(Path(name), ".note") != derived(Path(name[:-1] + "z"), ".note")


def test_one_file_from_path_to_path(tmp_path: Path) -> None:
    path = write_ckpt(tmp_path / long(".ckpt", 255))
    convert(path, tmp_path / long(".safetensors", 255, "r"))
    assert contents(tmp_path / long(".safetensors", 255, "r")) == contents(path)
