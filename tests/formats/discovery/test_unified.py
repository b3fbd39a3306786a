"""Whole models in one folder: what Hugging Face, git, merges and single processes leave there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, FormatError
from ms_ckpt_ext.formats.discovery.whole_models import is_map, unified_files
from tests.support.checkpoints import source

TWO = ("-00001-of-00002", "-00002-of-00002")


def model(root: Path, stem: str = "model", index: Optional[str] = "", parts: Any = TWO) -> Path:
    """A model in parts, as on the hub: parameter `p{i}` is in part i."""
    root.mkdir(exist_ok=True)
    names = {f"p{number}": f"{stem}{part}.safetensors" for number, part in enumerate(parts)}
    for number, (name, file) in enumerate(names.items()):
        save_file({name: np.full(3, number, np.float32)}, root / file, {"format": "pt"})
    if index is not None:
        (root / f"{stem.split('.')[0]}.safetensors.index{index}.json").write_text(json.dumps({"weight_map": names}))
    return root


def test_merged(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"holds no \.safetensors or \.ckpt file"):
        unified_files(str(tmp_path))
    (tmp_path / "part0.safetensors").touch()
    assert unified_files(str(tmp_path)).names is None
    (tmp_path / "hyper_param.safetensors").touch()
    with pytest.raises(DiscoveryError, match="neither param_name_map.json nor"):
        unified_files(str(tmp_path))
    for content, kind, message in (
        ('{"weight_map": {"a": "part9.safetensors"}}', DiscoveryError, "names 'part9.safetensors'"),
        ('{"weight_map": {"a": "../x"}}', FormatError, "must map parameter names to file names"),
        ("[]", FormatError, "is not a parameter map"),
        ("{", FormatError, "is not a parameter map"),
    ):
        (tmp_path / "param_name_map.json").write_text(content)
        with pytest.raises(kind, match=message):
            unified_files(str(tmp_path))
    (tmp_path / "param_name_map.json").write_text('{"a": "part0.safetensors"}')
    found = unified_files(str(tmp_path))
    assert found.names == {"a": "part0.safetensors"}
    assert found.hyper == str(tmp_path / "hyper_param.safetensors")


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model", ""),
        ("diffusion_pytorch_model", ""),
        ("model.fp16", ".fp16"),
        ("diffusion_pytorch_model.non_ema", ".non_ema"),
        ("pytorch_model", ""),
        ("model", None),
    ],
)
def test_an_index_of_any_name_or_none(stem: str, index: Optional[str], tmp_path: Path) -> None:
    root = model(tmp_path / "hub", stem, index)
    (root / "config.json").write_text("{}")
    with ms_ckpt_ext.load(root) as held:
        assert {name: held[name].numpy().tolist() for name in held} == {"p0": [0.0] * 3, "p1": [1.0] * 3}
    assert ms_ckpt_ext.verify(root).ok
    assert sorted(p.name for p in ms_ckpt_ext.inspect(root).parameters) == ["p0", "p1"]
    for path in root.glob("*.index*.json"):
        assert is_map(path.name)
        assert sorted(ms_ckpt_ext.load(path)) == ["p0", "p1"]
        assert len(ms_ckpt_ext.inspect(path).files) == 2


def test_an_index_goes_along_with_a_conversion(tmp_path: Path) -> None:
    root = model(tmp_path / "hub", "diffusion_pytorch_model")
    ms_ckpt_ext.convert(root, tmp_path / "out", to="ckpt")
    names = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())["weight_map"]
    assert names["p1"] == "diffusion_pytorch_model-00002-of-00002.ckpt"
    assert sorted(ms_ckpt_ext.load(tmp_path / "out")) == ["p0", "p1"]


def other(root: Path, *names: str) -> None:
    root.mkdir(exist_ok=True)
    for name in names:
        save_file({"other": np.zeros(2, np.float32)}, root / name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_model"], "is an adapter to a model, and no model|an adapter to a model, and no model"),
        (["hyper_param"], "training scalars of a merged checkpoint"),
        (
            ["model", "adapter_model"],
            "'adapter_model.safetensors' is an adapter .*not applied here.*path of the model's",
        ),
        (
            ["model", "model.fp16"],
            "nothing relates.*'model.fp16.safetensors', 'model.safetensors': give the path of the one",
        ),
        (["unet", "vae", "text_encoder"], "holds 3 .safetensors files that nothing relates"),
        (
            ["model-00002-of-00002"],
            "of the 2 parts of a model only 1 is there, 'model-00002-of-00002.safetensors': fetch",
        ),
        (["model-00001-of-00003", "model-00003-of-00003"], "of the 3 parts of a model only 2 are there"),
    ],
)
def test_what_is_no_model_is_told_to_who_fetched_it(files: list[str], message: str, tmp_path: Path) -> None:
    other(tmp_path, *(f"{name}.safetensors" for name in files))
    for call in (ms_ckpt_ext.load, ms_ckpt_ext.verify):
        with pytest.raises(DiscoveryError, match=message) as caught:
            call(tmp_path)
        assert "merge" not in str(caught.value) or files == ["hyper_param"]
    for name in files:
        assert sorted(ms_ckpt_ext.load(tmp_path / f"{name}.safetensors")) == ["other"]


@pytest.mark.parametrize("missing", ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"])
def test_an_index_with_a_missing_part(missing: str, tmp_path: Path) -> None:
    root = model(tmp_path / "hub")
    os.unlink(root / missing)
    with pytest.raises(DiscoveryError, match=f"index.json' names '{missing}', which .* does not hold .*fetch them"):
        ms_ckpt_ext.load(root)


@pytest.mark.parametrize("content", ["[]", "7", "null", '"text"', "{}", '{"weight_map": []}'])
def test_an_index_of_another_form(content: str, tmp_path: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="must map parameter names to file names|a dictionary is expected"):
        ms_ckpt_ext.load(tmp_path)


def test_several_indexes(tmp_path: Path) -> None:
    root = model(model(tmp_path / "hub", "unet"), "vae")
    with pytest.raises(
        DiscoveryError, match="holds 2 indexes of parameters, 'unet.*', 'vae.*': give the path of the one"
    ):
        ms_ckpt_ext.load(root)
    assert sorted(ms_ckpt_ext.load(root / "vae.safetensors.index.json")) == ["p0", "p1"]


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin', of formats that are not read"),
        ("snapshots/a/config.json", "snapshots of a download"),
        ("v1-5.ckpt", "'v1-5.ckpt', of formats that are not read"),
        ("strategy.ckpt", "but strategy files, which are no checkpoints"),
        ("unet/model.safetensors", "but its folders 'unet' do: give the path of one of them"),
        ("checkpoint/rank_0/net.ckpt", "but its folders 'checkpoint' do"),
        ("strategy/strategy.ckpt", "file; check the path"),
    ],
)
def test_what_lies_there_instead_of_a_model(beside: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / beside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes({"v1-5.ckpt": b"PK\x03\x04", "strategy.ckpt": bytes.fromhex("08021204")}.get(path.name, b""))
    with pytest.raises(DiscoveryError, match=message):
        ms_ckpt_ext.load(tmp_path)


def test_hidden_files_are_nobody_s(tmp_path: Path) -> None:
    """What macOS leaves beside every file on disks of other systems."""
    root = model(tmp_path / "hub")
    for path in list(root.iterdir()):
        (root / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    assert sorted(ms_ckpt_ext.load(root)) == ["p0", "p1"]
    other(tmp_path / "one", "model.safetensors")
    (tmp_path / "one" / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    assert sorted(ms_ckpt_ext.load(tmp_path / "one")) == ["other"]


def test_ranks_in_one_folder(tmp_path: Path) -> None:
    made = source(tmp_path / "run")
    for rank in range(4):
        (held,) = (made / "shards" / f"rank_{rank}").iterdir()
        for step in (5, 10):
            shutil.copy(held, tmp_path / f"net_rank_{rank}-1_{step}.safetensors")
    whole = ms_ckpt_ext.load(made / "shards", made / "strategy.ckpt")
    flat = ms_ckpt_ext.load(tmp_path, made / "strategy.ckpt")
    assert {n: flat[n].numpy().tobytes() for n in whole} == {n: whole[n].numpy().tobytes() for n in whole}
    with pytest.raises(DiscoveryError, match="holds the files of 4 ranks, so the strategy that cut them is needed"):
        ms_ckpt_ext.load(tmp_path)
    for path in tmp_path.glob("net_rank_[023]*"):
        path.unlink()
    with pytest.raises(CoverageError, match="in the file of rank 0"):
        ms_ckpt_ext.load(tmp_path, made / "strategy.ckpt").arrays()


def test_a_link_of_a_download_that_was_cut_short(tmp_path: Path) -> None:
    root = model(tmp_path / "hub")
    os.unlink(root / "model-00002-of-00002.safetensors")
    os.symlink("../blobs/none", root / "model-00002-of-00002.safetensors")
    with pytest.raises(DiscoveryError, match="is a link to what is not there.*fetch them"):
        ms_ckpt_ext.load(root)


def test_an_index_that_names_what_its_file_lacks(tmp_path: Path) -> None:
    root = model(tmp_path / "hub")
    path = root / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["mtp.fc.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(content))
    with pytest.raises(CoverageError, match="'mtp.fc.weight' should be in .*or leave the name out"):
        ms_ckpt_ext.load(root)
    assert sorted(ms_ckpt_ext.load(root, names="p*")) == ["p0", "p1"]


def test_an_index_names_the_model_whatever_lies_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = model(tmp_path / "hub")
    other(root, "consolidated.safetensors", "adapter_model.safetensors")
    (root / "model.safetensors.index.fp16.json").write_text((root / "model.safetensors.index.json").read_text())
    assert sorted(ms_ckpt_ext.load(root)) == ["p0", "p1"]
    assert "'adapter_model.safetensors' beside the model" in caplog.text
    assert "'model.safetensors.index.json' is taken; beside it there are the indexes" in caplog.text


def test_saves_of_one_process_in_one_folder(tmp_path: Path) -> None:
    for step in (5, 10, 9):
        save_file({"w": np.full(2, step, np.float32)}, tmp_path / f"net-1_{step}.safetensors")
    assert ms_ckpt_ext.load(tmp_path)["w"][0] == 10
    assert ms_ckpt_ext.load(tmp_path, file_suffix="1_9")["w"][0] == 9
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "ema-1_10.safetensors")
    with pytest.raises(DiscoveryError, match="'ema-1_10.*, 'net-1_10.*equally|equally new.*'ema-1_10.*'net-1_10"):
        ms_ckpt_ext.load(tmp_path)
    assert ms_ckpt_ext.load(tmp_path, file_suffix="net-1_10")["w"][0] == 10
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "whole.safetensors")
    with pytest.raises(DiscoveryError, match="nothing relates"):
        ms_ckpt_ext.load(tmp_path)


@pytest.mark.parametrize("unfinished", [("part0", "part1"), ("part0", "hyper_param"), ("part3",)])
def test_parts_of_a_merge_that_did_not_finish(unfinished: tuple[str, ...], tmp_path: Path) -> None:
    other(tmp_path, *(f"{name}.safetensors" for name in unfinished))
    with pytest.raises(DiscoveryError, match="neither param_name_map.json nor .*run it again"):
        unified_files(str(tmp_path))
