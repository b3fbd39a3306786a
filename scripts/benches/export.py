"""Export of a training to Hugging Face's files against `cp` of the result: fused queries, alternating rows, experts.

The weights are bfloat16 under data parallel 2 with sharded optimizer, tensor parallel 4; experts are transposed on the
way, every element of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benches.measure import against_cp, measure, python, row, take_turns

FAMILIES = ("qwen3", "qwen3-moe")
_HEADS, _GROUPS = 32, 8


def config_of(family: str, size: float) -> dict[str, Any]:
    """config.json of a model of about `size` bytes: layers as large as those of Qwen3-8B and Qwen3-30B-A3B."""
    small = size < 1 << 30
    hidden = 256 if small else 4096 if family == "qwen3" else 2048
    found = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 8 * hidden, "head_dim": hidden // 32}
    found.update(num_attention_heads=_HEADS, num_key_value_heads=_GROUPS, tie_word_embeddings=False)
    if family == "qwen3-moe":
        found.update(num_experts=8 if small else 128, moe_intermediate_size=3 * hidden // 8)
    one = sum(map(_nbytes, layer(family, found, 0).values()))
    ends = 2 * 2 * found["vocab_size"] * hidden
    return {**found, "num_hidden_layers": max(1, round((size - ends) / one))}


def layer(family: str, config: dict[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    """Parameters of a layer as MindFormers trains them: name -> shape."""
    hidden, depth, here = config["hidden_size"], config["head_dim"], f"decoder.layers.{number}."
    found: dict[str, tuple[int, ...]] = {
        f"{here}input_layernorm.weight": (hidden,),
        f"{here}pre_mlp_layernorm.weight": (hidden,),
        f"{here}self_attention.q_layernorm.weight": (depth,),
        f"{here}self_attention.k_layernorm.weight": (depth,),
        f"{here}self_attention.linear_qkv.weight": ((_HEADS + 2 * _GROUPS) * depth, hidden),
        f"{here}self_attention.linear_proj.weight": (hidden, _HEADS * depth),
    }
    if family == "qwen3":
        inner = config["intermediate_size"]
        found[f"{here}mlp.linear_fc1.weight"] = (2 * inner, hidden)
        found[f"{here}mlp.linear_fc2.weight"] = (hidden, inner)
    else:
        experts, inner = config["num_experts"], config["moe_intermediate_size"]
        found[f"{here}mlp.router.weight"] = (experts, hidden)
        found[f"{here}mlp.experts.weight1"] = (experts * hidden, 2 * inner)
        found[f"{here}mlp.experts.weight2"] = (experts * inner, hidden)
    return found


def _nbytes(shape: tuple[int, ...]) -> int:
    total = 2
    for extent in shape:
        total *= extent
    return total


def make_source(family: str, config: dict[str, Any], root: Path) -> None:
    """Rank folders and their strategy."""
    import numpy as np

    from ms_ckpt_ext.core.geometry.array import DTYPES
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from ms_ckpt_ext.formats import safetensors
    from ms_ckpt_ext.formats.index import TensorSpec
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    table = (config["vocab_size"], config["hidden_size"])
    shapes = {"embedding.word_embeddings.weight": table, "output_layer.weight": table}
    shapes["decoder.final_layernorm.weight"] = table[1:]
    for number in range(config["num_hidden_layers"]):
        shapes.update(layer(family, config, number))
    layouts = {
        name: Layout((2, 4), ((),)) if len(shape) == 1 else Layout((2, 4), ((0,), ()), 4, -1)
        for name, shape in shapes.items()
    }
    strategy = Strategy.from_items([LayoutItem(name, 0, layout) for name, layout in layouts.items()], "bench")
    root.mkdir(parents=True)
    save_strategy(strategy, root / "strategy.ckpt")
    (root / "config.json").write_text(json.dumps(config))
    for rank in range(strategy.world):
        noise = np.random.default_rng(rank).bytes(8 << 20)
        cut = [TensorSpec(n, DTYPES["BF16"], layout.slice_shape(shapes[n])) for n, layout in layouts.items()]
        laid = safetensors.layout(cut, {"format": "ms"})
        (root / f"rank_{rank}").mkdir()
        with (root / f"rank_{rank}/net.safetensors").open("wb") as file:
            file.write(laid.literals[0][1])
            while file.tell() < laid.size:
                file.write(noise[: laid.size - file.tell()])


def export(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Training shards to Hugging Face's files."""
    results = []
    for family in arguments.only or FAMILIES:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            root = Path(work)
            make_source(family, config_of(family, arguments.size * (1 << 30)), root / "source")
            results += _one_family(family, root, arguments)
    return results


def _one_family(family: str, root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    source, out, copy, kept = (str(root / name) for name in ("source", "out", "copy", "kept"))

    def ours(sync: bool) -> str:
        return (
            f"from ms_ckpt_ext import export; export({source!r}, {out!r}, rules={family!r}, "
            f"strategy={source + '/strategy.ckpt'!r}, sync={sync})"
        )

    measure(python(ours(False)))
    os.rename(out, kept)
    for name in Path(kept).glob(".ms_ckpt_ext*"):
        name.unlink()
    written = sum(path.stat().st_size for path in Path(kept).rglob("*") if path.is_file())

    def clean() -> None:
        for folder in (out, copy):
            shutil.rmtree(folder, ignore_errors=True)

    commands = against_cp(ours, Path(kept), Path(copy))
    turns = take_turns(commands, clean, arguments.rounds, memory=round(1.5 * written))
    return [row(f"export of {family}", written, name, turns) for name in commands]
