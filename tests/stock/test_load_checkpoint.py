"""`load_checkpoint` under MindSpore's name: in a thread, and what it leaves to MindSpore's own."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors

pytestmark = pytest.mark.stock


def test_a_load_beside_other_work(ms: Any, tmp_path: Path) -> None:
    cells = [ms.nn.Dense(3, 4) for _ in range(3)]
    for form in ("ckpt", "safetensors"):
        path = str(tmp_path / f"net.{form}")
        ms.save_checkpoint(cells[0], path, format=form)
        stock = ms.load_checkpoint_async(path, cells[1], choice_func=lambda name: name == "weight").result()
        ours = ms_ckpt_ext.load_checkpoint_async(path, cells[2], choice_func=lambda name: name == "weight").result()
        assert {n: p.asnumpy().tobytes() for n, p in ours.items()} == {
            n: p.asnumpy().tobytes() for n, p in stock.items()
        }
        assert cells[1].weight.asnumpy().tobytes() == cells[2].weight.asnumpy().tobytes()
    future = ms_ckpt_ext.load_checkpoint_async(tmp_path / "nothing.ckpt")
    with pytest.raises(ValueError, match="no such file"):
        future.result(timeout=60)
    with pytest.raises(TypeError):
        ms_ckpt_ext.load_checkpoint_async(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_parameters_come_in_mindspores_order(form: str, ms: Any, tmp_path: Path) -> None:
    values = {"z": np.float32([1, 2]), "a": np.int32(3), "m.w": np.ones((3, 2), np.float16), "b": np.int64([4])}
    saved = [{"name": name, "data": ms.Parameter(ms.Tensor(value))} for name, value in values.items()]
    path = str(tmp_path / f"net.{form}")
    ms.save_checkpoint(saved, path, append_dict={"epoch": 3}, format=form)
    stock, ours = ms.load_checkpoint(path, format=form), ms_ckpt_ext.load_checkpoint(path, format=form)
    assert list(ours) == list(stock)
    for package, found in (("stock", stock), ("ours", ours)):
        ms.save_checkpoint(found, str(tmp_path / f"{package}.ckpt"))
    assert (tmp_path / "ours.ckpt").read_bytes() == (tmp_path / "stock.ckpt").read_bytes()


def in_memory(ms: Any, root: Path) -> tuple[Any, dict[str, Any]]:
    ms.save_checkpoint(ms.nn.Dense(3, 4), str(root / "net.safetensors"), format="safetensors")
    return BytesIO((root / "net.safetensors").read_bytes()), {"format": "safetensors"}


def hash_table(ms: Any, root: Path) -> tuple[Any, dict[str, Any]]:
    saved = ms.train.checkpoint_pb2.Checkpoint()
    value = saved.value.add()
    value.tag = "table"
    for _ in range(3):
        tensor = value.maptensor.tensor.add()
        tensor.dims.append(2)
        tensor.tensor_type, tensor.tensor_content = "int32", bytes(8)
    (root / "table.ckpt").write_bytes(saved.SerializeToString())
    return str(root / "table.ckpt"), {}


def parameter_servers_cache(ms: Any, root: Path) -> tuple[Any, dict[str, Any]]:
    parameter = ms.Parameter(ms.Tensor(np.zeros((2, 2), np.float32)))
    ms.save_checkpoint([{"name": "emb.__param_key__3", "data": parameter}], str(root / "cached.ckpt"))
    return str(root / "cached.ckpt"), {}


@pytest.mark.parametrize("make", [in_memory, hash_table, parameter_servers_cache])
def test_what_ours_does_not_load_goes_to_stock(
    make: Any, ms: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held, more = make(ms, tmp_path)
    ms_ckpt_ext.install()
    try:
        if make is in_memory and ms.__version__.startswith(("2.7.", "2.8.")):  # which take names only, and say so
            with pytest.raises(TypeError, match="must be string"):
                ms.load_checkpoint(held, **more)
        else:
            assert ms.load_checkpoint(held, **more)
    finally:
        ms_ckpt_ext.uninstall()
    assert "mindspore.load_checkpoint: ms_ckpt_ext does not take ckpt_file_name" in caplog.text
    with pytest.raises(errors.UnsupportedError, match="mindspore.load_checkpoint|load it with MindSpore"):
        ms_ckpt_ext.load_checkpoint(held, **more)


def test_a_store_that_is_no_file_system(ms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITURBO", "1")
    for load in (ms_ckpt_ext.load_checkpoint, ms_ckpt_ext.load_checkpoint_async):
        with pytest.raises(errors.UnsupportedError, match="AITURBO=1"):
            load(tmp_path / "net.ckpt")
