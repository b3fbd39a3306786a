"""Numbers that are meant to hurt: axes, ranks and sizes beyond anything, and numbers that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.core.geometry.layout import MAX_AXES, MAX_RANKS, Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.huggingface.sizes import Config, Sizes
from ms_ckpt_ext.errors import CheckpointError, FormatError, StrategyError, UsageError
from ms_ckpt_ext.formats.discovery.mindformers import complaint, read_common, read_cuts
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.formats.wire import encode_bytes, encode_number
from tests.support.damage import memory_limit, time_limit
from tests.support.mindformers_folder import saved

MANY = 20_000
MATRICES = {
    "huge extents": ([2**32 - 1] * MANY, [0]),
    "ones": ([1] * MANY, [0]),
    "a zero": ([0, 8], [0]),
    "nothing": ([], [0]),
    "more devices than there are": ([2**32 - 1, 2**32 - 1], [0]),
    "axes of a tensor": ([8], [-1] * MANY),
    "axes that are not there": ([8], [5] * 40),
    "an axis that is not there": ([8], [2**31 - 1]),
    "a negative axis": ([8], [-2]),
    "an axis twice": ([8], [0, 0]),
}


def message(matrix: list[int], rows: list[int]) -> bytes:
    """A strategy file of one parameter, in protobuf."""
    layouts = encode_bytes(1, b"".join(encode_number(1, each) for each in matrix))
    layouts += encode_bytes(2, b"".join(encode_number(1, each) for each in rows))
    layouts += b"".join(encode_number(field, 0) for field in (5, 6, 7))
    return encode_number(1, 2) + encode_bytes(3, encode_bytes(1, b"w") + encode_bytes(2, layouts))


def json_form(matrix: list[int], rows: list[int]) -> bytes:
    return json.dumps({"parallel_layout_item": {"w": {"dev_matrix": matrix, "tensor_map": rows}}}).encode()


@pytest.mark.parametrize("form", [message, json_form])
@pytest.mark.parametrize("kind", MATRICES)
def test_strategies_of_no_job(kind: str, form: Any, tmp_path: Path) -> None:
    (tmp_path / "s.ckpt").write_bytes(form(*MATRICES[kind]))
    with time_limit(5), memory_limit(256 << 20), pytest.raises(StrategyError, match=r"s\.ckpt") as caught:
        load_strategy(tmp_path / "s.ckpt")
    assert len(str(caught.value)) < 2000


def test_the_most_axes() -> None:
    axes = tuple((axis,) for axis in range(MAX_AXES))
    assert Layout((1,) * MAX_AXES, axes).parts == (1,) * MAX_AXES
    with pytest.raises(StrategyError, match="at most 64"):
        Layout((1,) * (MAX_AXES + 1), axes)


def test_the_most_ranks() -> None:
    """Every rank of a layout has its cell, and a million of them take no time worth telling."""
    layout = Layout((2,) * 20, ((19, 0), (5,)), 1, 4)
    with time_limit(5):
        cells = layout.cells
        assert len(cells) == MAX_RANKS and len(set(cells)) == 32
    for rank in (0, 1, 0b1000_0000_0000_0010_0001, MAX_RANKS - 1):
        bits = [rank >> axis & 1 for axis in range(20)]
        consumed = bits[2] * 2 + bits[1]
        assert cells[rank] == ((bits[19] * 2 + bits[0]) * 4 + consumed, bits[5])


def test_stages_that_are_missing_are_not_all_listed() -> None:
    strategy = Strategy.from_items([LayoutItem("w", 100_000, Layout((8,), ((0,),)))], "a file")
    with pytest.raises(StrategyError, match=r"\[0, 1, .* and 99984 more of 100001") as caught:
        strategy.check_complete()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "key",
    [
        "(" * 100_000,
        "-" * 60_000 + "1",
        "('w', (" + "9" * 60_000 + ",))",
        "('w', (0,)) + " * 4000,
        "{" * 500,
        "__import__('os').system('true')",
        "('w', (0,), 1)",
        "\0",
        "",
    ],
    ids=range(9),
)
def test_keys_of_metadata_that_are_no_slices(key: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "metadata.json"
    told = json.loads(path.read_text())
    told["storage_data"][key] = told["storage_data"].pop(next(iter(told["storage_data"])))
    path.write_text(json.dumps(told))
    with time_limit(5), memory_limit(64 << 20), pytest.raises(FormatError, match=r"metadata\.json") as caught:
        read_cuts(str(path))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_scale", "NaN"),
        ("loss_scale", "Infinity"),
        ("loss_scale", "1e999"),
        ("loss_scale", "9" * 400),
        ("loss_scale", '"1"'),
        ("ckpt_status", "NaN"),
        ("epoch_num", "1.5"),
        ("step_num", "true"),
        ("global_step", "-1"),
        ("global_step", str(1 << 63)),
    ],
)
def test_training_scalars_that_are_none(name: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "common.json").write_text(f'{{"{name}": {value}}}')
    with pytest.raises(FormatError, match=name) as caught:
        read_common(str(tmp_path))
    assert len(str(caught.value)) < 1000 and name in complaint(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 5000,
        "9" * 40,
        "*".join(["layers"] * 50_000),
        "*".join(["9999999999"] * 50_000),
        "+".join(["4611686018427387904"] * 3),
        10**40,
        "٣ * layers + ²",
        "huge",
        "nan",
        "negative",
        "layers.__class__",
        "exit()",
    ],
    ids=range(12),
)
def test_sizes_that_no_model_has(text: Any) -> None:
    config = Config({"layers": 8, "huge": 10**30, "nan": float("nan"), "negative": -1}, "config.json")
    with time_limit(5), memory_limit(32 << 20), pytest.raises(UsageError) as caught:
        Sizes({}, config, {}).number(text)
    assert len(str(caught.value)) < 400 or not str(text).isascii()


def test_sizes_that_a_model_has() -> None:
    sizes = Sizes({}, Config({"heads": 8, "wide": 64}, "config.json"), {})
    assert sizes.number("heads * 2 + wide // heads") == 24
    assert sizes.number(str(1 << 62)) == 1 << 62


@pytest.mark.parametrize("architectures", [7, "Qwen3ForCausalLM", {"a": 1}, [7], [["a"]], True])
def test_architectures_that_are_no_list_of_names(architectures: Any, tmp_path: Path) -> None:
    from ms_ckpt_ext import load_rules

    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(CheckpointError, match="architectures"):
        load_rules(None, tmp_path)


def test_a_configuration_that_requires_more_parameters_than_any_model_has(tmp_path: Path) -> None:
    """Numbers of layers and of experts that a model could have; their product is too large to be listed."""
    from ms_ckpt_ext.engine.huggingface.families import read_family
    from tests.hostile.seeds import CONFIG

    for layers, experts, fits in ((100_000, 100_000, False), (100_000, 4, False), (61, 256, True)):
        told = {**CONFIG, "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": layers}
        told = {**told, "n_routed_experts": experts, "num_nextn_predict_layers": 0}
        (tmp_path / "rules.json").write_text(json.dumps({"rules": [EVERY_EXPERT]}))
        config = Config(told, "config.json")
        with time_limit(5), memory_limit(64 << 20):
            if fits:
                assert len(read_family(str(tmp_path / "rules.json"), config, {}).missing(())) == 3 * layers * experts
                continue
            with pytest.raises(UsageError, match=rf"require {3 * layers * experts:,} parameters.*'config\.json'"):
                assert read_family(str(tmp_path / "rules.json"), config, {})


EVERY_EXPERT = {
    "rule": "Rename",
    "sources": "l.{l<num_hidden_layers}.e.{e<n_routed_experts}.w.{w<3}",
    "target": "m.{l<num_hidden_layers}.f.{e<n_routed_experts}.w.{w<3}",
}


@pytest.mark.parametrize("name", ["x" * (1 << 20), "1." * (1 << 19), "\n" * (1 << 20)])
def test_long_names_are_looked_at_once(name: str) -> None:
    from ms_ckpt_ext.core.planning.name_patterns import Pattern
    from ms_ckpt_ext.engine.huggingface.weights import _end

    with time_limit(5):
        assert _end(f"layers.7.{name}") == (name[-1:] if "1" in name else f".{name}")
        for text in ("{*}.w", "layers.{n}.e.{m}.w", "{*}.{n}.{m}.w"):
            assert Pattern(text).match(name) is None
