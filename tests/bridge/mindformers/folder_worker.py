"""MindFormers' checkpoints on several ranks of the CPU: folder_worker.py save|load MESH ROOT RESULT [SCALE].

MESH is data x tensor parallel, as 2x2. `save` writes ROOT/full and ROOT/lean (without replicas) with MindFormers, and
ROOT/hf as Hugging Face has it. `load` fills networks from all three, by the stock loader and by ours, in one process,
and tells for each whether every parameter holds what it should, what the load read, and how much memory it took. The
layouts are made here, since the CPU does not compile semi-automatic parallelism.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import standin
import mindspore as ms
import numpy as np
from mindspore import Layout, Parameter, Tensor, nn
from mindspore.communication import get_group_size, get_rank, init

mode, mesh_text, root, result = sys.argv[1:5]
scale = int(sys.argv[5]) if len(sys.argv) > 5 else 1
ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
init()
rank, size = get_rank(), get_group_size()

from mindformers.checkpoint import checkpoint as theirs
from mindformers.checkpoint import metadata, reshard, sharded_tensor
from safetensors.numpy import save_file

from ms_ckpt_ext import core, engine, formats, storage
from ms_ckpt_ext.bridge.mindformers import loader as ours
from ms_ckpt_ext.bridge.mindformers import seam
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.engine.source.listing import list_checkpoint

standin.collectives(rank, size)
MESH = tuple(map(int, mesh_text.split("x")))
HEADS, GROUPS, DEPTH, WIDTH, INNER = 8, 4, 16, 64, 96 * scale
LAYER, THEIR_LAYER = "decoder.layers.0.", "model.layers.0."


class Wanted(NamedTuple):
    """A parameter: its contents, and which mesh axes cut which of its axes."""

    contents: np.ndarray
    axes: tuple


def draw(name: str, *shape: int) -> np.ndarray:
    return np.random.RandomState(sum(map(ord, name))).standard_normal(shape).astype(np.float32)


ROWS, COLUMNS = ("tp", "None"), ("None", "tp")
FOLDER = {
    name: Wanted(draw(name, *shape), axes)
    for name, shape, axes in (
        ("emb.weight", (512 * scale, WIDTH), ROWS),
        ("l0.col.weight", (256 * scale, WIDTH), ROWS),
        ("l0.row.weight", (WIDTH, 256 * scale), COLUMNS),
        ("l0.norm.weight", (WIDTH,), ("None",)),
        ("l0.both.weight", (256 * scale, WIDTH), (("dp", "tp"), "None")),
    )
}
HF = {
    name: draw(name, *shape)
    for name, shape in {
        "model.embed_tokens.weight": (256 * scale, WIDTH),
        f"{THEIR_LAYER}self_attn.q_proj.weight": (HEADS * DEPTH, WIDTH),
        f"{THEIR_LAYER}self_attn.k_proj.weight": (GROUPS * DEPTH, WIDTH),
        f"{THEIR_LAYER}self_attn.v_proj.weight": (GROUPS * DEPTH, WIDTH),
        f"{THEIR_LAYER}self_attn.o_proj.weight": (WIDTH, HEADS * DEPTH),
        f"{THEIR_LAYER}mlp.gate_proj.weight": (INNER, WIDTH),
        f"{THEIR_LAYER}mlp.up_proj.weight": (INNER, WIDTH),
        f"{THEIR_LAYER}mlp.down_proj.weight": (WIDTH, INNER),
        f"{THEIR_LAYER}input_layernorm.weight": (WIDTH,),
        "model.norm.weight": (WIDTH,),
    }.items()
}
GROUPED = [HF[f"{THEIR_LAYER}self_attn.{p}_proj.weight"].reshape(GROUPS, -1, WIDTH) for p in "qkv"]
ALTERNATING = [HF[f"{THEIR_LAYER}mlp.{p}_proj.weight"] for p in ("gate", "up")]
FUSED = {
    "embedding.word_embeddings.weight": Wanted(HF["model.embed_tokens.weight"], ROWS),
    f"{LAYER}self_attention.linear_qkv.weight": Wanted(np.concatenate(GROUPED, axis=1).reshape(-1, WIDTH), ROWS),
    f"{LAYER}self_attention.linear_proj.weight": Wanted(HF[f"{THEIR_LAYER}self_attn.o_proj.weight"], COLUMNS),
    f"{LAYER}mlp.linear_fc1.weight": Wanted(np.stack(ALTERNATING, axis=1).reshape(-1, WIDTH), ROWS),
    f"{LAYER}mlp.linear_fc2.weight": Wanted(HF[f"{THEIR_LAYER}mlp.down_proj.weight"], COLUMNS),
    f"{LAYER}input_layernorm.weight": Wanted(HF[f"{THEIR_LAYER}input_layernorm.weight"], ("None",)),
    "decoder.final_layernorm.weight": Wanted(HF["model.norm.weight"], ("None",)),
}


def use_layouts(spec: dict[str, Wanted]) -> None:
    """What a compiled network would answer."""
    made = Layout(MESH, ("dp", "tp"), list(range(size)))
    layouts = {name: [made(*wanted.axes), ms.float32, wanted.contents.shape] for name, wanted in spec.items()}
    every = dict.fromkeys(range(size), layouts)
    try:
        from mindformers.checkpoint.layout_adapter import LayoutAdapter
    except ImportError:  # MindFormers 1.9
        sharded_tensor.get_strategy_metadata = sharded_tensor.get_current_strategy_metadata = lambda _: every
        return
    LayoutAdapter.is_pynative_mode = staticmethod(lambda: False)
    LayoutAdapter._get_layout_from_graph = staticmethod(lambda _: every)


def local(wanted: Wanted) -> np.ndarray:
    """This rank's slice."""
    place = {"dp": (rank // MESH[1], MESH[0]), "tp": (rank % MESH[1], MESH[1]), "None": (0, 1)}
    held = wanted.contents
    for axis, names in enumerate(wanted.axes):
        for name in (names,) if isinstance(names, str) else names:
            index, parts = place[name]
            held = np.split(held, parts, axis)[index]
    return held


class Network(nn.Cell):
    def __init__(self, spec: dict[str, Wanted], filled: bool) -> None:
        super().__init__()
        made = [(name, np.ascontiguousarray(local(wanted))) for name, wanted in spec.items()]
        held = [Parameter(Tensor(array if filled else np.zeros_like(array)), name=name) for name, array in made]
        # In the files, and in no metadata: as MindFormers does, it is not loaded.
        self.held = ms.ParameterTuple(
            [*held, Parameter(Tensor(np.full(2, float(filled), np.float32)), name="unlisted")]
        )


def save() -> dict[str, Any]:
    use_layouts(FOLDER)
    network = Network(FOLDER, True)
    describe = getattr(sharded_tensor, "get_all_sharded_tensor_on_rank0", sharded_tensor.get_all_sharded_tensor)
    for folder in ("full", "lean"):
        theirs.save_checkpoint(
            10,
            network,
            None,
            common_info=theirs.CommonInfo(global_step=10, global_batch_size=2, step_num=10, epoch_num=1),
            user_prefix="toy",
            save_checkpoint_path=f"{root}/{folder}",
            sharded_tensor_metas=describe(network),
            remove_redundancy=folder == "lean",
        )
    if rank == 0:
        Path(f"{root}/hf").mkdir()
        save_file(HF, f"{root}/hf/model.safetensors", {"format": "pt"})
    return {}


def template() -> Any:
    """The converters of MindFormers' Qwen3, configured as its network would."""
    from mindformers.checkpoint.converter.template import WeightTemplate
    from mindformers.models.qwen3.utils import Qwen3PreTrainedModel

    made = WeightTemplate(Qwen3PreTrainedModel.weight_converters)
    made.set_model_config(
        SimpleNamespace(
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            kv_channels=DEPTH,
            hidden_size=WIDTH,
            tensor_model_parallel_size=MESH[1],
        )
    )
    return made


def load() -> dict[str, Any]:
    return {
        f"{source} {way}": _measured(f"{root}/{source}", FUSED if source == "hf" else FOLDER, way)
        for source in ("full", "lean", "hf")
        for way in ("stock", "direct", "cooperative")
    }


def _measured(source: str, spec: dict[str, Wanted], way: str) -> dict[str, Any]:
    """Load twice; the second run counts, when everything is imported."""
    use_layouts(spec)
    if way != "stock":
        seam.install(Options(mode=way))
    loader = theirs.load_hf_checkpoint if spec is FUSED else theirs.load_checkpoint
    try:
        for _ in range(2):
            network = Network(spec, False)
            network.template = template() if spec is FUSED else None
            handed: list[int] = []
            reshard.ms_load_checkpoint = metadata.ms_load_checkpoint = _counting(handed)
            Path("/proc/self/clear_refs").write_text("5")
            before, resident, began = _bytes_read(), _memory("VmRSS"), time.perf_counter()
            LISTED.clear()
            loader(source, network)
            seconds = time.perf_counter() - began
            read, peak = _bytes_read() - before, _memory("VmHWM") - resident
    finally:
        seam.uninstall()
    found = {p.name: p.asnumpy() for p in network.get_parameters()}
    assert not found.pop("unlisted").any(), way
    right = {name: array.tobytes() == local(spec[name]).tobytes() for name, array in found.items()}
    wanted = sum(local(each).nbytes for each in spec.values())
    told = {"read": sum(handed) or read, "peak": peak, "wanted": wanted, "seconds": seconds, "listed": len(LISTED)}
    return {"right": right, **told}


LISTED: list[str] = []
"""Folders that this rank has listed for our loader."""


def _list(path: str, *more: Any) -> Any:
    LISTED.append(path)
    return list_checkpoint(path, *more)


ours.list_checkpoint = _list


def _counting(handed: list[int]) -> Callable[..., Any]:
    """The stock loader maps files into memory, which no counter of reads sees: count the tensors it gets, whole."""

    def load_checkpoint(*args: Any, **named: Any) -> Any:
        found = ms.load_checkpoint(*args, **named)
        handed.extend(parameter.asnumpy().nbytes for parameter in found.values())
        return found

    return load_checkpoint


for room in (core, engine, formats, storage):  # what a load imports is not what it reads
    for each in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        importlib.import_module(each.name)


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _memory(key: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


found = save() if mode == "save" else load()
Path(f"{result}.{rank}").write_text(json.dumps(found))
