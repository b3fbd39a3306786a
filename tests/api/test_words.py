"""Errors about arguments speak in the words of the function that was called, and nothing is written."""

from __future__ import annotations

from inspect import isfunction, signature
from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.errors import ArgumentTypeError, CheckpointError, UsageError

GOLDEN = Path(__file__).resolve().parents[1] / "data/golden/dp2_tp2"
FOREIGN = {
    "merge": ("split_dst_file", "output_format", "src_dir", "dst_dir", "src_strategy_file", "predict_strategy"),
    "reshard": (
        "split_dst_file",
        "output_format",
        "dst_safetensors_dir",
        "predict_strategy",
        "unified_safetensors_dir",
    ),
    "unified_safetensors": (" share ", "share must", " to must", "src must", "dst must"),
    "convert": ("output_format", "src_dir", "dst_dir"),
}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("merge", {"to": "npz"}, "to must be one of safetensors, ckpt"),
    ("merge", {"share": (5, 2)}, "share must be (task, tasks) with 1 <= task <= tasks, got (5, 2)"),
    ("merge", {"share": 3}, "share must be () or (task, tasks)"),
    ("merge", {"naming": "hf"}, "naming must be 'mindspore' or 'huggingface'"),
    ("merge", {"naming": "huggingface", "to": "ckpt"}, "naming='huggingface' is for safetensors files"),
    ("merge", {"part_bytes": 0}, "part_bytes must be at least 1 byte, got 0"),
    ("merge", {"src": ""}, "src is needed here"),
    ("merge", {"dst": 5}, "dst must be a path, got int"),
    ("merge", {"format": "npz"}, "format must be one of safetensors, ckpt, or None"),
    ("merge", {"max_process_num": -1}, "max_process_num must be an int of at least 1"),
    ("merge", {"buffer_bytes": 5}, "buffer_bytes must be an int of at least 65536"),
    ("merge", {"choice_func": 5}, "choice_func must be callable"),
    ("merge", {"name_map": {"a": 1}}, "name_map must map"),
    ("merge", {"rules": ["a"]}, "rules must be a list of rules"),
    ("merge", {"enc_mode": 5}, "enc_mode must be a str"),
    ("merge", {"dec_mode": 5}, "dec_mode must be a str"),
    ("merge", {"dec_key": "text"}, "dec_key: a key must be bytes, not str"),
    ("merge", {"enc_key": b"short"}, "enc_key: a key of 5 bytes"),
    ("merge", {"match": 5}, "match must be a glob or several, as str"),
    ("merge", {"exclude": None}, "exclude must be a glob or several, as str"),
    ("merge", {"strategy": 5}, "strategy must be a path, got int"),
    ("merge", {"file_suffix": "9_9"}, "as file_suffix"),
    ("merge", {"file_suffix": 9}, "file_suffix must be a str or None, got int"),
    ("merge", {"to": None}, "to must be a str, got NoneType"),
    ("merge", {"digests": "no"}, "digests must be True or False, got 'no'"),
    ("merge", {"sync": 0}, "sync must be True or False, got 0"),
    ("merge", {"dry_run": None}, "dry_run must be True or False, got None"),
    ("reshard", {"to": "npz"}, "to must be one of safetensors, ckpt"),
    ("reshard", {"to_strategy": 5}, "to_strategy must be a path, got int"),
    ("reshard", {"to_strategy": []}, "to_strategy is an empty list"),
    ("reshard", {"enc_key": 5}, "enc_key: a key must be bytes, not int"),
    ("reshard", {"rank": -1}, "rank must be at least 0"),
    ("reshard", {"rank": 9}, "rank must be between 0 and 0 under to_strategy, got 9"),
    ("reshard", {"dst": None}, "dst is needed here"),
    ("reshard", {"src": 5}, "src must be a path, got int"),
    ("unified_safetensors", {"output_format": "npz"}, "output_format must be one of safetensors, ckpt"),
    ("unified_safetensors", {"split_dst_file": (3, 2)}, "split_dst_file must be (task, tasks)"),
    ("unified_safetensors", {"src_dir": 5}, "src_dir must be a path, got int"),
    ("unified_safetensors", {"dst_dir": ""}, "dst_dir is needed here"),
    ("unified_safetensors", {"src_strategy_file": 5}, "src_strategy_file must be a path, got int"),
    ("convert", {"to": "npz"}, "to must be one of safetensors, ckpt"),
    ("convert", {"src": 5}, "src must be a path, got int"),
    ("convert", {"dec_key": b"0123"}, "dec_key: a key of 4 bytes"),
    ("convert", {"file_name_regex": b"x"}, "file_name_regex b'x' is not a regular expression"),
]


def arguments(name: str, out: Path) -> dict[str, Any]:
    """Valid arguments of the function."""
    shards, strategy = GOLDEN / "shards", GOLDEN / "strategy.ckpt"
    if name == "unified_safetensors":
        return {"src_dir": shards, "src_strategy_file": strategy, "dst_dir": out}
    return {"src": shards, "dst": out, **({"to": "ckpt"} if name == "convert" else {"strategy": strategy})}


@pytest.mark.parametrize(("name", "wrong", "told"), WRONG, ids=str)
def test_an_error_names_the_argument(name: str, wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    function: Callable[..., Any] = getattr(ms_ckpt_ext, name)
    with pytest.raises((CheckpointError, TypeError, ValueError)) as caught:
        function(**{**arguments(name, tmp_path / "out"), **wrong})
    message = str(caught.value)
    assert told in message
    assert not [word for word in FOREIGN[name] if word in message], message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_without_the_mistake_it_runs(name: str, tmp_path: Path) -> None:
    getattr(ms_ckpt_ext, name)(**arguments(name, tmp_path / "out"))
    assert any((tmp_path / "out").iterdir())


FUNCTIONS = {name: getattr(ms_ckpt_ext, name) for name in ms_ckpt_ext.__all__ if name != "CheckpointRecorder"}
BY_TRUTH = {
    ("load_distributed_checkpoint", "return_param_dict"),  # as MindSpore takes them
    ("unified_safetensors", "merge_with_redundancy"),
    ("load_checkpoint_async", "strict_load"),  # reported by its future
}
FLAGS = [
    (name, argument)
    for name, function in sorted(FUNCTIONS.items())
    if isfunction(function)
    for argument, kind in function.__annotations__.items()
    if kind == "bool" and argument != "return" and (name, argument) not in BY_TRUTH
]
TEXTS = [
    (name, argument)
    for name, function in sorted(FUNCTIONS.items())
    if isfunction(function)
    for argument in ("file_suffix", "dec_mode", "prefix", "check", "naming", "ckpt_prefix", "device_target")
    if argument in function.__annotations__ and name != "load_checkpoint_async"
]


def call(name: str, **wrong: Any) -> None:
    """A call with one mistake, which comes before everything else: nothing is given that could be looked for."""
    needed = [p for p in signature(FUNCTIONS[name]).parameters.values() if p.default is p.empty]
    right = {p.name: "x" if p.annotation == "str" else None for p in needed if p.kind is not p.VAR_KEYWORD}
    FUNCTIONS[name](**{**right, **wrong})


@pytest.mark.parametrize("value", ["no", 1, None])
@pytest.mark.parametrize(("name", "argument"), FLAGS)
def test_a_flag_is_true_or_false(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{argument} must be True or False, got {value!r}$"):
        call(name, **{argument: value})


@pytest.mark.parametrize(("name", "argument"), TEXTS)
def test_text_is_text(name: str, argument: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{argument} must be a str( or None)?, got int$"):
        call(name, **{argument: 5})


def test_a_profile_is_not_asked_for_where_nothing_is_exchanged(tmp_path: Path) -> None:
    source: dict[str, Any] = {"format": "safetensors", "unified_safetensors_dir": GOLDEN / "shards"}
    with pytest.raises(UsageError, match=r"hardware is for loads into a network, and there is none \(save mode\)"):
        ms_ckpt_ext.load_distributed_checkpoint(
            None, None, None, GOLDEN / "strategy.ckpt", **source, dst_safetensors_dir=tmp_path / "out", hardware="cpu"
        )
    assert not (tmp_path / "out").exists()
