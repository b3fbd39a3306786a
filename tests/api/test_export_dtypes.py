"""`export` in another dtype, and of quantised models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.errors import UsageError
from tests.support.checkpoints import read_file
from tests.support.exports import Trained
from tests.support.families import config_of, hub_folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(dtype: str, tmp_path: Path) -> None:
    """Rounded to the nearest, whatever the rule that moves it; the routers' corrections stay as they are."""
    made = Trained(tmp_path, "deepseek-v3", torch_dtype="float64")
    made.export(dtype=dtype)
    wanted = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    found = {name: held for file in (tmp_path / "out").glob("*.safetensors") for name, held in read_file(file).items()}
    assert found.keys() == made.weights.keys()
    for name, held in found.items():
        value = made.weights[name]
        kept = name.endswith("e_score_correction_bias")
        assert (held.dtype, held.shape) == ("F32" if kept else wanted, value.shape)
        assert held.data == (value.tobytes() if kept else rounded(value, wanted)), name
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    assert made.export(dtype=dtype).files_written == ()


def rounded(value: np.ndarray, dtype: str) -> bytes:
    """Bytes of a value in another dtype, ties to even."""
    if dtype != "BF16":
        return value.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    made = Trained(tmp_path)
    for wrong in ("float8", "int8", 16, "F64"):
        with pytest.raises(UsageError, match="dtype must be one of bfloat16, float16 and float32"):
            made.export(dtype=wrong)


def test_a_quantised_model_goes_in_and_comes_out_as_floats(tmp_path: Path) -> None:
    """DeepSeek's blocks of 128 x 128 with their scales: out come the floats that the training has."""
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    weights = hub_folder(tmp_path / "plain", "deepseek-v3")
    stored: dict[str, tuple[str, np.ndarray]] = {}
    floats = {}
    for name, value in weights.items():
        if "_proj" in name and value.ndim == 2:
            bits = (
                np.random.default_rng(len(name)).integers(0, 120, value.shape).astype(np.uint8)
            )  # finite, of any size
            stored[name] = "F8_E4M3", bits
            stored[f"{name}_scale_inv"] = "F32", np.full([-(-extent // 128) for extent in value.shape], 0.5, np.float32)
            floats[name] = np.frombuffer(rounded(e4m3(bits) * np.float32(0.5), "BF16"), np.uint16)
        else:
            stored[name] = {"<f2": "F16", "<f4": "F32"}[value.dtype.str], value
            floats[name] = value
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(config_of("deepseek-v3", **config)))
    write_file(hub / "model.safetensors", stored)
    rules = ms_ckpt_ext.load_rules("deepseek-v3", hub)
    ms_ckpt_ext.merge(hub, tmp_path / "trained", rules=rules)
    ms_ckpt_ext.export(tmp_path / "trained", tmp_path / "out", config=hub)
    found = {name: held for file in (tmp_path / "out").glob("*.safetensors") for name, held in read_file(file).items()}
    assert {name: held.data for name, held in found.items()} == {
        name: value.tobytes() for name, value in floats.items()
    }
    assert {found[name].dtype for name in floats if "_proj" in name} == {"BF16"}
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def e4m3(bits: np.ndarray) -> np.ndarray:
    """Positive F8_E4M3 as floats."""
    exponent, fraction = (bits >> 3).astype(np.int32), (bits & 7) / np.float32(8)
    return np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7)).astype(np.float32)


def write_file(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """A safetensors file with dtypes that numpy lacks."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, value) in tensors.items():
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for _, value in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
