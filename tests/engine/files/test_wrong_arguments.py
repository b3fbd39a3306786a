"""Wrong arguments of merges and re-cuts: the error names the argument, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import (
    errors,
    load_distributed_checkpoint,
    unified_safetensors,
)
from tests.support.checkpoints import (
    source,
)

WRONG_MERGE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"src_dir": None}, errors.UsageError, "src_dir is needed"),
    ({"src_dir": 3}, errors.ArgumentTypeError, "src_dir must be a path, got int"),
    ({"dst_dir": ["x"]}, errors.ArgumentTypeError, "dst_dir must be a path, got list"),
    ({"src_strategy_file": 1.5}, errors.ArgumentTypeError, "src_strategy_file must be a path, got float"),
    ({"max_process_num": 0}, errors.UsageError, "max_process_num must be an int of at least 1, got 0"),
    ({"max_process_num": "2"}, errors.UsageError, "max_process_num must be an int"),
    ({"choice_func": "keep"}, errors.ArgumentTypeError, "choice_func must be callable, got str"),
    ({"split_dst_file": (0, 2)}, errors.UsageError, r"1 <= task <= tasks, got \(0, 2\)"),
    ({"split_dst_file": (3, 2)}, errors.UsageError, r"got \(3, 2\)"),
    ({"split_dst_file": (1,)}, errors.UsageError, r"two ints from 1.*got \(1,\)"),
    ({"split_dst_file": "both"}, errors.UsageError, "got 'both'"),
    ({"naming": "pytorch"}, errors.UsageError, "naming must be 'mindspore' or 'huggingface', got 'pytorch'"),
    *(
        ({"part_bytes": wrong}, errors.ArgumentTypeError, "part_bytes must be an int")
        for wrong in ("5G", None, 1.5, True)
    ),
    ({"part_bytes": 0}, errors.UsageError, "at least 1 byte, got 0"),
    ({"buffer_bytes": 100}, errors.UsageError, "buffer_bytes must be an int of at least 65536, got 100"),
    ({"file_suffix": "9_9"}, errors.DiscoveryError, "no file in .*rank_0' ends with '9_9.safetensors'; it holds"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_MERGE, ids=str)
def test_wrong_merge_arguments(wrong: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    arguments = {"src_dir": root / "shards", "src_strategy_file": root / "strategy.ckpt", "dst_dir": tmp_path / "out"}
    with pytest.raises(error, match=message):
        unified_safetensors(**{**arguments, **wrong})
    assert not (tmp_path / "out").exists()


def test_source_is_a_file(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    with pytest.raises(ValueError, match="must be the directory that holds the rank folders, got the file"):
        unified_safetensors(root / "strategy.ckpt", root / "strategy.ckpt", tmp_path / "out")


WRONG_LOAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank_id": "0"}, errors.ArgumentTypeError, "rank_id must be an int or None, got str"),
    ({"rank_id": True}, errors.ArgumentTypeError, "rank_id must be an int or None, got bool"),
    ({"rank_id": -1}, errors.UsageError, "rank_id must be at least 0, got -1"),
    ({"rank_id": 4}, errors.UsageError, "rank_id must be between 0 and 3 under predict_strategy, got 4"),
    ({"predict_strategy": 5}, errors.ArgumentTypeError, "predict_strategy must be a path.*got int"),
    ({"unified_safetensors_dir": None}, errors.UsageError, "unified_safetensors_dir is needed"),
    ({"dst_safetensors_dir": None}, errors.UsageError, "dst_safetensors_dir is needed"),
    ({"format": "onnx"}, errors.UsageError, "format must be .*'onnx'"),
    ({"output_format": "npz"}, errors.UsageError, "output_format must be .*'npz'"),
    ({"name_map": ["a"]}, errors.ArgumentTypeError, "name_map must map names"),
    ({"name_map": {"a": 1}}, errors.ArgumentTypeError, "name_map must map names"),
    ({"dec_key": b"0123"}, errors.UsageError, "a key of 4 bytes"),
    ({"network": "net"}, (errors.ArgumentTypeError, errors.MissingDependencyError), "network must be|MindSpore"),  # type: ignore[list-item]
    ({"train_strategy_filename": None}, errors.DiscoveryError, "holds 4 rank folders, so the strategy .* is needed"),
]


@pytest.mark.parametrize("wrong, error, message", WRONG_LOAD, ids=str)
def test_wrong_load_arguments(wrong: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    arguments = {
        "network": None,
        "predict_strategy": root / "strategy.ckpt",
        "train_strategy_filename": root / "strategy.ckpt",
        "format": "safetensors",
        "unified_safetensors_dir": root / "shards",
        "dst_safetensors_dir": tmp_path / "out",
    }
    with pytest.raises(error, match=message):
        load_distributed_checkpoint(**{**arguments, **wrong})
    assert not (tmp_path / "out").exists()
