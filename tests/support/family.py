"""A call of every function of MindSpore's checkpoint family, on a checkpoint of two ranks, and what came of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

import mindspore
import mindspore.parallel
import mindspore.train
import numpy as np

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.support.checkpoints import cut, strategy_of
from tests.support.formats import contents

WHOLE = {"a.w": np.arange(32, dtype=np.float32).reshape(8, 4), "b.w": np.arange(8, dtype=np.int32)}
LAYOUTS = {"a.w": Layout((2,), ((0,), ())), "b.w": Layout((2,), ((),))}


def checkpoint(root: Path) -> Path:
    """`safetensors/` and `ckpt/` of two ranks, `merged/`, `strategy.ckpt`, and what else the calls below read."""
    strategy = strategy_of(LAYOUTS, root / "strategy.ckpt")
    cut(strategy, WHOLE, root / "safetensors", {"global_step": np.array([7], np.int32)})
    ms_ckpt_ext.convert(root / "safetensors", root / "ckpt", to="ckpt", digests=False)
    ms_ckpt_ext.unified_safetensors(root / "safetensors", root / "strategy.ckpt", root / "merged", digests=False)
    (root / "stages").mkdir()
    os.link(root / "strategy.ckpt", root / "stages" / "rank_0.ckpt")
    from mindspore.train.node_strategy_pb2 import ParallelGroupMap

    groups = ParallelGroupMap()
    groups.ckpt_restore_rank_list.dim.extend([0, 1])
    (root / "groups.pb").write_bytes(groups.SerializeToString())
    return root


def network() -> Any:
    cell = mindspore.nn.Cell()
    for number, (name, array) in enumerate(WHOLE.items()):
        parameter = mindspore.Parameter(mindspore.Tensor(np.zeros_like(array)), name=name)
        cell.insert_param_to_cell(f"p{number}", parameter, False)
    return cell


def told(value: Any) -> Any:
    """Something to compare: contents of Parameters, files, futures, messages."""
    if isinstance(value, Mapping):
        return {str(name): told(held) for name, held in sorted(value.items())}
    if isinstance(value, mindspore.nn.Cell):
        return told(value.parameters_dict())
    if isinstance(value, mindspore.Parameter):
        return str(value.dtype), tuple(value.shape), value.asnumpy().tobytes()
    if isinstance(value, Path):
        return {str(p.relative_to(value)): contents(p) for p in sorted(value.rglob("*")) if is_checkpoint(p)}
    if hasattr(value, "result"):
        return told(value.result())
    return value.SerializeToString() if hasattr(value, "SerializeToString") else value


def is_checkpoint(path: Path) -> bool:
    return path.suffix in (".ckpt", ".safetensors") and path.is_file()


def _filled(root: Path, out: Path, load: Callable[..., Any], **more: Any) -> Any:
    cell = network()
    load(cell, **more)
    return cell


def rank_files(root: Path, kind: str) -> dict[int, str]:
    """Rank -> its file, "ckpt" or "safetensors"."""
    return {rank: str(root / kind / f"rank_{rank}" / f"net.{kind}") for rank in range(2)}


def _by_rank(root: Path, out: Path, by_rank: Callable[..., Any]) -> Any:
    strategy = str(root / "strategy.ckpt")
    out.mkdir()
    by_rank(0, rank_files(root, "ckpt"), str(out / "net0.ckpt"), strategy, None)
    return out


def _made(out: Path, call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    call(*map(str, arguments), **more)
    return out


def _slices(root: Path, merge: Callable[..., Any], build: Callable[..., Any]) -> Any:
    parts = [mindspore.Parameter(mindspore.Tensor(half), name="a.w") for half in np.split(WHOLE["a.w"], 2)]
    return merge(parts, build(str(root / "strategy.ckpt")))


def _merged_strategy(root: Path, out: Path) -> Any:
    mindspore.merge_pipeline_strategys(str(root / "stages"), str(out / "merged.ckpt"))
    return (out / "merged.ckpt").read_bytes()


def strategy_file(root: Path) -> str:
    """The strategy file beside them."""
    return str(root / "strategy.ckpt")


Call = Callable[[Path, Path], Any]
CALLS: dict[str, Call] = {
    "unified_safetensors": lambda r, o: _made(o, mindspore.unified_safetensors, r / "safetensors", strategy_file(r), o),
    "merge_pipeline_strategys": _merged_strategy,
    "load_distributed_checkpoint": lambda r, o: _filled(
        r, o, mindspore.load_distributed_checkpoint, format="safetensors", unified_safetensors_dir=str(r / "merged")
    ),
    "load_distributed_checkpoint of .ckpt": lambda r, o: _filled(
        r,
        o,
        mindspore.load_distributed_checkpoint,
        checkpoint_filenames=[*rank_files(r, "ckpt").values()],
        train_strategy_filename=strategy_file(r),
    ),
    "load_distributed_checkpoint by its old name": lambda r, o: _filled(
        r,
        o,
        mindspore.train.load_distributed_checkpoint,
        checkpoint_filenames=[*rank_files(r, "ckpt").values()],
        train_strategy_filename=strategy_file(r),
    ),
    "transform_checkpoints": lambda r, o: _made(
        o, mindspore.transform_checkpoints, r / "ckpt", o, "net", strategy_file(r), strategy_file(r)
    ),
    "transform_checkpoints of safetensors": lambda r, o: _made(
        o,
        mindspore.transform_checkpoints,
        r / "safetensors",
        o,
        "net",
        strategy_file(r),
        strategy_file(r),
        output_format="safetensors",
    ),
    "transform_checkpoint_by_rank": lambda r, o: _by_rank(r, o, mindspore.transform_checkpoint_by_rank),
    "rank_list_for_transform": lambda r, o: mindspore.rank_list_for_transform(0, strategy_file(r), None),
    "convert_checkpoints": lambda r, o: _made(
        o, mindspore.parallel.convert_checkpoints, r / "ckpt", o, "net", strategy_file(r), strategy_file(r)
    ),
    "convert_checkpoint_by_rank": lambda r, o: _by_rank(r, o, mindspore.parallel.convert_checkpoint_by_rank),
    "rank_list_for_convert": lambda r, o: mindspore.parallel.rank_list_for_convert(0, strategy_file(r), None),
    "ckpt_to_safetensors": lambda r, o: _made(o, mindspore.ckpt_to_safetensors, r / "ckpt", o),
    "ckpt_to_safetensors of a file": lambda r, o: _made(
        o, mindspore.ckpt_to_safetensors, rank_files(r, "ckpt")[1], o, name_map={"a.w": "c.w"}
    ),
    "safetensors_to_ckpt": lambda r, o: _made(
        o, mindspore.safetensors_to_ckpt, r / "safetensors", o, name_map={"a.w": "c.w"}
    ),
    "load_segmented_checkpoints": lambda r, o: mindspore.load_segmented_checkpoints(str(r / "ckpt" / "rank_0")),
    "load_checkpoint": lambda r, o: mindspore.load_checkpoint(rank_files(r, "ckpt")[0]),
    "load_checkpoint of safetensors": lambda r, o: mindspore.train.serialization.load_checkpoint(
        rank_files(r, "safetensors")[0], format="safetensors"
    ),
    "load_checkpoint_async": lambda r, o: mindspore.load_checkpoint_async(rank_files(r, "ckpt")[0]),
    "build_searched_strategy": lambda r, o: mindspore.build_searched_strategy(strategy_file(r)),
    "build_searched_strategy by its old name": lambda r, o: mindspore.train.build_searched_strategy(strategy_file(r)),
    "merge_sliced_parameter": lambda r, o: _slices(
        r, mindspore.merge_sliced_parameter, mindspore.build_searched_strategy
    ),
    "merge_sliced_parameter by its old name": lambda r, o: _slices(
        r, mindspore.train.merge_sliced_parameter, mindspore.train.build_searched_strategy
    ),
    "restore_group_info_list": lambda r, o: mindspore.restore_group_info_list(str(r / "groups.pb")),
    "restore_group_info_list by its old name": lambda r, o: mindspore.train.restore_group_info_list(
        str(r / "groups.pb")
    ),
    "get_ckpt_path_with_strategy": lambda r, o: os.path.relpath(
        mindspore.get_ckpt_path_with_strategy(rank_files(r, "ckpt")[0], strategy_file(r)), r
    ),
}
"""Name of the function, and what is special about the call -> it: (checkpoint, directory for results) -> outcome."""
