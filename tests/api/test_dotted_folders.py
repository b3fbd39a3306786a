"""A directory is recognised as such, whatever its name ends with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import ckpt_to_safetensors, convert, decrypt, encrypt, safetensors_to_ckpt
from ms_ckpt_ext.engine.resume.candidates import candidates
from ms_ckpt_ext.engine.resume.sightings import look
from ms_ckpt_ext.errors import DiscoveryError, UsageError
from tests.support.checkpoints import merge, source, tree
from tests.support.formats import KEY, write_ckpt

NAMES = ["qwen2.5-7b", "run.ckpt", "v1.0.safetensors", "step.300", "map.json"]


@pytest.fixture(params=NAMES)
def folder(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An existing directory, named from where it is."""
    monkeypatch.chdir(tmp_path)
    os.makedirs(request.param)
    return Path(request.param)


CALLS: dict[str, Callable[[Path], Any]] = {
    "ckpt_to_safetensors": lambda to: ckpt_to_safetensors("in/rank_0/net.ckpt", to),
    "ckpt_to_safetensors of a tree": lambda to: ckpt_to_safetensors("in", to),
    "safetensors_to_ckpt": lambda to: safetensors_to_ckpt("st/rank_0/net.safetensors", to),
    "convert": lambda to: convert("in/rank_0/net.ckpt", to, to="safetensors"),
    "convert a tree": lambda to: convert("in", to, to="safetensors"),
    "encrypt": lambda to: encrypt("in/rank_0/net.ckpt", to, enc_key=KEY),
    "decrypt": lambda to: decrypt("sealed/rank_0/net.ckpt", to, dec_key=KEY),
}


@pytest.mark.parametrize("call", CALLS)
def test_as_a_target(call: str, folder: Path) -> None:
    write_ckpt(Path("in/rank_0/net.ckpt"))
    convert("in", "st", to="safetensors")
    encrypt("in", "sealed", enc_key=KEY)
    CALLS[call](folder)
    (name,) = tree(folder)
    inner = "rank_0/" if "tree" in call else ""
    assert name in (f"{inner}net.ckpt", f"{inner}net.safetensors")


def test_as_a_source_and_in_place(folder: Path) -> None:
    write_ckpt(folder / "rank_0/net.ckpt")
    ckpt_to_safetensors(folder)
    assert sorted(tree(folder)) == ["rank_0/net.ckpt", "rank_0/net.safetensors"]
    (folder / "rank_0/net.ckpt").unlink()
    assert len(ms_ckpt_ext.load(folder)) > 3
    assert ms_ckpt_ext.inspect(folder).kind != "strategy"


def test_another_file_in_place(folder: Path) -> None:
    """What stands in the way is looked for in a directory with a suffix as in any other."""
    write_ckpt(folder / "net.ckpt")
    (folder / "net.safetensors").write_bytes(b"another's")
    with pytest.raises(DiscoveryError, match="in the way"):
        convert(folder / "net.ckpt", folder, to="safetensors")


def test_among_files(tmp_path: Path) -> None:
    """Folders inside a checkpoint's folder with names like those of its files."""
    root = source(tmp_path / "src")
    for rank in range(4):
        (root / f"shards/rank_{rank}/net-9_9.ckpt").mkdir()
        (root / f"shards/rank_{rank}/log.safetensors").mkdir()
    merge(root, tmp_path / "out")
    assert [c.name for c in candidates([look(str(root / "shards"))])] == ["net.safetensors"]
    assert ms_ckpt_ext.inspect(root / "shards").kind != "strategy"
    (root / "only/x.ckpt").mkdir(parents=True)
    assert candidates([look(str(root / "only"))]) == []
    with pytest.raises(DiscoveryError):
        ms_ckpt_ext.inspect(root / "only")


@pytest.mark.parametrize("name", ["out.d", "qwen2.5-7b"])
def test_what_is_not_there_yet(name: str, tmp_path: Path) -> None:
    """Stock refuses it, too; the message is true of it. A separator at its end says that a directory is meant."""
    write_ckpt(tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="must be a directory, and .*, which is none, ends like a file's name"):
        ckpt_to_safetensors(tmp_path / "a.ckpt", tmp_path / name)
    ckpt_to_safetensors(tmp_path / "a.ckpt", f"{tmp_path / name}/")
    assert set(tree(tmp_path / name)) == {"a.safetensors"}
