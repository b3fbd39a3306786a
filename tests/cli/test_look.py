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
    out = fine("inspect", case / "shards", "--strategy", case / "strategy.ckpt", "--match", "layers.0.w?.weight")
    assert out.splitlines() == [
        f"{case / 'shards'}: a sharded checkpoint",
        "  files       8 files, safetensors, 404.6 KiB",
        "  ranks       0-7",
        "  strategy    8 ranks: 1 pipeline stage of 8 devices",
        "  slices      12 different, 24 in files, 24 on ranks: replicas held",
        "",
        "group    parameters      size  in files",
        "weights           3  13.5 KiB  27.0 KiB",
        "",
        "parameter           dtype  shape        size  slice     slices  copies  cut",
        "layers.0.w1.weight  BF16   [48, 24]  2.2 KiB  [12, 24]       4       2  axis 0 in 4 (device axis 1)",
        "layers.0.w2.weight  F32    [24, 48]  4.5 KiB  [24, 12]       4       2  axis 1 in 4 (device axis 1)",
        "layers.0.wo.weight  F32    [24, 72]  6.8 KiB  [24, 18]       4       2  axis 1 in 4 (device axis 1)",
    ]


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
    out = fine("inspect", golden / "formats_dp2_tp4" / "ckpt")
    assert "strategy    not given: shapes are those of slices" in out
    assert "global_step            [1200]\n" in out
    assert "layers.0.w1.weight" in out
    assert "… and 29 more (--all lists them)" in out
    assert "more (--all lists them)" not in fine("inspect", golden / "formats_dp2_tp4" / "ckpt", "--all")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("full", "a merged checkpoint"),
        ("full/model.safetensors", "a checkpoint file"),
        ("tp4/strategy.ckpt", "a strategy"),
        ("tp4_pp2/strategy_stages", "a strategy"),
        ("trained_dp2_tp2_zero/merged_step3", "a merged checkpoint"),
    ],
)
def test_inspect_tells_what_it_is(path: str, told: str, golden: Path) -> None:
    assert fine("inspect", golden / path).splitlines()[0] == f"{golden / path}: {told}"


def test_inspect_a_folder_of_files_without_a_map(golden: Path, tmp_path: Path) -> None:
    for rank in range(2):
        shutil.copy(golden / "tp4" / "shards" / f"rank_{rank}" / "net.safetensors", tmp_path / f"{rank}.safetensors")
    assert "checkpoint files that no map relates" in fine("inspect", tmp_path)


def test_inspect_as_a_tree(golden: Path) -> None:
    out = fine("inspect", golden / "full", "--tree", "--exclude", "adam_*").splitlines()
    assert out[out.index("") + 3 :] == [
        "",
        "├─ head.weight  F32 [96, 24] (9.0 KiB)",
        "├─ layers  12 parameters (41.0 KiB)",
        "│  └─ [0-1]  2 x 6 parameters (41.0 KiB)",
        "│     ├─ norm  F32 [24] (96 B)",
        "│     ├─ w1.weight  BF16 [48, 24] (2.2 KiB)",
        "│     ├─ w2.weight  F32 [24, 48] (4.5 KiB)",
        "│     ├─ wo.weight  F32 [24, 72] (6.8 KiB)",
        "│     └─ wqkv  2 parameters (6.9 KiB)",
        "│        ├─ bias  F16 [72] (144 B)",
        "│        └─ weight  F32 [72, 24] (6.8 KiB)",
        "└─ tok_embeddings.embedding_weight  F32 [96, 24] (9.0 KiB)",
    ]


def test_inspect_encrypted_files(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = golden / "formats_dp2_tp4" / "ckpt_aes_gcm"
    ran = run("inspect", folder)
    assert (ran.code, ran.out) == (6, "")
    assert "is encrypted" in ran.err
    (tmp_path / "key").write_text(KEY)
    assert "ckpt, encrypted (AES-GCM)" in fine("inspect", folder, "--dec-key-file", tmp_path / "key")
    monkeypatch.setenv("A_KEY", KEY)
    assert "encrypted" in fine("inspect", folder, "--dec-key-env", "A_KEY")
    (tmp_path / "key").write_text(KEY[::-1])
    assert run("inspect", folder, "--dec-key-file", tmp_path / "key").code == 6


# --- diff-strategy


def test_diff_of_equal_strategies(golden: Path) -> None:
    strategy = golden / "tp4" / "strategy.ckpt"
    assert fine("diff-strategy", strategy, strategy).splitlines()[-1] == "Same: 42 parameters with equal layouts."
    assert as_json("diff-strategy", strategy, strategy)["same"] is True


def test_diff_tells_what_changes(golden: Path) -> None:
    a, b = golden / "dp2_tp4_zero" / "strategy.ckpt", golden / "tp4_pp2" / "strategy.ckpt"
    out = fine("diff-strategy", a, b, "--match", "layers.*", code=1).splitlines()
    assert out[0] == f"a  strategy file '{a}': 8 ranks, 1 pipeline stage of 8 devices, 42 parameters"
    assert out[1].startswith(f"b  strategy file '{b}': 8 ranks, 2 pipeline stages of 4 devices")
    assert out[3] == "12 parameters with another layout (12 with other slices), 0 unchanged, 0 only in a, 0 only in b"
    assert "  a  axis 0 in 8 (optimizer 8); 1 copy; device matrix [2, 4]" in out
    assert "  b  whole; 4 copies; device matrix [4]; stage 1" in out


def test_diff_with_shapes(golden: Path, tmp_path: Path) -> None:
    truth = read_index(str(golden / "full" / "model.safetensors")).tensors
    shapes = {name: {"dtype": entry.dtype.name, "shape": entry.shape} for name, entry in truth.items()}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    words = ["diff-strategy", golden / "dp2_tp4" / "strategy.ckpt", golden / "tp4" / "strategy.ckpt"]
    words += ["--shapes", tmp_path / "shapes.json", "--match", "*.w2.weight"]
    assert "     layers.[0-1].w2.weight  [24, 48], slices [24, 12] -> [24, 12]" in fine(*words, code=1)
    (change, *_) = as_json(*words, code=1)["changes"]
    assert change["what"] == ["device matrix", "split", "copies"]
    assert change["b"]["slice_shape"] == [24, 12]


# --- verify


def test_verify_the_same_model(golden: Path) -> None:
    case = golden / "dp2_tp2_pp2_zero"
    out = fine("verify", case / "shards", golden / "full", "--strategy", case / "strategy.ckpt")
    assert out.startswith("Same: 42 parameters, 186.5 KiB in ")
    assert out.endswith("/s), equal bit for bit\n")


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
    out = fine(*words, code=1)
    first = "Different: 1 with other values, 1 with another dtype or shape, 3 only in a, 0 only in b; compared 2 param"
    assert out.startswith(first)
    row = next(line for line in out.splitlines() if line.startswith("a.w"))
    assert row.split()[:8] == ["a.w", "F32", "[64,", "32]", "1", "2,048", "-", "-"]
    assert row.endswith(" and nan (0x7fc00000)")
    assert "b.w             F32[64, 32]  F16[64, 32]" in out
    assert "only in a\nd.w\nglobal_step\nlearning_rate\n" in out
    found = as_json(*words, code=1)
    assert (found["ok"], found["only_a"]) == (False, ["d.w", "global_step", "learning_rate"])
    assert found["differences"][0]["first"][0]["at"] == [3, 4]


def test_verify_by_itself(golden: Path) -> None:
    case = golden / "dp2_tp4"
    words = ["verify", case / "shards", "--strategy", case / "strategy.ckpt", "--match", "head.*"]
    out = fine(*words).splitlines()
    assert out[0].startswith("Sound: 1 parameter in 8 files, 18.0 KiB in ")
    assert out[1:] == [
        "  complete    yes",
        "  copies      8 slices with other copies: equal",
        "  values      1 NaN, 0 infinite, in 1 parameter",
        "",
        "not finite   NaN  infinite",
        "head.weight    1         0",
    ]
    assert run(*words, "--finite").code == 1
    assert as_json(*words)["not_finite"] == [{"name": "head.weight", "nans": 1, "infinities": 0}]


def test_verify_by_its_manifest(golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copy(golden / "full" / "model.safetensors", path)
    update_manifest(str(tmp_path), {path.name: digest_file(read_index(str(path)))})
    assert fine("verify", tmp_path, "--manifest").startswith("As written: 42 tensors in 1 file, 190.4 KiB in ")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    out = fine("verify", tmp_path, "--manifest", code=1)
    assert out.startswith("Damaged: 42 tensors in 1 file")
    assert "model.safetensors  adam_v.layers.1.w2.weight" in out


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
