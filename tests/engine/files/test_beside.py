"""Conversions beside their inputs: in any order, over earlier results of any program, never over another file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import ckpt_to_safetensors, convert, reshard, safetensors_to_ckpt
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import load_manifest
from ms_ckpt_ext.errors import DiscoveryError
from ms_ckpt_ext.formats import registry
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from tests.support.checkpoints import source, tree
from tests.support.formats import KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents

VALUES = {"w": np.arange(12, dtype="f4").reshape(3, 4), "b": np.ones(3, "f2"), "step": np.array(7, "i4")}


def as_stock(path: Path, values: Any = VALUES, newer: int = 1) -> Path:
    """A safetensors file written by another program, some seconds after the file of the other format beside it."""
    save_file(dict(values), path, {"format": "ms"})
    beside = path.with_suffix(".ckpt")
    if beside.exists():
        at = beside.stat().st_mtime_ns + newer * 10**9
        os.utime(path, ns=(at, at))
    return path


def make_ckpt(path: Path, values: Any = VALUES) -> Path:
    """A `.ckpt` with these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name("scratch.safetensors")
    save_file(dict(values), scratch)
    convert(scratch, path, digests=False)
    scratch.unlink()
    (path.parent / ".ms_ckpt_ext.json").unlink()
    return path


# What is converted beside its inputs: a tree, a tree in it, one file. Each finds what came before.
STEPS: dict[str, Callable[[Path], Any]] = {
    "tree": lambda root: ckpt_to_safetensors(root),
    "file": lambda root: ckpt_to_safetensors(root / "rank0/net.ckpt"),
    "folder": lambda root: convert(root / "rank0", root / "rank0", to="safetensors"),
    "all": lambda root: convert(root.parent, root.parent, to="safetensors"),
    "link": lambda root: ckpt_to_safetensors(os.path.relpath(root.parent / "link/rank0/net.ckpt")),
}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_one_after_another(
    first: str, second: str, changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part after its whole, and the other way round; also when the input is another by then."""
    root = tmp_path / "runs/a"
    path = write_ckpt(root / "rank0/net.ckpt")
    (tmp_path / "runs/link").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for step in (first, second, first):
        STEPS[step](root)
        assert contents(path.with_suffix(".safetensors")) == contents(path)
        for folder in (tmp_path / "runs", root, root / "rank0"):
            held = load_manifest(str(folder))
            assert held is None or check_digests(str(folder), held) == []
        if changed:
            path.write_bytes(write_ckpt(tmp_path / "other.ckpt", piece=32).read_bytes() if step == first else b"")
            write_ckpt(path, crc=step == first)
    assert not list(tmp_path.rglob(".ms_ckpt_ext"))


def test_there_and_back_in_place(tmp_path: Path) -> None:
    """The original holds what would be written, and is left as it is; also once its conversion was made anew."""
    path = write_ckpt(tmp_path / "rank_0/net.ckpt", crc=True)
    before = path.read_bytes(), path.stat().st_ino
    for _ in range(2):
        ckpt_to_safetensors(tmp_path)
        os.utime(path, ns=(time := path.with_suffix(".safetensors").stat().st_mtime_ns + 1, time))
        safetensors_to_ckpt(tmp_path)
        safetensors_to_ckpt(path.with_suffix(".safetensors"))
        assert (path.read_bytes(), path.stat().st_ino) == before


def test_an_earlier_result_of_stock(tmp_path: Path) -> None:
    """Of the same input: left. Of what the input was before: replaced. Both for the tree and for a file."""
    path = make_ckpt(tmp_path / "rank_0/net.ckpt")
    result = as_stock(path.with_suffix(".safetensors"))
    inode = result.stat().st_ino
    for call in (lambda: ckpt_to_safetensors(tmp_path), lambda: ckpt_to_safetensors(path)):
        call()
        assert result.stat().st_ino == inode
    report = convert(path, path.parent, to="safetensors")
    assert report.files_kept == ("net.safetensors",) and report.bytes_written == 0 and report.published
    as_stock(result, {**VALUES, "w": VALUES["w"] + 1}, newer=-1)
    ckpt_to_safetensors(tmp_path)
    assert {name: array.tobytes() for name, array in load_file(result).items()} == {
        name: array.tobytes() for name, array in VALUES.items()
    }


def test_an_earlier_result_without_the_map(tmp_path: Path) -> None:
    """A conversion by other names is one of this input as well."""
    path = make_ckpt(tmp_path / "net.ckpt")
    result = as_stock(path.with_suffix(".safetensors"))
    ckpt_to_safetensors(path, name_map={"w": "weight"})
    assert set(load_file(result)) == {"weight", "b", "step"}
    ckpt_to_safetensors(path)
    assert set(load_file(result)) == {*VALUES}


def test_what_stock_loses_makes_no_difference(tmp_path: Path) -> None:
    """Tensors without elements."""
    path = make_ckpt(tmp_path / "net.ckpt", {**VALUES, "none": np.zeros((0, 3), "f4")})
    as_stock(path.with_suffix(".safetensors"))
    ckpt_to_safetensors(path)


# Another file under the name of a result -> what is said about it
STRANGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other values": (lambda p: as_stock(p, {**VALUES, "w": VALUES["w"] + 1}), "newer than the input .*parameter 'w'"),
    "one bit": (lambda p: as_stock(p, {**VALUES, "b": np.array([1, 1, 1.001], "f2")}), "other values .*'b'"),
    "another shape": (lambda p: as_stock(p, {**VALUES, "w": VALUES["w"].reshape(4, 3)}), r"\[4, 3\] there, .*\[3, 4\]"),
    "another dtype": (lambda p: as_stock(p, {**VALUES, "w": VALUES["w"].astype("i4")}), "'w': I32 .* there, F32"),
    "another name": (lambda p: as_stock(p, {**VALUES, "x": VALUES["w"]}), "'x': F32 .* there, nothing here"),
    "less": (lambda p: as_stock(p, {"w": VALUES["w"]}), "'b': nothing there, F16"),
    "another, and older": (lambda p: as_stock(p, {"w": VALUES["w"]}, newer=-9), "other parameters"),
    "no checkpoint": (lambda p: p.write_bytes(b"notes of mine"), "cannot be read as a checkpoint"),
    "nothing": (lambda p: p.write_bytes(b""), "cannot be read as a checkpoint"),
    "a link to nowhere": (lambda p: p.symlink_to("nowhere"), "cannot be read as a checkpoint"),
}


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("strange", STRANGE)
def test_another_file_stays(strange: str, single: bool, tmp_path: Path) -> None:
    path = make_ckpt(tmp_path / "rank_0/net.ckpt")
    result, (make, told) = path.with_suffix(".safetensors"), STRANGE[strange]
    make(result)
    before = os.readlink(result) if result.is_symlink() else result.read_bytes()
    for call in (
        lambda: ckpt_to_safetensors(path if single else tmp_path),
        lambda: convert(path if single else tmp_path, path.parent if single else tmp_path, to="safetensors"),
        lambda: convert(path, path.parent, to="safetensors", dry_run=True),
    ):
        with pytest.raises(
            DiscoveryError, match=rf"net.safetensors' is in the way of what '.*net.ckpt' becomes.*{told}"
        ):
            call()
    assert (os.readlink(result) if result.is_symlink() else result.read_bytes()) == before
    ckpt_to_safetensors(path if single else tmp_path, tmp_path / "elsewhere")


@pytest.mark.parametrize("single", [False, True])
def test_what_was_put_in_the_place_of_a_result(single: bool, tmp_path: Path) -> None:
    """On record is what is as it was published; files of the same size are not taken for it."""
    path, other = make_ckpt(tmp_path / "rank_0/net.ckpt"), make_ckpt(tmp_path / "rank_0/other.ckpt")
    asked = path if single else tmp_path
    ckpt_to_safetensors(asked)
    ckpt_to_safetensors(other)
    result = path.with_suffix(".safetensors")
    size = result.stat().st_size
    result.unlink()
    as_stock(result, {**VALUES, "w": VALUES["w"] * 2})
    assert abs(result.stat().st_size - size) < 64
    with pytest.raises(DiscoveryError, match="in the way"):
        ckpt_to_safetensors(asked)
    assert load_file(result)["w"].tobytes() == (VALUES["w"] * 2).tobytes()


def test_one_of_many_in_the_way(tmp_path: Path) -> None:
    """Nothing is written, not even for the others."""
    for rank in range(4):
        make_ckpt(tmp_path / f"rank_{rank}/net.ckpt")
    as_stock(tmp_path / "rank_1/net.safetensors")
    as_stock(tmp_path / "rank_2/net.safetensors", {"w": np.ones(3)})
    before = tree(tmp_path)
    with pytest.raises(DiscoveryError, match="rank_2/net.safetensors' is in the way"):
        ckpt_to_safetensors(tmp_path)
    assert tree(tmp_path) == before
    (tmp_path / "rank_2/net.safetensors").unlink()
    ckpt_to_safetensors(tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_with_a_checksum_or_a_key(tmp_path: Path) -> None:
    """Then an equal file is not what was asked for."""
    path = make_ckpt(tmp_path / "net.ckpt")
    result = as_stock(path.with_suffix(".safetensors"))
    convert(path, tmp_path, to="safetensors", crc=True)
    assert "crc_num" in registry.read_index(str(result)).metadata
    result.unlink()
    as_stock(result)
    convert(path, tmp_path, to="safetensors", enc_key=KEY)
    assert contents(result, Access(Key(KEY))) == contents(path)
    shutil.copy(result, tmp_path / "copy")
    result.unlink()
    shutil.copy(tmp_path / "copy", result)  # encrypted, and not on record any more
    convert(path, tmp_path, to="safetensors", enc_key=KEY)
    with pytest.raises(DiscoveryError, match="in the way"):
        shutil.copy(tmp_path / "copy", result)
        convert(path, tmp_path, to="safetensors", enc_key=b"another key 1234")


def test_records_of_other_jobs(tmp_path: Path) -> None:
    """What a re-cut published is this package's, however far above its target was."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    strategy = root / "strategy.ckpt"
    reshard(root / "shards", target / "cut", strategy=strategy, to_strategy=strategy, to="ckpt")
    safetensors = target / "cut/rank_1/net.safetensors"
    save_file({"w": np.ones(3)}, safetensors)
    safetensors_to_ckpt(safetensors)
    assert set(registry.read_index(str(safetensors.with_suffix(".ckpt"))).tensors) == {"w"}
