"""Conversion: files and trees, names, text, scalars, checksums; what is refused, and what a rerun does."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import ckpt_to_safetensors, convert, decrypt, encrypt, safetensors_to_ckpt, unified_safetensors
from ms_ckpt_ext.errors import (
    ArgumentTypeError,
    ChecksumError,
    DecryptionError,
    DiscoveryError,
    StorageError,
    UsageError,
)
from ms_ckpt_ext.formats import registry
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from tests.support.checkpoints import assert_nothing_complete, tree
from tests.support.damage import time_limit
from tests.support.dying import changes_names, completes, nth, survives
from tests.support.formats import CASE, KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents


def test_a_file_without_parameters(tmp_path: Path) -> None:
    """Without tensors, safetensors has a header, and a `.ckpt` is empty."""
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="a.safetensors' holds no parameter: as .ckpt it would be an empty file"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", to="ckpt")
    assert_nothing_complete(tmp_path / "out")
    for crc in (True, False):
        convert(tmp_path / "a.safetensors", tmp_path / f"{crc}.safetensors", crc=crc)
        assert contents(tmp_path / f"{crc}.safetensors") == {}


def test_a_pipe_among_the_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in/a.ckpt")
    with time_limit(), pytest.raises(StorageError, match="a.ckpt.*no regular file"):
        convert(tmp_path / "in", tmp_path / "out")
    assert_nothing_complete(tmp_path / "out")


def test_there_and_back(tmp_path: Path) -> None:
    source = write_ckpt(tmp_path / "net.ckpt")
    report = convert(source, tmp_path / "net.safetensors")
    assert report.files_written == ("net.safetensors",)
    assert contents(tmp_path / "net.safetensors") == contents(source)
    assert {name: entry[:2] for name, entry in contents(source).items()} == {
        "z.weight": ("F32", (7, 9)),
        "a.bias": ("BF16", (5,)),
        "global_step": ("I32", (1,)),
        "learning_rate": ("F32", ()),
        "none": ("F32", (0, 3)),
        "note": ("STR", (4,)),
        "packed": ("I8", (6,)),
    }
    assert contents(source)["packed"][3] == "Int4"
    convert(tmp_path / "net.safetensors", tmp_path / "back", to="ckpt")
    assert contents(tmp_path / "back" / "net.ckpt") == contents(source)


def test_text_in_safetensors_is_its_code_points(tmp_path: Path) -> None:
    """Any reader of the format opens the file."""
    from safetensors.numpy import load_file

    source = write_ckpt(tmp_path / "net.ckpt")
    convert(source, tmp_path / "out.safetensors", choice_func=lambda name: name != "a.bias")  # numpy has no BF16
    metadata = header_of(tmp_path / "out.safetensors")["__metadata__"]
    assert metadata == {"format": "ms", "packed": "Int4", "ms_ckpt_ext.text": '["note"]'}
    array = load_file(tmp_path / "out.safetensors")["note"]
    assert array.dtype == np.uint32
    assert "".join(map(chr, array)) == "nöte"


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


@pytest.mark.parametrize("kind", ["ckpt", "ckpt_crc", "dedup", "safetensors"])
def test_golden_trees_both_ways(kind: str, golden: Path, tmp_path: Path) -> None:
    source = golden / CASE / kind
    suffix, to = (".ckpt", "safetensors") if "ckpt" in kind else (".safetensors", "ckpt")
    if not list(source.rglob(f"*{suffix}")):
        suffix, to = ".ckpt", "safetensors"
    away, back = (
        (ckpt_to_safetensors, safetensors_to_ckpt)
        if to == "safetensors"
        else (safetensors_to_ckpt, ckpt_to_safetensors)
    )
    away(str(source), str(tmp_path / "away"))
    back(tmp_path / "away", tmp_path / "back", processes_num=3)
    files = sorted(path for path in source.rglob(f"*{suffix}"))
    assert len(files) == 8
    for path in files:
        name = path.relative_to(source)
        assert contents(tmp_path / "away" / name.with_suffix(f".{to}")) == contents(path)
        assert contents(tmp_path / "back" / name) == contents(path)


@pytest.mark.parametrize("mode", ["aes_gcm", "aes_cbc", "sm4_cbc"])
def test_decrypting_what_mindspore_encrypted(mode: str, golden: Path, tmp_path: Path) -> None:
    """The plaintext is that of the plain set, byte for byte; so is what a conversion gives."""
    source, plain = golden / CASE / f"ckpt_{mode}", golden / CASE / "ckpt"
    decrypt(source, tmp_path / "plain", dec_key=KEY)
    names = sorted(path.relative_to(source) for path in source.rglob("*.ckpt"))
    assert len(names) == 2
    convert(source, tmp_path / "converted", to="safetensors", dec_key=KEY, dec_mode=mode.upper().replace("_", "-"))
    for name in names:
        assert (tmp_path / "plain" / name).read_bytes() == (plain / name).read_bytes()
        assert contents((tmp_path / "converted" / name).with_suffix(".safetensors")) == contents(plain / name)


@pytest.mark.parametrize("key", [b"x" * 16, None])
def test_a_wrong_key_writes_nothing(key: Any, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DecryptionError, match="key"):
        convert(golden / CASE / "ckpt_aes_gcm", tmp_path / "out", to="safetensors", dec_key=key)
    assert not (tmp_path / "out").exists()


def test_the_key_may_come_from_the_environment(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.DEC_KEY_VARIABLE, KEY.decode())
    ckpt_to_safetensors(golden / CASE / "ckpt_aes_gcm", tmp_path / "out")
    ckpt_to_safetensors(golden / CASE / "ckpt", tmp_path / "plain")  # the key need not be used
    written, plain = tree(tmp_path / "out"), tree(tmp_path / "plain")
    assert written
    assert written.items() <= plain.items()


def test_a_rerun_does_nothing_and_a_changed_source_is_converted_anew(tmp_path: Path) -> None:
    source = write_ckpt(tmp_path / "in" / "rank_0" / "net.ckpt")
    convert(tmp_path / "in", tmp_path / "out", to="safetensors")
    again = convert(tmp_path / "in", tmp_path / "out", to="safetensors")
    assert (again.bytes_read, again.files_kept, again.published) == (0, ("rank_0/net.safetensors",), True)
    write_ckpt(source, crc=True)
    assert convert(tmp_path / "in", tmp_path / "out", to="safetensors").files_written == ("rank_0/net.safetensors",)


def test_results_beside_their_sources_are_no_mixture(tmp_path: Path) -> None:
    write_ckpt(tmp_path / "rank_0" / "net.ckpt")
    for _ in range(2):
        ckpt_to_safetensors(tmp_path)
    assert contents(tmp_path / "rank_0" / "net.safetensors") == contents(tmp_path / "rank_0" / "net.ckpt")


def test_a_conversion_beside_its_source_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Wherever the publication of a second result stops, the same call finishes it."""
    for stop_at in range(1, 40):
        root = tmp_path / str(stop_at)
        for name in ("net", "other"):
            write_ckpt(root / "rank_0" / f"{name}.ckpt")
        ckpt_to_safetensors(root)
        for name in ("net", "other"):
            write_ckpt(root / "rank_0" / f"{name}.ckpt", crc=True)
        finished = survives(lambda root=root: ckpt_to_safetensors(root), nth(stop_at, changes_names))
        ckpt_to_safetensors(root)
        for name in ("net", "other"):
            path = root / "rank_0" / f"{name}.ckpt"
            assert contents(path.with_suffix(".safetensors")) == contents(path)
        if finished:
            return
    raise AssertionError("never came to its end")


def test_a_mixture(tmp_path: Path) -> None:
    """The names of MindSpore's functions say which format is the input; `convert` asks."""
    write_ckpt(tmp_path / "rank_0" / "net-1_1.ckpt")
    convert(tmp_path / "rank_0" / "net-1_1.ckpt", tmp_path / "rank_1" / "net-1_2.safetensors")
    with pytest.raises(DiscoveryError, match=r"'rank_0/net-1_1.ckpt' and 'rank_1/net-1_2.safetensors'"):
        convert(tmp_path, tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out").exists()
    convert(tmp_path, tmp_path / "out", to="safetensors", file_name_regex=r"1_1\.ckpt$")
    ckpt_to_safetensors(tmp_path, tmp_path / "as_stock")
    assert set(tree(tmp_path / "out")) == set(tree(tmp_path / "as_stock")) == {"rank_0/net-1_1.safetensors"}
    safetensors_to_ckpt(tmp_path)
    assert contents(tmp_path / "rank_1/net-1_2.ckpt") == contents(tmp_path / "rank_0/net-1_1.ckpt")


def test_strategy_files_are_no_checkpoints(tmp_path: Path, golden: Path) -> None:
    write_ckpt(tmp_path / "in" / "rank_0" / "net.ckpt")
    shutil.copy(golden / "dp2_tp4" / "strategy.ckpt", tmp_path / "in" / "rank_0" / "strategy.ckpt")
    ckpt_to_safetensors(tmp_path / "in", tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"rank_0/net.safetensors"}


def test_a_merged_checkpoint_keeps_its_map_true(golden: Path, tmp_path: Path) -> None:
    unified_safetensors(golden / "dp2_tp4" / "shards", golden / "dp2_tp4" / "strategy.ckpt", tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "out", to="ckpt", choice_func=lambda name: f"net.{name}")
    names = json.loads((tmp_path / "out" / "param_name_map.json").read_text())
    assert set(names["weight_map"]) == set(contents(tmp_path / "out" / "part0.ckpt"))
    assert all(name.startswith("net.") for name in names["weight_map"])
    assert set(names["weight_map"].values()) == {"part0.ckpt"}
    assert names["metadata"] == json.loads((tmp_path / "merged" / "param_name_map.json").read_text())["metadata"]


def test_names_and_choices(tmp_path: Path) -> None:
    source = write_ckpt(tmp_path / "net.ckpt")
    convert(source, tmp_path / "a", to="safetensors", name_map={"packed": "p4"}, choice_func=lambda n: n != "note")
    held = contents(tmp_path / "a" / "net.safetensors")
    assert held["p4"] == contents(source)["packed"]
    assert "note" not in held
    assert "packed" not in held
    with pytest.raises(UsageError, match="both 'a.bias' and 'z.weight' .* get the name 'z.weight'|both 'z.weight' and"):
        convert(source, tmp_path / "b", to="safetensors", name_map={"a.bias": "z.weight"})
    with pytest.raises(UsageError, match="dropped every parameter"):
        convert(source, tmp_path / "b", to="safetensors", choice_func=lambda _: False)
    with pytest.raises(ArgumentTypeError, match="must return a bool"):
        convert(source, tmp_path / "b", to="safetensors", choice_func=lambda _: 1)  # type: ignore[arg-type, return-value]
    assert not (tmp_path / "b").exists()


def test_checksums_of_sources_are_verified_on_request(tmp_path: Path) -> None:
    source = write_ckpt(tmp_path / "net.ckpt", crc=True)
    convert(source, tmp_path / "good", to="safetensors", crc_check=True)
    raw = bytearray(source.read_bytes())
    ((offset, _), *_) = registry.read_index(str(source)).tensors["z.weight"].extents
    raw[offset] ^= 1
    source.write_bytes(raw)
    with pytest.raises(ChecksumError):
        convert(source, tmp_path / "bad", to="safetensors", crc_check=True)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda p: ckpt_to_safetensors(p / "nothing"), "no such file"),
        (lambda p: ckpt_to_safetensors(p), "no folder whose name starts with 'rank'"),
        (lambda p: ckpt_to_safetensors(p / "a.safetensors"), "must be a .ckpt file"),
        (lambda p: safetensors_to_ckpt(p / "a.ckpt"), "must be a .safetensors file"),
        (lambda p: ckpt_to_safetensors(p / "a.ckpt", p / "out.d"), "must be a directory"),
        (lambda p: ckpt_to_safetensors(p / "a.ckpt", p / "out", {1: 2}), "name_map"),
        (lambda p: ckpt_to_safetensors(p / "a.ckpt", p / "out", None, "xyz"), "not found in file_path"),
        (lambda p: ckpt_to_safetensors(p / "a.ckpt", p / "out", None, "("), "not a regular expression"),
        (lambda p: ckpt_to_safetensors(p, p / "out", processes_num=0), "at least 1"),
        (lambda p: convert(p / "a.ckpt", p / "out", to="onnx"), "to must be one of"),
        (lambda p: convert(p / "a.ckpt", p / "out.ckpt", to="safetensors"), "contradict"),
        (lambda p: convert(p / "a.ckpt", p), "is a file of the source"),
        (lambda p: convert(p / "a.txt", p / "out"), "not a checkpoint by its name"),
        (lambda p: convert(p / "empty", p / "out", to="ckpt"), "holds no checkpoint file"),
        (lambda p: convert(p / "a.ckpt", p / "out", to="safetensors", dec_key="secret"), "must be bytes"),
    ],
)
def test_what_is_refused(call: Any, error: str, tmp_path: Path) -> None:
    write_ckpt(tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=error) as caught:  # stock raises ValueError too
        call(tmp_path)
    assert "secret" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("key", [None, KEY])
def test_a_rerun_keeps_what_was_finished(key: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the first of three files: nothing is visible, and the next run writes the other two."""
    for rank in range(3):
        write_ckpt(tmp_path / "in" / f"rank_{rank}" / "net.ckpt")
    finished: list[str] = []
    rename = os.rename

    def first_only(old: Path, new: Path) -> None:
        if completes("rename", (old, new)):
            if finished:
                raise KeyboardInterrupt
            finished.append("/".join(new.parts[new.parts.index(".ms_ckpt_ext") + 2 :]))
        rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", first_only)
        convert(tmp_path / "in", tmp_path / "out", to="safetensors", enc_key=key)
    assert_nothing_complete(tmp_path / "out")
    report = convert(tmp_path / "in", tmp_path / "out", to="safetensors", enc_key=key)
    assert report.files_kept == tuple(finished)
    assert len(report.files_written) == 2
    assert len(tree(tmp_path / "out")) == 3
    access = Access(Key(key) if key else None)
    assert contents(tmp_path / "out" / finished[0], access) == contents(tmp_path / "in" / "rank_0" / "net.ckpt")


def test_a_regex_that_a_single_file_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_ckpt(tmp_path / "net.ckpt")
    for job in (
        lambda: convert(tmp_path / "net.ckpt", tmp_path / "out", file_name_regex="other"),
        lambda: encrypt(tmp_path / "net.ckpt", tmp_path / "out", enc_key=KEY, file_name_regex="other"),
        lambda: decrypt(tmp_path / "net.ckpt", tmp_path / "out", dec_key=KEY, file_name_regex="other"),
    ):
        with pytest.raises(UsageError, match="file_name_regex 'other' is not found in the name"):
            job()
    assert not (tmp_path / "out").exists()


def test_names_that_the_input_lacks_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_ckpt(tmp_path / "net.ckpt")
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        convert(tmp_path / "net.ckpt", tmp_path / "out.safetensors", name_map={"gone": "x", "z.weight": "y"})
    assert "name_map speaks of parameters that the input does not hold: ['gone']" in caplog.text
    with pytest.raises(ArgumentTypeError, match="in the input to names .* in the output"):
        ckpt_to_safetensors(tmp_path / "net.ckpt", tmp_path / "out", {1: 2})  # type: ignore[dict-item]
