"""`inspect`, `diff-strategy` and `verify` on golden cases: what is printed, what JSON has, and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import unified_safetensors
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import update_manifest
from ms_ckpt_ext.formats.registry import read_index
from tests.formats.test_ckpt_reader import value
from tests.support.checkpoints import source
from tests.support.command_line import as_json, fine, run, run_script

KEY = "0123456789ABCDEF"


def test_inspect_shards_with_their_strategy(golden: Path) -> None:
    case = golden / "dp2_tp4"
    words = ["inspect", case / "shards", "--strategy", case / "strategy.ckpt", "--match", "layers.0.w?.weight"]
    found = as_json(*words)
    assert (found["path"], found["kind"]) == (str(case / "shards"), "sharded")
    assert [(file["rank"], file["encryption"]) for file in found["files"]] == [(rank, None) for rank in range(8)]
    assert sum(file["size"] for file in found["files"]) == 414336
    assert (found["strategy"]["world"], found["strategy"]["stages"], found["strategy"]["devices_per_stage"]) == (
        8,
        1,
        8,
    )
    assert found["redundancy"] == {"slices": 12, "stored": 24, "expected": 24, "missing": 0, "replicas": "held"}
    assert found["groups"] == {"weights": {"parameters": 3, "nbytes": 13824, "stored_nbytes": 27648}}
    told = [(p["name"], p["dtype"], p["shape"], p["nbytes"], p["slice_shapes"]) for p in found["parameters"]]
    assert told == [
        ("layers.0.w1.weight", "BF16", [48, 24], 2304, [[12, 24]]),
        ("layers.0.w2.weight", "F32", [24, 48], 4608, [[24, 12]]),
        ("layers.0.wo.weight", "F32", [24, 72], 6912, [[24, 18]]),
    ]
    for parameter, axis in zip(found["parameters"], (0, 1, 1)):
        assert (parameter["slices"], parameter["copies"]) == (4, [2, 2])
        (layout,) = parameter["layouts"]
        assert layout["split"] == [{"axis": axis, "ways": 4, "device_axes": [1], "optimizer_ways": 1}]


def test_inspect_goes_on_after_a_damaged_text(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    texts = {name: value(name.encode(), [0], b"str", "hi".encode("utf-32-le")) for name in ("good", "worse")}
    path.write_bytes(texts["good"] + texts["worse"][:-1] + b"\x40")  # no code point is so high
    assert as_json("inspect", path)["scalars"] == {"good": "hi", "worse": None}
    assert "worse   (not shown)" in fine("inspect", path)


def test_inspect_as_json(golden: Path) -> None:
    case = golden / "formats_dp2_tp4"
    found = as_json("inspect", case / "dedup", "--strategy", case / "strategy.ckpt")
    assert found["kind"] == "sharded"
    assert [file["rank"] for file in found["files"]] == list(range(8))
    assert found["strategy"]["world"] == 8
    assert found["groups"]["weights"]["parameters"] == 14
    assert found["groups"]["optimizer states"]["parameters"] == 28
    assert found["groups"]["scalars"] == {"parameters": 7, "nbytes": 36, "stored_nbytes": 36}
    assert found["scalars"]["global_step"] == [1200]
    assert found["scalars"]["learning_rate"] == pytest.approx(3e-4)
    assert found["redundancy"] == {
        "slices": 150,
        "stored": 150,
        "expected": 336,
        "missing": 0,
        "replicas": "dropped",
    }
    head = next(p for p in found["parameters"] if p["name"] == "head.weight")
    assert (head["dtype"], head["shape"], head["slice_shapes"]) == ("F32", [96, 24], [[24, 24]])
    assert (head["copies"], head["copies_expected"]) == ([1, 1], [2, 2])
    assert head["layouts"][0]["device_matrix"] == [2, 4]
    assert head["layouts"][0]["split"] == [{"axis": 0, "ways": 4, "device_axes": [1], "optimizer_ways": 1}]


def test_inspect_shards_without_a_strategy(golden: Path) -> None:
    words = ["inspect", golden / "formats_dp2_tp4" / "ckpt"]
    found = as_json(*words)
    assert (found["strategy"], found["scalars"]["global_step"]) == (None, [1200])
    (weight,) = (p for p in found["parameters"] if p["name"] == "layers.0.w1.weight")
    assert (weight["shape"], weight["slice_shapes"]) == (None, [[12, 24]])
    assert "… and 29 more (--all lists them)" in fine(*words)
    assert "more (--all lists them)" not in fine(*words, "--all")


@pytest.mark.parametrize(
    ("path", "kind", "told"),
    [
        ("full", "merged", "a merged checkpoint"),
        ("full/model.safetensors", "file", "a checkpoint file"),
        ("tp4/strategy.ckpt", "strategy", "a strategy"),
        ("tp4_pp2/strategy_stages", "strategy", "a strategy"),
        ("trained_dp2_tp2_zero/merged_step3", "merged", "a merged checkpoint"),
    ],
)
def test_inspect_tells_what_it_is(path: str, kind: str, told: str, golden: Path) -> None:
    found = as_json("inspect", golden / path)
    assert (found["path"], found["kind"]) == (str(golden / path), kind)
    assert fine("inspect", golden / path).splitlines()[0] == f"{golden / path}: {told}"


def test_inspect_a_folder_of_files_without_a_map(golden: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copy(golden / "tp4" / "shards" / f"rank_{rank}" / "net.safetensors", tmp_path / f"{rank}.safetensors")
    found = as_json("inspect", tmp_path)
    assert (found["kind"], [file["rank"] for file in found["files"]]) == ("files", [None, None])
    assert "checkpoint files that no map relates" in fine("inspect", tmp_path)


def test_inspect_encrypted_files(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden / "formats_dp2_tp4" / "ckpt_aes_gcm"
    ran = run("inspect", folder)
    assert (ran.code, ran.out) == (6, "")
    assert "is encrypted" in ran.err
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("A_KEY", KEY)
    for given in (("--dec-key-file", tmp_path / "key"), ("--dec-key-env", "A_KEY")):
        found = as_json("inspect", folder, *given)
        assert {file["encryption"] for file in found["files"]} == {"AES-GCM"}
    (tmp_path / "key").write_text(KEY[::-1])
    assert run("inspect", folder, "--dec-key-file", tmp_path / "key").code == 6


# --- diff-strategy


def test_diff_of_equal_strategies(golden: Path) -> None:
    strategy = golden / "tp4" / "strategy.ckpt"
    found = as_json("diff-strategy", strategy, strategy)
    assert (found["same"], found["unchanged"], found["changes"]) == (True, 42, [])


def test_diff_tells_what_changes(golden: Path) -> None:
    a, b = golden / "dp2_tp4_zero" / "strategy.ckpt", golden / "tp4_pp2" / "strategy.ckpt"
    found = as_json("diff-strategy", a, b, "--match", "layers.*", code=1)
    sides = [{key: found[side][key] for key in ("world", "stages", "devices_per_stage", "parameters")} for side in "ab"]
    assert sides == [
        {"world": 8, "stages": 1, "devices_per_stage": 8, "parameters": 42},
        {"world": 8, "stages": 2, "devices_per_stage": 4, "parameters": 56},
    ]
    assert [found[side]["origin"] for side in "ab"] == [f"strategy file {str(path)!r}" for path in (a, b)]
    assert (len(found["changes"]), found["unchanged"], found["only_a"], found["only_b"]) == (12, 0, [], [])
    (norm,) = (change for change in found["changes"] if change["name"] == "layers.1.norm")
    assert norm["what"] == ["stage", "device matrix", "split", "optimizer shard", "copies"]


def test_diff_with_shapes(golden: Path, tmp_path: Path) -> None:
    truth = read_index(str(golden / "full" / "model.safetensors")).tensors
    shapes = {name: {"dtype": entry.dtype.name, "shape": entry.shape} for name, entry in truth.items()}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    words = ["diff-strategy", golden / "dp2_tp4" / "strategy.ckpt", golden / "tp4" / "strategy.ckpt"]
    words += ["--shapes", tmp_path / "shapes.json", "--match", "*.w2.weight"]
    assert "     layers.[0-1].w2.weight  [24, 48], slices [24, 12] -> [24, 12]" in fine(*words, code=1)
    (change, *_) = as_json(*words, code=1)["changes"]
    assert change["shape"] == [24, 48]
    assert change["what"] == ["device matrix", "split", "copies"]
    assert change["b"]["slice_shape"] == [24, 12]


# --- verify


def test_verify_the_same_model(golden: Path) -> None:
    case = golden / "dp2_tp2_pp2_zero"
    found = as_json("verify", case / "shards", golden / "full", "--strategy", case / "strategy.ckpt")
    assert (found["ok"], found["parameters"], found["nbytes"]) == (True, 42, 190944)
    assert not found["differences"] and not found["mismatches"] and found["only_a"] == found["only_b"] == []


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A source under dp2 tp2, and `other.safetensors` with the same parameters, some of them changed."""
    root = source(tmp_path / "source")
    unified_safetensors(root / "shards", root / "strategy.ckpt", tmp_path / "merged")
    arrays = load_file(tmp_path / "merged" / "part0.safetensors")
    arrays["a.w"][3, 4] = np.nan
    arrays["b.w"] = arrays["b.w"].astype(np.float16)
    del arrays["d.w"]
    save_file(arrays, root / "other.safetensors")
    return root


def test_verify_tells_differences(damaged: Path) -> None:
    words = ["verify", damaged / "shards", damaged / "other.safetensors", "--strategy", damaged / "strategy.ckpt"]
    found = as_json(*words, code=1)
    assert (found["ok"], found["parameters"]) == (False, 2)
    assert (found["only_a"], found["only_b"]) == (["d.w", "global_step", "learning_rate"], [])
    assert found["mismatches"] == [{"name": "b.w", "a": "F32[64, 32]", "b": "F16[64, 32]"}]
    (change,) = found["differences"]
    assert (change["name"], change["dtype"], change["shape"]) == ("a.w", "F32", [64, 32])
    assert (change["count"], change["total"], change["nans"]) == (1, 2048, 1)
    assert change["max_abs"] is change["max_ulp"] is None
    assert (change["first"][0]["at"], change["first"][0]["b"]) == ([3, 4], "nan (0x7fc00000)")


def test_verify_by_itself(golden: Path) -> None:
    case = golden / "dp2_tp4"
    words = ["verify", case / "shards", "--strategy", case / "strategy.ckpt", "--match", "head.*"]
    found = as_json(*words)
    assert (found["ok"], found["parameters"], found["files"], found["nbytes"]) == (True, 1, 8, 18432)
    assert (found["absent"], found["gaps"], found["unequal"], found["copies_compared"]) == ([], [], [], 8)
    assert found["not_finite"] == [{"name": "head.weight", "nans": 1, "infinities": 0}]
    assert run(*words, "--finite").code == 1


def test_verify_by_its_manifest(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(golden / "full" / "model.safetensors", path)
    update_manifest(str(tmp_path), {path.name: digest_file(read_index(str(path)))})
    found = as_json("verify", tmp_path, "--manifest")
    assert (found["ok"], found["tensors"], found["files"], found["nbytes"]) == (True, 42, 1, path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = as_json("verify", tmp_path, "--manifest", code=1)
    assert (found["ok"], found["tensors"], found["files"]) == (False, 42, 1)
    (fault,) = found["faults"]
    name = "adam_v.layers.1.w2.weight"
    assert (fault["file"], fault["tensor"], fault["offset"]) == (path.name, name, begins(path, name))
    assert fault["found"] != fault["expected"] and fault["remedy"].startswith("restore the file")


def begins(path: Path, name: str) -> int:
    return read_index(str(path)).tensors[name].extents[0].offset


# --- as a user would, by the installed script

STUMBLES = [
    (["inspect", "nothing"], 3, "no such file or directory: 'nothing'"),
    (["inspect", "empty"], 3, "holds no .safetensors or .ckpt file"),
    (["inspect", "text.safetensors"], 3, "text.safetensors"),
    (["inspect", "full", "--strategy", "nothing"], 3, "cannot read strategy file 'nothing'"),
    (["verify", "shards"], 3, "the strategy that cut them is needed"),
    (["verify", "shards", "--strategy", "other.ckpt"], 3, "other.ckpt"),
    (["verify", "shards", "full", "--finite"], 2, "--finite is for a checkpoint that is checked by itself"),
    (["verify", "full", "--workers", "0"], 2, "--workers: '0' is no number of at least 1"),
    (["verify", "full", "--workers", "many"], 2, "'many' is no number of at least 1"),
    (["verify", "full", "--dec-key-env", "UNSET"], 2, "environment variable UNSET is not set"),
    (["verify", "full", "--dec-key-file", "nothing"], 4, "cannot read the key file 'nothing'"),
    (["verify", "full", "full", "--name-map", "text.safetensors"], 3, "'text.safetensors' is not JSON"),
    (["diff-strategy", "other.ckpt", "full/model.safetensors"], 3, "full/model.safetensors"),
]


@pytest.mark.parametrize(("words", "code", "told"), STUMBLES, ids=[" ".join(row[0]) for row in STUMBLES])
def test_mistakes_are_told_in_one_line(
    words: list[str], code: int, told: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("this is no checkpoint")
    (tmp_path / "full").symlink_to(golden / "full")
    (tmp_path / "shards").symlink_to(golden / "dp2_tp4" / "shards")
    (tmp_path / "other.ckpt").symlink_to(golden / "dp2_tp2" / "strategy.ckpt")
    ran = run(*words)
    assert (ran.code, ran.out) == (code, ""), ran
    assert told in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].startswith(f"ms-ckpt {words[0]}: error: ")


def test_the_installed_script_compares(golden: Path) -> None:
    case = golden / "dp2_tp4"
    ran = run_script("verify", case / "shards", golden / "full", "--strategy", case / "strategy.ckpt")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Same: 42 parameters")
    ran = run_script("verify", case / "shards", golden / "full_layout", "--strategy", case / "strategy.ckpt")
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.startswith("Different: ")
