"""The small files that mutation begins with, and a folder of this process to put files into."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, Callable, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.integrity.manifest import FileDigests, Manifest
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.ckpt_writer import crc_tail
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.encrypted import in_blocks, in_chunks
from tests.support.wire import value

KEY = b"0123456789ABCDEF"
DIGEST = "99aa06d3014798d86001c324468d497f"

RECORD = {"rank": 1, "world": 4, "file": "rank_1/net.ckpt", "size": 5, "saved": 1.5, "sharded": True, "epoch": 1}
RECORDS = {"format": "ms_ckpt_ext.record", "version": 1, "ranks": [{**RECORD, "step": 3, "loss_scale": 64.0}]}
JOURNAL: dict[str, Any] = {
    "job": "j",
    "files": {"a": [1, 2]},
    "indexes": {"i": "{}"},
    "gone": ["b"],
    "digests": {},
    "missing": [],
    "boot": None,
}
PUBLISHED = {"version": 2, "missing": {"j": ["x"]}, "files": {"a": [1, 2, "j", True]}}
CLAIM = {"job": "j", "names": ["a", "b"]}
COMMON = {"epoch_num": 1, "step_num": 2, "global_step": 10, "loss_scale": 1.5, "ckpt_status": 0}
MAP = {"metadata": {"total_size": 7}, "weight_map": {"w": "part0.safetensors", "b": "part1.safetensors"}}
SHAPES = {"a.w": {"dtype": "F32", "shape": [64, 32]}}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "use_rslora": True,
    "fan_in_fan_out": False,
    "bias": "none",
    "init_lora_weights": True,
    "modules_to_save": None,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"^a.q_proj": 0.5},
    "target_modules": ["q_proj"],
}
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "intermediate_size": 128,
    "tie_word_embeddings": True,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"weight_block_size": [128, 128]},
}
INI = b"""[launch]
script = a.py
hosts = 2
host_rank = 0
port = 8118
[load]
checkpoint_dir = c
mode = auto
[environment]
A = 1
"""
WORDS = (
    b"inspect\na\n--match\nx*\n--all",
    b"merge\na\nb\n--strategy\ns\n--share\n1/4\n--buffer\n64M\n--workers\n8",
    b"export\na\nb\n--set\nnum_experts=8\n--rules\nqwen3",
    b"encrypt\na\nb\n--enc-key-env\nK\n--enc-mode\nchunked",
)
HEADS = (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n", b"\n\x14\n\x01w", b"PK\x03\x04")


SCRATCH = "MS_CKPT_EXT_HOSTILE_SCRATCH"
"""Environment variable: where processes of a search have their folders; whoever started the search removes them."""
_PREFIX = "ms_ckpt_ext_hostile_"


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for the processes of a search, however they end."""
    return tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_where())


def _where() -> Optional[str]:
    return os.environ.get(SCRATCH) or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@cache
def folder() -> Path:
    """A folder of this process, in that of a search, or in memory where there is such."""
    made = tempfile.mkdtemp(prefix=_PREFIX, dir=_where())
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def texts(*documents: Any) -> Callable[[], list[bytes]]:
    """JSON of documents."""
    return lambda: [json.dumps(each).encode() for each in documents]


def a_ckpt() -> bytes:
    """One with a bit of everything."""
    body = value(b"w", [4, 3], b"Float32", bytes(48)) + value(b"b", [5], b"BFloat16", bytes(10))
    body += value(b"cut", [4], b"Int8", b"ab") + value(b"cut", [4], b"Int8", b"cd")
    body += value(b"s", [], b"Int64", bytes(8)) + value(b"note", [0], b"str", b"a\0\0\0")
    body += value(b"four", [2], b"Int4", b"ab")
    return body + crc_tail(zlib.crc32(body))


def a_safetensors() -> bytes:
    """One with a bit of everything."""
    specs = [TensorSpec("w", DTYPES["F32"], (4, 3)), TensorSpec("b", DTYPES["BF16"], (5,))]
    specs += [TensorSpec("s", DTYPES["I64"], ()), TensorSpec("none", DTYPES["F32"], (0, 7))]
    specs += [TensorSpec("text", DTYPES["STR"], (2,)), TensorSpec("packed", DTYPES["I8"], (6,))]
    info = json.dumps({"w": {"saved_offsets": [0, 0]}})
    laid = safetensors.layout(specs, {"format": "ms", "packed": "Int4", "DCP_SHARDING_INFO": info}, crc=True)
    head = laid.literals[0][1]
    return head + bytes(laid.size - len(head))


def an_adapter() -> bytes:
    """The products of one module."""
    shapes = {"A": (2, 4), "B": (3, 2)}
    specs = [TensorSpec(f"base_model.model.a.q_proj.lora_{n}.weight", DTYPES["F32"], s) for n, s in shapes.items()]
    laid = safetensors.layout(specs, {})
    head = laid.literals[0][1]
    return head + bytes(laid.size - len(head))


def encrypted() -> list[bytes]:
    """A `.ckpt` in every container."""
    blocks = [in_blocks(a_ckpt(), KEY, mode, block=64) for mode in ("AES-GCM", "AES-CBC", "SM4-CBC")]
    return [*blocks, in_chunks(a_ckpt(), KEY, chunk=64)]


def strategies(suffix: str) -> list[bytes]:
    """Of one stage, and of two merged."""
    one = [LayoutItem("a.w", 0, Layout((2, 4), ((0,), ()), 1, -1)), LayoutItem("b", 0, Layout((2, 4), ((1, 0), ())))]
    found = []
    for number, items in enumerate((one, [*one, LayoutItem("a.w", 1, Layout((8,), ((0,),)))])):
        path = folder() / f"made_{number}.{suffix}"
        save_strategy(Strategy.from_items(items, "a seed"), path)
        found.append(path.read_bytes())
    return found


def metadata() -> list[bytes]:
    """What MindFormers saves of four ranks, with every replica and without."""
    from tests.support.mindformers_folder import saved

    root = Path(tempfile.mkdtemp(dir=folder()))
    return [(saved(root / name, lean=name == "lean") / "metadata.json").read_bytes() for name in ("full", "lean")]


def manifests() -> list[bytes]:
    """Of plain files and of one that is encrypted."""
    held = FileDigests(300, {"w": DIGEST}, DIGEST)
    return [Manifest({"a": held, "b/c": FileDigests(5, {}), "d": held.sealed_by(Key(KEY), "d")}).to_json()]
