"""MindFormers' flow for Hugging Face weights: a map of its own names beside the original files, and `name_map`.

Its `load_checkpoint_utils` writes `param_name_map.json` with the network's names into the folder of the original files,
and calls `load_distributed_checkpoint` with `name_map` (network's name -> file's name). Where stock can do that, its
result is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.errors import CoverageError, DiscoveryError
from tests.support.checkpoints import read_file
from tests.support.parameters import bytes_of

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
NAME_MAP = {
    "model.tok_embeddings.embedding_weight": "model.embed_tokens.weight",
    "model.layers.0.attention.wq.weight": "model.layers.0.self_attn.q_proj.weight",
    "model.norm_out.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
HELD = {name: np.full((2, 3), number, np.float32) for number, name in enumerate(NAME_MAP.values())}
EXTRA = {"model.layers.0.rotary_emb.inv_freq": np.full((4,), 9, np.float32)}
TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WANTED = {name: HELD[source].tobytes() for name, source in NAME_MAP.items()}


def folder(root: Path, files: tuple[str, ...] = TWO, index: bool = True, converted: bool = True, **more: str) -> Path:
    """A Hugging Face folder; `more`: further entries of the converted map."""
    root.mkdir()
    where = {name: files[number % len(files)] for number, name in enumerate(HELD)} | dict.fromkeys(EXTRA, files[-1])
    for file in files:
        save_file({n: a for n, a in {**HELD, **EXTRA}.items() if where[n] == file}, root / file, {"format": "pt"})
    if index:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if converted:
        names = {name: where[source] for name, source in NAME_MAP.items()}
        (root / "param_name_map.json").write_text(json.dumps({**names, **more}))
    return root


def network() -> Any:
    import mindspore as ms

    class Network(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            made = [ms.Parameter(ms.Tensor(np.zeros((2, 3), np.float32)), name=name) for name in NAME_MAP]
            self.held = ms.ParameterTuple(made)

    return Network()


def filled(load: Callable[..., Any], source: Path, **more: Any) -> dict[str, bytes]:
    cell = network()
    load(cell, unified_safetensors_dir=str(source), format="safetensors", **more)
    return bytes_of(cell)


FORMS = {
    "several": {},
    "several, without an index": {"index": False},
    "one": {"files": ("model.safetensors",), "index": False},
    "one, with both maps": {"files": ("model.safetensors",)},
    "one, without any": {"files": ("model.safetensors",), "index": False, "converted": False},
    "a name more": {"gate.weight": TWO[0]},
    "a name more, without an index": {"index": False, "gate.weight": TWO[0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_network_takes_what_stock_gives_it(form: str, tmp_path: Path) -> None:
    import mindspore as ms

    ms.set_device("CPU")
    source = folder(tmp_path / "hf", **FORMS[form])  # type: ignore[arg-type]
    assert filled(ms.load_distributed_checkpoint, source, name_map=NAME_MAP) == WANTED
    for mode in ("direct", "cooperative"):
        assert filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=NAME_MAP, mode=mode) == WANTED


@pytest.mark.parametrize("form", FORMS)
def test_without_stock(form: str, tmp_path: Path) -> None:
    """Inference from the folder, files for every rank, and what is in it by the files' own names."""
    source = folder(tmp_path / "hf", **FORMS[form])  # type: ignore[arg-type]
    cell = network()
    if "without an index" not in form or "a name more" not in form:
        ms_ckpt_ext.load_for_inference(cell, source, name_map=NAME_MAP)
        assert bytes_of(cell) == WANTED
    if "without an index" not in form:
        with ms_ckpt_ext.load(source) as held:
            assert {name: held[name].numpy().tobytes() for name in held} == {
                name: array.tobytes() for name, array in {**HELD, **EXTRA}.items()
            }


def test_an_index_that_is_not_needed_is_not_judged(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", index=False)
    (source / "model.safetensors.index.json").write_text("{")
    assert filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=NAME_MAP) == WANTED


def test_files_for_ranks(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", index=False)
    ms_ckpt_ext.load_distributed_checkpoint(
        None,
        format="safetensors",
        unified_safetensors_dir=source,
        dst_safetensors_dir=tmp_path / "out",
        name_map=NAME_MAP,
    )
    found = {name: array.tobytes() for name, array in load_file(tmp_path / "out/rank_0/net.safetensors").items()}
    assert {name: found[name] for name in WANTED} == WANTED


def test_a_source_in_another_file_than_the_map_says(tmp_path: Path) -> None:
    """Stock leaves such a Parameter as it is and reports nothing; which file has the name is unambiguous."""
    source = folder(tmp_path / "hf", index=False)
    names = json.loads((source / "param_name_map.json").read_text())
    names["model.norm_out.weight"] = TWO[1]
    assert HELD["model.norm.weight"].tobytes() in (source / TWO[0]).read_bytes()
    (source / "param_name_map.json").write_text(json.dumps(names))
    assert filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=NAME_MAP) == WANTED


def test_tied_weights_share_a_source(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", index=False)
    tied = {**NAME_MAP, "lm_head.weight": "model.embed_tokens.weight"}
    want = {**WANTED, "lm_head.weight": WANTED["model.tok_embeddings.embedding_weight"]}
    assert filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=tied) == want


def test_what_the_network_wants_and_no_file_holds_is_an_error_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", index=False)
    wanted = "'model.tok_embeddings.embedding_weight'.* should be in .*00001-of-00002.*give name_map"
    for mode in ("direct", "cooperative"):
        with pytest.raises(CoverageError, match=wanted):
            filled(ms_ckpt_ext.load_distributed_checkpoint, source, mode=mode)
    with pytest.raises(CoverageError, match=wanted):
        ms_ckpt_ext.load(source)
    with pytest.raises(DiscoveryError, match=wanted):
        ms_ckpt_ext.load_for_inference(network(), source)
    short = {name: other for name, other in NAME_MAP.items() if "wq" not in name}
    with pytest.raises(CoverageError, match="'model.layers.0.attention.wq.weight' should be in"):
        filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=short)


def test_a_map_of_another_merge_is_told(tmp_path: Path) -> None:
    """Its names are the files', and one of them is not where it says: no other file is taken instead."""
    source = folder(tmp_path / "hf", converted=False)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    index["lm_head.weight"] = TWO[0]
    (source / "param_name_map.json").write_text(json.dumps(index))
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(CoverageError, match="'lm_head.weight' should be in .*00001-of.* do not belong together"):
        ms_ckpt_ext.merge(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_of_two_files_that_the_map_does_not_list(tmp_path: Path) -> None:
    source = folder(tmp_path / "hf", index=False)
    held = read_file(source / TWO[1])
    assert "model.norm.weight" not in held
    save_file({**load_file(source / TWO[1]), "model.norm.weight": np.zeros((2, 3), np.float32)}, source / TWO[1])
    with pytest.raises(CoverageError, match="'model.norm.*'.* should be in one file, and is in .*00001-of.*00002-of"):
        filled(ms_ckpt_ext.load_distributed_checkpoint, source, name_map=NAME_MAP)
