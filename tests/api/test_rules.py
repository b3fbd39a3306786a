"""`rules=` of the public functions: from a Hugging Face directory into files, and out of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError
from ms_ckpt_ext.rules import QKV, Part, Rename, Rule, Stack, Transpose
from tests.support.checkpoints import cut, strategy_of


def test_a_hugging_face_directory_is_cut_for_ranks(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    held = {f"h.0.{name}": rng.standard_normal((rows, 6)).astype(np.float32) for name, rows in zip("qkv", (8, 4, 4))}
    held["h.0.out"] = rng.standard_normal((6, 8)).astype(np.float32)
    (tmp_path / "hf").mkdir()
    save_file(held, tmp_path / "hf/model.safetensors", {"format": "pt"})
    target = strategy_of(
        {"b.0.qkv": Layout((2,), ((0,), ())), "b.0.out": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt"
    )
    ms_ckpt_ext.load_distributed_checkpoint(
        None,
        format="safetensors",
        unified_safetensors_dir=tmp_path / "hf",
        predict_strategy=target,
        dst_safetensors_dir=tmp_path / "out",
        rules=[QKV([f"h.{{i}}.{n}" for n in "qkv"], "b.{i}.qkv", groups=2), Transpose("h.{i}.out", "b.{i}.out")],
    )
    for rank in range(2):
        got = load_file(tmp_path / f"out/rank_{rank}/net.safetensors")
        halves = [np.split(held[f"h.0.{name}"], 2)[rank] for name in "qkv"]
        assert np.array_equal(got["b.0.qkv"], np.concatenate(halves))
        assert np.array_equal(got["b.0.out"], np.split(held["h.0.out"].T, 2)[rank])


def test_shards_are_merged_under_other_names(tmp_path: Path) -> None:
    whole = {"fc1": np.arange(32, dtype=np.float32).reshape(8, 4), "norm": np.ones(4, np.float32)}
    trained = strategy_of({"fc1": Layout((4,), ((0,), ())), "norm": Layout((4,), ((),))}, tmp_path / "s.ckpt")
    cut(trained, whole, tmp_path / "shards")
    rules = [Part("fc1", name, number, 2) for number, name in enumerate(("gate", "up"))] + [Rename("norm", "ln")]
    ms_ckpt_ext.unified_safetensors(
        tmp_path / "shards", tmp_path / "s.ckpt", tmp_path / "out", naming="huggingface", rules=rules
    )
    (file,) = (tmp_path / "out").glob("model-*.safetensors")
    got = load_file(file)
    assert {name: array.tobytes() for name, array in got.items()} == {
        "gate": whole["fc1"][:4].tobytes(),
        "up": whole["fc1"][4:].tobytes(),
        "ln": whole["norm"].tobytes(),
    }


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_single_values_outside_the_strategy(shape: tuple[int, ...], tmp_path: Path, caplog: Any) -> None:
    """A rule that names them takes them; a pattern that matches them leaves them, with a warning."""
    trained = strategy_of({"w": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt")
    for rank in range(2):
        (tmp_path / f"shards/rank_{rank}").mkdir(parents=True)
        held = {f"h.{n}.scale": np.full(shape, n + 1, np.float32) for n in range(2)}
        save_file({"w": np.full((2, 3), rank, np.float32), **held}, tmp_path / f"shards/rank_{rank}/net.safetensors")

    def merged(name: str, *rules: Rule) -> dict[str, np.ndarray]:
        ms_ckpt_ext.merge(tmp_path / "shards", tmp_path / name, strategy=trained, rules=rules)
        with ms_ckpt_ext.load(tmp_path / name) as found:
            return dict(found.arrays())

    stacked = merged("stacked", Stack(["h.0.scale", "h.1.scale"], "scales"))
    assert sorted(stacked) == ["scales", "w"] and stacked["scales"].tobytes() == np.array([1, 2], "f4").tobytes()
    assert sorted(merged("renamed", Rename("h.1.scale", "last"))) == ["h.0.scale", "last", "w"]
    assert not caplog.records
    assert sorted(merged("met", Rename("h.{n}.scale", "s.{n}"))) == ["h.0.scale", "h.1.scale", "w"]
    assert "'h.0.scale', 'h.1.scale'" in caplog.text


def test_rules_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="rules must be a list of rules"):
        ms_ckpt_ext.unified_safetensors(tmp_path, None, tmp_path / "out", rules=["a"])  # type: ignore[list-item]


def test_packed_int4_can_only_be_renamed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": np.zeros((4, 2), np.int8)}, tmp_path / "in/m.safetensors", {"format": "ms", "w": "Int4"})
    load = {"network": None, "format": "safetensors", "unified_safetensors_dir": tmp_path / "in"}
    ms_ckpt_ext.load_distributed_checkpoint(**load, dst_safetensors_dir=tmp_path / "a", rules=[Rename("w", "v")])
    assert list(load_file(tmp_path / "a/rank_0/net.safetensors")) == ["v"]
    with pytest.raises(LayoutMismatchError, match="packed int4"):
        ms_ckpt_ext.load_distributed_checkpoint(**load, dst_safetensors_dir=tmp_path / "b", rules=[Transpose("w", "v")])
