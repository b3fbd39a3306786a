"""Conversion side by side with stock MindSpore: the same bytes, files and names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.formats.registry import read_index
from tests.support.checkpoints import tree

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def source(ms: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' `.ckpt`, one with a checksum, with scalars of every kind, as stock saves them."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for rank in range(2):
        (root / f"rank_{rank}").mkdir()
        held = {
            "dense.weight": ms.Tensor(rng.standard_normal((40, 3)).astype(np.float32)),
            "dense.bias": ms.Tensor(rng.standard_normal(7).astype(np.float32), ms.bfloat16),
            "half": ms.Tensor(rng.standard_normal((2, 2, 2)).astype(np.float16)),
            "step": ms.Tensor(3, ms.int32),
        }
        ms.save_checkpoint(
            [{"name": name, "data": data} for name, data in held.items()],
            str(root / f"rank_{rank}" / f"net_rank_{rank}-1_2.ckpt"),
            append_dict={"learning_rate": 0.5, "epoch_num": 3, "flag": True},
            crc_check=bool(rank),
        )
    return root


@pytest.mark.parametrize("name_map", [None, {"dense.weight": "a.weight", "step": "global_step"}])
def test_trees(name_map: Any, ms: Any, source: Path, tmp_path: Path) -> None:
    for who, module in (("stock", ms), ("ours", ms_ckpt_ext)):
        module.ckpt_to_safetensors(str(source), str(tmp_path / who / "st"), name_map)
        module.safetensors_to_ckpt(str(tmp_path / who / "st"), str(tmp_path / who / "ckpt"))
    stock = tree(tmp_path / "stock")
    assert len(stock) == 4
    assert tree(tmp_path / "ours") == stock


def test_one_file(ms: Any, source: Path, tmp_path: Path) -> None:
    path = str(source / "rank_1" / "net_rank_1-1_2.ckpt")
    for who, module in (("stock", ms), ("ours", ms_ckpt_ext)):
        module.ckpt_to_safetensors(path, str(tmp_path / who), None, "rank_1")
    assert tree(tmp_path / "ours") == tree(tmp_path / "stock")
    assert set(tree(tmp_path / "ours")) == {"net_rank_1-1_2.safetensors"}


def test_text_on_which_stock_fails(ms: Any, tmp_path: Path) -> None:
    saved = [{"name": "w", "data": ms.Tensor(np.ones(3, np.float32))}]
    ms.save_checkpoint(saved, str(tmp_path / "net.ckpt"), append_dict={"note": "Größe 😀", "empty": ""})
    ms_ckpt_ext.convert(tmp_path / "net.ckpt", tmp_path / "st", to="safetensors")
    ms_ckpt_ext.convert(tmp_path / "st" / "net.safetensors", tmp_path / "back", to="ckpt")
    found = ms.load_checkpoint(str(tmp_path / "back" / "net.ckpt"))
    assert (found["note"], found["empty"]) == ("Größe 😀", "")
    assert found["w"].asnumpy().tolist() == [1, 1, 1]
    loaded = ms.load_checkpoint(str(tmp_path / "st" / "net.safetensors"), format="safetensors")
    assert loaded["w"].asnumpy().tolist() == [1, 1, 1]  # stock reads the file; text is numbers to it
    with pytest.raises(Exception, match="Unknown dtype|not covered"):  # safetensors 0.8, and what Python 3.9 has
        ms.ckpt_to_safetensors(str(tmp_path / "net.ckpt"), str(tmp_path / "stock"))


@pytest.mark.parametrize("name", ["ckpt_to_safetensors", "safetensors_to_ckpt"])
def test_signatures(name: str, ms: Any) -> None:
    stock, ours = (inspect.signature(getattr(module, name)).parameters for module in (ms, ms_ckpt_ext))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in stock.values()]


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_stock_verifies_our_checksums(kind: str, ms: Any, source: Path, tmp_path: Path) -> None:
    """A right one is accepted, a wrong one is not. Stock cannot check bfloat16 in safetensors."""
    chosen = (lambda name: name != "dense.bias") if kind == "safetensors" else None
    path = tmp_path / f"net.{kind}"
    ms_ckpt_ext.convert(source / "rank_0" / "net_rank_0-1_2.ckpt", path, choice_func=chosen, crc=True)
    found = ms.load_checkpoint(str(path), format=kind, crc_check=True)
    assert "dense.weight" in found
    raw = bytearray(path.read_bytes())
    raw[read_index(str(path)).tensors["dense.weight"].extents[0].offset] ^= 1
    path.write_bytes(raw)
    for module in (ms, ms_ckpt_ext):
        with pytest.raises(ValueError):
            module.load_checkpoint(str(path), format=kind, crc_check=True)


FORMS = [("ckpt", "ckpt_to_safetensors", "safetensors"), ("safetensors", "safetensors_to_ckpt", "ckpt")]


def saved(ms: Any, path: Path, form: str, value: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ms.save_checkpoint(
        [{"name": "lin.weight", "data": ms.Tensor(np.full((2, 3), value, np.float32))}], str(path), format=form
    )


@pytest.mark.parametrize(("form", "name", "to"), FORMS)
def test_the_examples_in_their_order(form: str, name: str, to: str, ms: Any, tmp_path: Path) -> None:
    """As the docstrings of stock have them: the tree, one file of it, that file elsewhere; also after stock."""
    expected = {}
    for who, modules in (("stock", [ms]), ("ours", [ms_ckpt_ext]), ("ours after stock", [ms, ms_ckpt_ext])):
        root = tmp_path / who
        saved(ms, root / f"rank0/checkpoint_0.{form}", form)
        for module in modules:
            call, file = getattr(module, name), str(root / f"rank0/checkpoint_0.{form}")
            call(str(root))
            call(file)
            call(file, str(root / "new_path") + "/")
            call(file, str(root / "new_path") + "/", {"lin.weight": "new_name"})
        found = tree(root)
        assert found == (expected or found) and len(found) == 3
        expected = found


@pytest.mark.parametrize(("form", "name", "to"), FORMS)
def test_a_tree_with_both_formats(form: str, name: str, to: str, ms: Any, tmp_path: Path) -> None:
    """The function's name says which is the input; what is there in the other format stays as it is."""
    for who, module in (("stock", ms), ("ours", ms_ckpt_ext)):
        root = tmp_path / who
        for rank in range(2):
            saved(ms, root / f"in/rank_{rank}/net.{form}", form, rank)
        saved(ms, root / f"in/rank_0/other.{to}", to, 7)
        saved(ms, root / f"in/rank_2/another.{to}", to, 8)
        for target in (None, str(root / "out")):
            getattr(module, name)(str(root / "in"), target)
    assert tree(tmp_path / "ours") == tree(tmp_path / "stock")
    assert len(tree(tmp_path / "ours" / "in")) == 6


@pytest.mark.parametrize(("form", "name", "to"), FORMS)
def test_an_input_that_was_saved_again(form: str, name: str, to: str, ms: Any, tmp_path: Path) -> None:
    """The result that stock made of what it was before is replaced."""
    saved(ms, tmp_path / f"rank_0/net.{form}", form)
    getattr(ms, name)(str(tmp_path))
    saved(ms, tmp_path / f"rank_0/net.{form}", form, 2.0)
    getattr(ms_ckpt_ext, name)(str(tmp_path))
    ours = (tmp_path / f"rank_0/net.{to}").read_bytes()
    getattr(ms, name)(str(tmp_path))
    assert (tmp_path / f"rank_0/net.{to}").read_bytes() == ours
