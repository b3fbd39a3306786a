"""MindFormers' own functions beside ours, in one process: functions_worker.py GOLDEN SCRATCH; ends with "all right".

1. Every conversion operator, on whole tensors, against the rule that is made of it.
2. The legacy way: its merge of rank folders and its load, stock and with ours in place, into equal networks.
3. Its load of Hugging Face's files by the legacy way, which leaves a map of the network's names beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import standin  # noqa: F401 - before mindformers
import mindspore as ms
import numpy as np
from mindformers.checkpoint.converter import convert_op
from mindformers.tools.register import MindFormerConfig
from mindformers.utils import load_checkpoint_utils as legacy
from mindspore import Parameter, Tensor, nn
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext.api.mindspore.install import install, uninstall
from ms_ckpt_ext.bridge.mindformers import seam
from ms_ckpt_ext.bridge.mindformers.converters import rules_of
from ms_ckpt_ext.bridge.mindformers.legacy import NOTE_NAME
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.errors import UnsupportedError
from tests.harness.stock_memory import let_stock_merge

let_stock_merge()
golden, scratch = Path(sys.argv[1]), Path(sys.argv[2])
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
CONFIG = SimpleNamespace(
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=2,
    hidden_size=6,
    tensor_model_parallel_size=1,
    num_moe_experts=3,
    moe_ffn_hidden_size=5,
    expert_model_parallel_size=1,
)


ONE_HEAD_A_GROUP = SimpleNamespace(**{**vars(CONFIG), "num_attention_heads": CONFIG.num_query_groups})
"""All that MindFormers' operator for biases can do: it takes as many rows of queries as of keys."""


def converted(
    operator: Any, sources: dict[str, np.ndarray], stock_sources: dict[str, np.ndarray], config: Any = CONFIG
) -> None:
    """Compare what the operator makes with what a merge through its rules writes."""
    if hasattr(operator, "set_model_config"):
        operator.set_model_config(config)
    operator.optimizer_parallel_size = 1
    expected = operator(stock_sources)
    folder = scratch / type(operator).__name__ / "-".join(expected)
    folder.mkdir(parents=True)
    save_file(sources, folder / "model.safetensors")
    catalog = open_catalog(str(folder), None).ruled(rules_of([operator]))
    execute(merge_job(catalog, str(folder / "out"), MergeOptions()), str(folder / "out"), 1, Limits())
    got = {}
    for part in (folder / "out").glob("part*.safetensors"):
        got.update(load_file(part))
    assert got.keys() == expected.keys(), (got.keys(), expected.keys())
    for name, array in expected.items():
        assert np.array_equal(got[name], array), (type(operator).__name__, name)


def operators() -> None:
    rng = np.random.default_rng(5)

    def draw(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {f"h.0.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def same(operator: Any, sources: dict[str, np.ndarray], config: Any = CONFIG) -> None:
        converted(operator, sources, sources, config)

    three = ["h.{}.q", "h.{}.k", "h.{}.v"]
    same(convert_op.RenameConvertOp("h.{}.a", "m.{}.a"), draw(a=(3, 4)))
    for dim in (0, 1):
        same(convert_op.ConcatConvertOp(["h.{}.a", "h.{}.b"], f"m.{{}}.c{dim}", dim=dim), draw(a=(3, 4), b=(3, 4)))
        same(convert_op.StackConvertOp(["h.{}.a", "h.{}.b"], f"m.{{}}.s{dim}", dim=dim), draw(a=(3, 4), b=(3, 4)))
    same(convert_op.QKVConvertOp(three, "m.{}.qkv"), draw(q=(16, 6), k=(8, 6), v=(8, 6)))
    same(convert_op.QKVBiasConvertOp(three, "m.{}.bias"), draw(q=(8,), k=(8,), v=(8,)), ONE_HEAD_A_GROUP)
    if hasattr(convert_op, "ScaleSplitConvertOp"):  # since 2.1
        same(convert_op.ScaleSplitConvertOp("h.{}.s", ["m.{}.x", "m.{}.y", "m.{}.z"]), draw(s=(3,)))
        plain = convert_op.ConcatConvertOp(["h.{}.a", "h.{}.b"], "m.{}.plain", interleaved=False)
        same(plain, draw(a=(3, 4), b=(2, 4)))
    experts = {f"h.0.e.{n}.{name}": rng.standard_normal(shape).astype(np.float32)
               for name, shape in {"gate": (5, 6), "up": (5, 6), "down": (6, 5)}.items() for n in range(3)}  # fmt: skip

    def stacked(name: str) -> np.ndarray:
        """As MindFormers' loader hands experts to their operator."""
        return np.concatenate([experts[f"h.0.e.{n}.{name}"] for n in range(3)])

    pair = {name: array for name, array in experts.items() if "down" not in name}
    wide = convert_op.ExpertsConvertOp(["h.{}.e.{}.gate", "h.{}.e.{}.up"], "m.{}.weight1")
    converted(wide, pair, {f"h.0.e.stack.{name}": stacked(name) for name in ("gate", "up")})
    single = {name: array for name, array in experts.items() if "down" in name}
    tall = convert_op.ExpertsConvertOp(["h.{}.e.{}.down"], "m.{}.weight2")
    converted(tall, single, {"h.0.e.stack.down": stacked("down")})


def unknown_operators() -> None:
    class Own(convert_op.RenameConvertOp):
        pass

    try:
        rules_of([Own("h.{}.a", "m.{}.a")])
    except UnsupportedError as refusal:
        assert "Own" in str(refusal)
        return
    raise AssertionError("an operator of one's own was taken for MindFormers'")


class Network(nn.Cell):
    """This rank's slices of a golden case, empty."""

    def __init__(self, slices: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.held = ms.ParameterTuple([Parameter(Tensor(np.zeros_like(a)), name=n) for n, a in slices.items()])

    def convert_name(self, name: str) -> str:
        """Names of the checkpoint are those of the network; MindFormers asks."""
        return name


def by_the_legacy_way(output: Path) -> dict[str, bytes]:
    """What MindFormers does with `auto_trans_ckpt` and rank folders, from dp2 x tp4 to tp4."""
    source, unified = golden / "dp2_tp4", str(output / "unified_checkpoint/")
    output.mkdir()
    legacy.unify_safetensors(str(source / "shards"), str(source / "strategy.ckpt"), unified)
    shard = next((golden / "tp4/shards/rank_0").glob("*.safetensors"))
    slices = load_file(shard)
    network = Network(slices)
    config = MindFormerConfig(
        use_parallel=True,
        auto_trans_ckpt=True,
        resume_training=False,
        load_ckpt_format="safetensors",
        model=MindFormerConfig(model_config=MindFormerConfig()),
    )
    files = sorted(str(path) for path in Path(unified).glob("*.safetensors"))
    strategy = str(golden / "tp4/strategy.ckpt")
    legacy.load_safetensors_checkpoint(config, files, network, strategy, unified, None)
    held = {parameter.name: parameter.asnumpy().tobytes() for parameter in network.get_parameters()}
    assert held == {name: array.tobytes() for name, array in slices.items()}
    return held


def the_legacy_way() -> None:
    stock = by_the_legacy_way(scratch / "stock")
    assert (scratch / "stock/unified_checkpoint/part0.safetensors").is_file()
    install()
    seam.install(Options(mode="direct"))
    ours = by_the_legacy_way(scratch / "ours")
    left = sorted(path.name for path in (scratch / "ours/unified_checkpoint").iterdir())
    assert NOTE_NAME in left, left
    assert (scratch / "ours/unified_checkpoint/part0.safetensors").is_symlink(), "nothing was merged"
    assert ours == stock
    uninstall()
    merged = by_the_legacy_way(scratch / "half")  # ours in MindFormers only: the merge is stock
    assert merged == stock
    assert not (scratch / "half/unified_checkpoint" / NOTE_NAME).exists()
    seam.uninstall()


class Renaming(Network):
    """A network whose names are not those of the files."""

    def convert_name(self, name: str) -> str:
        return name.removeprefix("hf.")

    def obtain_name_map(self, files: list[str]) -> dict[str, str]:
        return {self.convert_name(name): name for file in files for name in load_file(file)}

    def convert_map_dict(self, names: dict[str, str], **_: Any) -> dict[str, str]:
        return {self.convert_name(name): file for name, file in names.items()}


def from_hugging_face(output: Path, count: int, index: bool) -> dict[str, bytes]:
    """tp4 out of `count` whole files."""
    output.mkdir()
    held = load_file(scratch / "stock/unified_checkpoint/part0.safetensors")
    where = {f"hf.{name}": f"model-{number % count}.safetensors" for number, name in enumerate(held)}
    for file in set(where.values()):
        save_file({name: held[name[3:]] for name in where if where[name] == file}, output / file, {"format": "pt"})
    if index:
        (output / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    slices = load_file(next((golden / "tp4/shards/rank_0").glob("*.safetensors")))
    network = Renaming(slices)
    config = MindFormerConfig(
        use_parallel=True,
        auto_trans_ckpt=True,
        resume_training=False,
        load_ckpt_format="safetensors",
        model=MindFormerConfig(model_config=MindFormerConfig()),
    )
    files = sorted(map(str, output.glob("*.safetensors")))
    strategy = str(golden / "tp4/strategy.ckpt")
    legacy.load_safetensors_checkpoint(config, files, network, strategy, str(output), None)
    assert (output / "param_name_map.json").exists() is index
    filled = {parameter.name: parameter.asnumpy().tobytes() for parameter in network.get_parameters()}
    assert filled == {name: array.tobytes() for name, array in slices.items()}
    return filled


def hugging_faces_files() -> None:
    barrier, legacy.barrier = legacy.barrier, lambda: None
    for count, index in ((1, False), (1, True), (2, True)):
        stock = from_hugging_face(scratch / f"hf-stock-{count}-{index}", count, index)
        install()
        assert from_hugging_face(scratch / f"hf-ours-{count}-{index}", count, index) == stock
        uninstall()
    legacy.barrier = barrier


operators()
unknown_operators()
the_legacy_way()
hugging_faces_files()
sys.stdout.write("all right\n")
