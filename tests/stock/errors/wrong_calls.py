"""Wrong calls of every function of the family, each as `(package, places) -> anything`; `package` is stock or ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np

from tests.stock.errors.wrong_places import Places
from tests.support import family

Call = Callable[[Any, Places], Any]


def slices(names: str = "ww", rows: tuple[int, ...] = (2, 2)) -> list[Any]:
    import mindspore

    return [
        mindspore.Parameter(mindspore.Tensor(np.zeros((extent, 2), np.float32)), name=name)
        for name, extent in zip(names, rows)
    ]


def layout(devices: int = 2, split: tuple[int, ...] = (), name: str = "w") -> dict[str, Any]:
    from mindspore.train.node_strategy_pb2 import ParallelLayouts

    held = ParallelLayouts()
    held.dev_matrix.add().dim.append(devices)
    held.tensor_map.add().dim.extend([0, -1])
    held.param_split_shape.add().dim.extend(split)
    return {name: held}


def with_checksum(p: Places, kind: str) -> str:
    """A file whose contents are not what its checksum says."""
    import mindspore

    path = Path(p.out(f".{kind}"))
    parameter = mindspore.Parameter(mindspore.Tensor(np.full(3, 7.0, np.float32)), name="w")
    mindspore.save_checkpoint([{"name": "w", "data": parameter}], str(path), crc_check=True, format=kind)
    raw = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(raw.replace(np.float32(7).tobytes(), np.float32(8).tobytes()))
    return str(path)


def encrypted(p: Places) -> str:
    import mindspore

    path = p.out(".ckpt")
    mindspore.save_checkpoint(mindspore.nn.Dense(2, 2), path, enc_key=b"k" * 16)
    return path


def merged(m: Any, p: Places, **more: Any) -> Any:
    network = more.pop("network", None) or family.network()
    given = {"format": "safetensors", "unified_safetensors_dir": str(p.good / "merged"), **more}
    return m.load_distributed_checkpoint(network, **given)


def saved(m: Any, p: Places, **more: Any) -> Any:
    given: dict[str, Any] = {"unified_safetensors_dir": str(p.good / "merged"), "dst_safetensors_dir": p.out()}
    return m.load_distributed_checkpoint(None, format="safetensors", **{**given, "rank_id": 0, **more})


def listed(m: Any, p: Places, files: Any = None, predict: Any = None, train: Any = "", **more: Any) -> Any:
    files = [*p.files().values()] if files is None else files
    return m.load_distributed_checkpoint(
        more.pop("network", family.network()), files, predict, p.strategy if train == "" else train, **more
    )


def unified(m: Any, p: Places, src: Any = "", strategy: Any = "", dst: Any = "", **more: Any) -> Any:
    return m.unified_safetensors(
        p.shards("safetensors") if src == "" else src,
        p.strategy if strategy == "" else strategy,
        p.out() if dst == "" else dst,
        **more,
    )


def transform(m: Any, p: Places, src: Any = "", dst: Any = "", a: Any = "", b: Any = "", **more: Any) -> Any:
    more.setdefault("ckpt_prefix", "x")
    return m.transform_checkpoints(
        p.shards() if src == "" else src,
        p.out() if dst == "" else dst,
        src_strategy_file=p.strategy if a == "" else a,
        dst_strategy_file=p.strategy if b == "" else b,
        **more,
    )


def by_rank(m: Any, p: Places, rank: Any = 0, files: Any = None, to: Any = "", a: Any = "", b: Any = None) -> Any:
    files = p.files() if files is None else files
    return m.transform_checkpoint_by_rank(
        rank, files, p.out(".ckpt") if to == "" else to, p.strategy if a == "" else a, b
    )


CALLS: dict[str, Call] = {
    "merge_pipeline_strategys of a file": lambda m, p: m.merge_pipeline_strategys(p.at("file"), p.out()),
    "… of nothing": lambda m, p: m.merge_pipeline_strategys(p.at("nothing"), p.out()),
    "… of both forms": lambda m, p: m.merge_pipeline_strategys(p.at("stages_both"), p.out()),
    "… of an empty file": lambda m, p: m.merge_pipeline_strategys(p.at("stages_empty"), p.out()),
    "… of what is none": lambda m, p: m.merge_pipeline_strategys(p.at("stages_junk"), p.out()),
    "… of json without layouts": lambda m, p: m.merge_pipeline_strategys(p.at("stages_json"), p.out()),
    "… of None": lambda m, p: m.merge_pipeline_strategys(None, p.out()),
    "… of a number": lambda m, p: m.merge_pipeline_strategys(5.5, p.out()),
    "… into None": lambda m, p: m.merge_pipeline_strategys(str(p.good / "stages"), None),
    "… into a number": lambda m, p: m.merge_pipeline_strategys(str(p.good / "stages"), 5),
    "… into a folder": lambda m, p: m.merge_pipeline_strategys(str(p.good / "stages"), p.at("empty")),
    "… below a file": lambda m, p: m.merge_pipeline_strategys(str(p.good / "stages"), p.at("file/x.ckpt")),
    "unified_safetensors of a file": lambda m, p: unified(m, p, p.at("file")),
    "unified_safetensors of nothing": lambda m, p: unified(m, p, p.at("nothing")),
    "unified_safetensors of None": lambda m, p: unified(m, p, None),
    "unified_safetensors of a number": lambda m, p: unified(m, p, 5.5),
    "unified_safetensors of an empty folder": lambda m, p: unified(m, p, p.at("empty")),
    "unified_safetensors of both formats": lambda m, p: unified(m, p, p.at("both")),
    "unified_safetensors without a rank": lambda m, p: unified(m, p, p.at("lacking_safetensors")),
    "unified_safetensors of a torn file": lambda m, p: unified(m, p, p.at("torn_safetensors")),
    "unified_safetensors into a file": lambda m, p: unified(m, p, dst=p.at("file")),
    "unified_safetensors below a file": lambda m, p: unified(m, p, dst=p.at("file/x")),
    "unified_safetensors into None": lambda m, p: unified(m, p, dst=None),
    "unified_safetensors into a number": lambda m, p: unified(m, p, dst=5),
    "unified_safetensors by no strategy": lambda m, p: unified(m, p, strategy=p.at("nothing.ckpt")),
    "unified_safetensors by no folder's": lambda m, p: unified(m, p, strategy=p.at("nothing/x.ckpt")),
    "unified_safetensors by an empty one": lambda m, p: unified(m, p, strategy=p.at("empty.ckpt")),
    "unified_safetensors by what is none": lambda m, p: unified(m, p, strategy=p.at("junk.ckpt")),
    "unified_safetensors by bad json": lambda m, p: unified(m, p, strategy=p.at("junk.json")),
    "unified_safetensors by a number": lambda m, p: unified(m, p, strategy=5),
    "unified_safetensors by a folder": lambda m, p: unified(m, p, strategy=p.at("empty")),
    "unified_safetensors by one without devices": lambda m, p: unified(m, p, strategy=p.at("no_devices.json")),
    "unified_safetensors by a damaged one": lambda m, p: unified(m, p, strategy=p.at("damaged.json")),
    "unified_safetensors in no process": lambda m, p: unified(m, p, max_process_num=0),
    "unified_safetensors of no suffix": lambda m, p: unified(m, p, file_suffix="7_7"),
    "unified_safetensors of two tasks": lambda m, p: unified(m, p, p.at("several_safetensors"), file_suffix="_1-1_2"),
    "unified_safetensors of two names": lambda m, p: unified(m, p, p.at("several_safetensors"), file_suffix="_x"),
    "unified_safetensors of two steps": lambda m, p: unified(m, p, p.at("several_safetensors"), file_suffix="2"),
    "unified_safetensors of no step": lambda m, p: unified(m, p, p.at("several_safetensors"), file_suffix="12"),
    "unified_safetensors chosen by a number": lambda m, p: unified(m, p, choice_func=lambda _: 5),
    "unified_safetensors with nothing chosen": lambda m, p: unified(m, p, choice_func=lambda _: False),
    "unified_safetensors, no choice": lambda m, p: unified(m, p, choice_func=5),
    "unified_safetensors, share of text": lambda m, p: unified(m, p, split_dst_file="ab"),
    "unified_safetensors, share of a number": lambda m, p: unified(m, p, split_dst_file=5),
    "transform_checkpoints of nothing": lambda m, p: transform(m, p, p.at("nothing")),
    "transform_checkpoints of a file": lambda m, p: transform(m, p, p.at("file")),
    "transform_checkpoints of None": lambda m, p: transform(m, p, None),
    "transform_checkpoints of an empty folder": lambda m, p: transform(m, p, p.at("empty")),
    "transform_checkpoints of both formats": lambda m, p: transform(m, p, p.at("both")),
    "transform_checkpoints without a rank": lambda m, p: transform(m, p, p.at("lacking_ckpt")),
    "… of safetensors": lambda m, p: transform(m, p, p.at("lacking_safetensors"), output_format="safetensors"),
    "transform_checkpoints of a torn file": lambda m, p: transform(m, p, p.at("torn_ckpt")),
    "transform_checkpoints, torn safetensors": lambda m, p: transform(m, p, p.at("torn_safetensors")),
    "transform_checkpoints, prefix": lambda m, p: transform(m, p, ckpt_prefix=5),
    "transform_checkpoints of safetensors, prefix": lambda m, p: transform(
        m, p, p.shards("safetensors"), ckpt_prefix=5
    ),
    "transform_checkpoints, format": lambda m, p: transform(m, p, p.shards("safetensors"), output_format="npz"),
    "transform_checkpoints into a file": lambda m, p: transform(m, p, dst=p.at("file")),
    "transform_checkpoints of safetensors into a file": lambda m, p: transform(
        m, p, p.shards("safetensors"), dst=p.at("file")
    ),
    "transform_checkpoints into None": lambda m, p: transform(m, p, dst=None),
    "transform_checkpoints into a number": lambda m, p: transform(m, p, dst=5),
    "transform_checkpoints by no strategy": lambda m, p: transform(m, p, a=p.at("nothing.ckpt")),
    "transform_checkpoints by no folder's": lambda m, p: transform(m, p, a=p.at("nothing/s.ckpt")),
    "transform_checkpoints for no folder's": lambda m, p: transform(m, p, b=p.at("nothing/s.ckpt")),
    "transform_checkpoints of safetensors for no folder's": lambda m, p: transform(
        m, p, p.shards("safetensors"), b=p.at("nothing/s.ckpt")
    ),
    "transform_checkpoints by what is none": lambda m, p: transform(m, p, a=p.at("junk.ckpt")),
    "transform_checkpoints by a number": lambda m, p: transform(m, p, a=5),
    "transform_checkpoints for a number": lambda m, p: transform(m, p, b=5),
    "transform_checkpoints by stage 1 alone": lambda m, p: transform(m, p, a=p.at("stage_1.json")),
    "transform_checkpoint_by_rank of a list": lambda m, p: by_rank(m, p, files=[]),
    "transform_checkpoint_by_rank of a rank in text": lambda m, p: by_rank(m, p, "0"),
    "transform_checkpoint_by_rank into a number": lambda m, p: by_rank(m, p, to=5),
    "transform_checkpoint_by_rank into no format": lambda m, p: by_rank(m, p, to=p.out(".bin")),
    "transform_checkpoint_by_rank into no name": lambda m, p: by_rank(m, p, to=" "),
    "transform_checkpoint_by_rank of nothing": lambda m, p: by_rank(m, p, files={0: p.at("nothing.ckpt")}),
    "transform_checkpoint_by_rank of None": lambda m, p: by_rank(m, p, files={0: None}),
    "transform_checkpoint_by_rank of a number": lambda m, p: by_rank(m, p, files={0: 5.5}),
    "transform_checkpoint_by_rank without a rank": lambda m, p: by_rank(m, p, files={0: p.files()[0]}),
    "transform_checkpoint_by_rank of no file": lambda m, p: by_rank(m, p, files={}),
    "transform_checkpoint_by_rank of another's": lambda m, p: by_rank(m, p, files={1: p.files()[1]}, b=p.strategy),
    "transform_checkpoint_by_rank of what is none": lambda m, p: by_rank(m, p, files={0: p.at("junk.ckpt")}),
    "transform_checkpoint_by_rank for no folder's": lambda m, p: by_rank(m, p, b=p.at("nothing/s.ckpt")),
    "transform_checkpoint_by_rank by a number": lambda m, p: by_rank(m, p, a=5),
    "transform_checkpoint_by_rank into a folder": lambda m, p: by_rank(m, p, to=p.at("folder.ckpt")),
    "transform_checkpoint_by_rank below a file": lambda m, p: by_rank(m, p, to=p.at("file/x.ckpt")),
    "rank_list_for_transform of text": lambda m, p: m.rank_list_for_transform("0", p.strategy),
    "rank_list_for_transform of None": lambda m, p: m.rank_list_for_transform(None, p.strategy),
    "rank_list_for_transform by a number": lambda m, p: m.rank_list_for_transform(0, 5),
    "rank_list_for_transform for a number": lambda m, p: m.rank_list_for_transform(0, p.strategy, 5),
    "rank_list_for_transform by no strategy": lambda m, p: m.rank_list_for_transform(0, p.at("nothing.ckpt")),
    "rank_list_for_transform by what is none": lambda m, p: m.rank_list_for_transform(0, p.at("junk.ckpt")),
    "rank_list_for_transform by an empty one": lambda m, p: m.rank_list_for_transform(0, p.at("empty.ckpt")),
    "rank_list_for_transform by bad json": lambda m, p: m.rank_list_for_transform(0, p.at("junk.json")),
    "load_distributed_checkpoint, format": lambda m, p: merged(m, p, format="onnx"),
    "load_distributed_checkpoint, output_format": lambda m, p: saved(m, p, output_format="npz"),
    "load_distributed_checkpoint of None": lambda m, p: merged(m, p, unified_safetensors_dir=None),
    "load_distributed_checkpoint of nothing": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("nothing")),
    "load_distributed_checkpoint of a file": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("file")),
    "load_distributed_checkpoint of a number": lambda m, p: merged(m, p, unified_safetensors_dir=5.5),
    "load_distributed_checkpoint of an empty folder": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("empty")),
    "load_distributed_checkpoint of a folder": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("folder_in_it")),
    "load_distributed_checkpoint without a part": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("part_gone")),
    "load_distributed_checkpoint without map": lambda m, p: merged(m, p, unified_safetensors_dir=p.at("without_map")),
    "load_distributed_checkpoint, both sources": lambda m, p: merged(m, p, checkpoint_filenames=[*p.files().values()]),
    "load_distributed_checkpoint into None": lambda m, p: saved(m, p, dst_safetensors_dir=None),
    "load_distributed_checkpoint into a number": lambda m, p: saved(m, p, dst_safetensors_dir=5),
    "load_distributed_checkpoint into a file": lambda m, p: saved(m, p, dst_safetensors_dir=p.at("file")),
    "load_distributed_checkpoint, rank in text": lambda m, p: saved(m, p, rank_id="0"),
    "load_distributed_checkpoint in no process": lambda m, p: saved(
        m, p, rank_id=None, predict_strategy=p.strategy, max_process_num=0
    ),
    "load_distributed_checkpoint, name_map": lambda m, p: merged(m, p, name_map=5),
    "load_distributed_checkpoint, network": lambda m, p: merged(m, p, network=5),
    "load_distributed_checkpoint for a number": lambda m, p: merged(m, p, predict_strategy=5),
    "load_distributed_checkpoint for no strategy": lambda m, p: merged(m, p, predict_strategy=p.at("nothing.ckpt")),
    "load_distributed_checkpoint for what is none": lambda m, p: merged(m, p, predict_strategy=p.at("junk.ckpt")),
    "… of .ckpt, network": lambda m, p: listed(m, p, network=5),
    "… of .ckpt, no network": lambda m, p: listed(m, p, network=None),
    "… of .ckpt, None": lambda m, p: m.load_distributed_checkpoint(family.network(), None, None, p.strategy),
    "… of .ckpt, a number": lambda m, p: listed(m, p, 5),
    "… of .ckpt, text": lambda m, p: listed(m, p, "abc"),
    "… of .ckpt, numbers": lambda m, p: listed(m, p, [5, 6]),
    "… of .ckpt, nothing": lambda m, p: listed(m, p, [p.at("a.ckpt"), p.at("b.ckpt")]),
    "… of .ckpt, empty": lambda m, p: listed(m, p, [p.at("empty.ckpt")] * 2),
    "… of .ckpt, too few": lambda m, p: listed(m, p, [p.files()[0]]),
    "… of .ckpt, what is none": lambda m, p: listed(m, p, [p.at("junk.ckpt")] * 2),
    "… of .ckpt, for a number": lambda m, p: listed(m, p, predict=5),
    "… of .ckpt, for short layouts": lambda m, p: listed(m, p, predict={"a.w": [1]}),
    "… of .ckpt, for layouts of numbers": lambda m, p: listed(m, p, predict={"a.w": [1, 2, 3, 4]}),
    "… of .ckpt, by no strategy": lambda m, p: listed(m, p, train=p.at("nothing.ckpt")),
    "… of .ckpt, by a number": lambda m, p: listed(m, p, train=5),
    "… of .ckpt, by what is none": lambda m, p: listed(m, p, train=p.at("junk.ckpt")),
    "… of .ckpt, dec_key": lambda m, p: listed(m, p, dec_key="text"),
    "… of .ckpt, dec_mode": lambda m, p: listed(m, p, dec_mode=5),
    "ckpt_to_safetensors of nothing": lambda m, p: m.ckpt_to_safetensors(p.at("nothing.ckpt")),
    "ckpt_to_safetensors of a number": lambda m, p: m.ckpt_to_safetensors(5.5),
    "ckpt_to_safetensors of None": lambda m, p: m.ckpt_to_safetensors(None),
    "ckpt_to_safetensors into a file's name": lambda m, p: m.ckpt_to_safetensors(p.files()[0], p.at("x.safetensors")),
    "ckpt_to_safetensors into a number": lambda m, p: m.ckpt_to_safetensors(p.files()[0], 5),
    "ckpt_to_safetensors into a file": lambda m, p: m.ckpt_to_safetensors(p.shards(), p.at("file")),
    "ckpt_to_safetensors, name_map": lambda m, p: m.ckpt_to_safetensors(p.files()[0], p.out(), 5),
    "ckpt_to_safetensors, suffix": lambda m, p: m.ckpt_to_safetensors(p.files("safetensors")[0], p.out()),
    "ckpt_to_safetensors, none matches": lambda m, p: m.ckpt_to_safetensors(p.files()[0], p.out(), None, "zzz"),
    "ckpt_to_safetensors, regex of a number": lambda m, p: m.ckpt_to_safetensors(p.files()[0], p.out(), None, 5),
    "ckpt_to_safetensors without ranks": lambda m, p: m.ckpt_to_safetensors(p.at("empty"), p.out()),
    "ckpt_to_safetensors in no process": lambda m, p: m.ckpt_to_safetensors(p.shards(), p.out(), processes_num=0),
    "ckpt_to_safetensors, processes": lambda m, p: m.ckpt_to_safetensors(p.shards(), p.out(), processes_num="2"),
    "ckpt_to_safetensors of what is none": lambda m, p: m.ckpt_to_safetensors(p.at("junk.ckpt"), p.out()),
    "safetensors_to_ckpt of nothing": lambda m, p: m.safetensors_to_ckpt(p.at("nothing.safetensors")),
    "safetensors_to_ckpt, suffix": lambda m, p: m.safetensors_to_ckpt(p.files()[0], p.out()),
    "safetensors_to_ckpt of what is none": lambda m, p: m.safetensors_to_ckpt(p.at("cut.safetensors"), p.out()),
    "safetensors_to_ckpt without ranks": lambda m, p: m.safetensors_to_ckpt(p.at("empty"), p.out()),
    "load_checkpoint of nothing": lambda m, p: m.load_checkpoint(p.at("nothing.ckpt")),
    "load_checkpoint of a number": lambda m, p: m.load_checkpoint(5),
    "load_checkpoint of None": lambda m, p: m.load_checkpoint(None),
    "load_checkpoint, suffix": lambda m, p: m.load_checkpoint(p.files("safetensors")[0]),
    "load_checkpoint, format": lambda m, p: m.load_checkpoint(p.files()[0], format="onnx"),
    "load_checkpoint of a folder": lambda m, p: m.load_checkpoint(p.at("folder.ckpt")),
    "load_checkpoint of what is none": lambda m, p: m.load_checkpoint(p.at("junk.ckpt")),
    "load_checkpoint of an empty file": lambda m, p: m.load_checkpoint(p.at("empty.ckpt")),
    "load_checkpoint of a torn one": lambda m, p: m.load_checkpoint(p.at("torn_ckpt/rank_1/net.ckpt")),
    "load_checkpoint by text": lambda m, p: m.load_checkpoint(p.files()[0], dec_key="x"),
    "load_checkpoint by a short key": lambda m, p: m.load_checkpoint(p.files()[0], dec_key=b"x"),
    "load_checkpoint of a plain one by a key": lambda m, p: m.load_checkpoint(p.files()[0], dec_key=b"x" * 16),
    "load_checkpoint by another's key": lambda m, p: m.load_checkpoint(encrypted(p), dec_key=b"x" * 16),
    "load_checkpoint without its key": lambda m, p: m.load_checkpoint(encrypted(p)),
    "load_checkpoint, dec_mode": lambda m, p: m.load_checkpoint(p.files()[0], dec_mode=5),
    "load_checkpoint, crc_check": lambda m, p: m.load_checkpoint(p.files()[0], crc_check=1),
    "load_checkpoint, redundancy": lambda m, p: m.load_checkpoint(p.files()[0], remove_redundancy="no"),
    "load_checkpoint, strict": lambda m, p: m.load_checkpoint(p.files()[0], family.network(), strict_load="no"),
    "load_checkpoint by a number": lambda m, p: m.load_checkpoint(p.files()[0], specify_prefix=5),
    "load_checkpoint by no prefix": lambda m, p: m.load_checkpoint(p.files()[0], filter_prefix=[]),
    "load_checkpoint by an empty prefix": lambda m, p: m.load_checkpoint(p.files()[0], filter_prefix=""),
    "load_checkpoint by prefixes of numbers": lambda m, p: m.load_checkpoint(p.files()[0], filter_prefix=[5]),
    "load_checkpoint of nothing in it": lambda m, p: m.load_checkpoint(p.files()[0], filter_prefix=["a", "b", "g"]),
    "load_checkpoint by no choice": lambda m, p: m.load_checkpoint(p.files()[0], choice_func=5),
    "load_checkpoint into a number": lambda m, p: m.load_checkpoint(p.files()[0], 5),
    "load_checkpoint into what does not fit": lambda m, p: m.load_checkpoint(p.files()[0], family.network()),
    "load_checkpoint of other contents": lambda m, p: m.load_checkpoint(with_checksum(p, "ckpt"), crc_check=True),
    "load_checkpoint of other contents, safetensors": lambda m, p: m.load_checkpoint(
        with_checksum(p, "safetensors"), crc_check=True, format="safetensors"
    ),
    **{
        f"load_checkpoint of {name}.safetensors": lambda m, p, name=name: m.load_checkpoint(
            p.at(f"{name}.safetensors"), format="safetensors"
        )
        for name in ("shorter", "cut", "huge", "offset", "shape", "longer")
    },
    "load_segmented_checkpoints of nothing": lambda m, p: m.load_segmented_checkpoints(p.at("nothing")),
    "load_segmented_checkpoints of a file": lambda m, p: m.load_segmented_checkpoints(p.at("file")),
    "load_segmented_checkpoints of a number": lambda m, p: m.load_segmented_checkpoints(5),
    "load_checkpoint_async of nothing": lambda m, p: m.load_checkpoint_async(p.at("nothing.ckpt")).result(),
    "build_searched_strategy of a number": lambda m, p: m.build_searched_strategy(5),
    "build_searched_strategy of nothing": lambda m, p: m.build_searched_strategy(p.at("nothing")),
    "build_searched_strategy of an empty file": lambda m, p: m.build_searched_strategy(p.at("empty.ckpt")),
    "build_searched_strategy of a folder": lambda m, p: m.build_searched_strategy(p.at("empty")),
    "build_searched_strategy of what is none": lambda m, p: m.build_searched_strategy(p.at("junk.ckpt")),
    "build_searched_strategy of bad json": lambda m, p: m.build_searched_strategy(p.at("junk.json")),
    "restore_group_info_list of a number": lambda m, p: m.restore_group_info_list(5),
    "restore_group_info_list of nothing": lambda m, p: m.restore_group_info_list(p.at("nothing")),
    "restore_group_info_list of an empty file": lambda m, p: m.restore_group_info_list(p.at("empty.ckpt")),
    "get_ckpt_path_with_strategy by no strategy": lambda m, p: m.get_ckpt_path_with_strategy(
        p.at("rank_1/x.ckpt"), p.at("nothing")
    ),
    "get_ckpt_path_with_strategy of a number": lambda m, p: m.get_ckpt_path_with_strategy(5, p.strategy),
    "merge_sliced_parameter of a number": lambda m, p: m.merge_sliced_parameter(5),
    "merge_sliced_parameter of none": lambda m, p: m.merge_sliced_parameter([]),
    "merge_sliced_parameter of numbers": lambda m, p: m.merge_sliced_parameter([5]),
    "merge_sliced_parameter of a number, too": lambda m, p: m.merge_sliced_parameter([*slices("w"), 5]),
    "merge_sliced_parameter of two names": lambda m, p: m.merge_sliced_parameter(slices("wv")),
    "merge_sliced_parameter by a number": lambda m, p: m.merge_sliced_parameter(slices(), 5),
    "merge_sliced_parameter by another's": lambda m, p: m.merge_sliced_parameter(slices(), layout(name="v")),
    "merge_sliced_parameter by what is none": lambda m, p: m.merge_sliced_parameter(slices(), {"w": object()}),
    "merge_sliced_parameter for more": lambda m, p: m.merge_sliced_parameter(slices(), layout(4)),
    "merge_sliced_parameter of uneven ones": lambda m, p: m.merge_sliced_parameter(slices(rows=(1, 3)), layout()),
    "merge_sliced_parameter, three rows": lambda m, p: m.merge_sliced_parameter(slices(), layout(2, (1, 2, 1))),
    "merge_sliced_parameter, other rows": lambda m, p: m.merge_sliced_parameter(slices(), layout(2, (1, 3))),
}
"""What is wrong -> the call."""
