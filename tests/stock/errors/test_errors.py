"""What stock MindSpore raises is what this package raises too: the same built-in error, under a class of its own.

Every `raise` statement of the installed MindSpore's functions of the family is tried, but for those with a reason.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import pickle
import warnings
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple, Optional

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors
from tests.stock.errors.wrong_calls import CALLS
from tests.stock.errors.wrong_places import Places, places

pytestmark = pytest.mark.stock

PARALLEL = ("checkpoint_transform", "transform_safetensors", "_parallel_serialization")
SERIALIZATION = {
    "_check_file",
    "_check_load_checkpoint_unsupported_param",
    "_check_prefix",
    "_convert_checkpoint_file",
    "_gather_all_tasks",
    "_load_ckpt_into_param_dict",
    "_load_safetensors_into_param_dict",
    "_parse_ckpt_proto",
    "load_checkpoint",
}
"""Functions of `mindspore.train.serialization` that the family calls."""
NOT_OURS = {"set_op_strategy_config", "sync_pipeline_shared_parameters", "transform_safetensors_by_rank"} | {
    "transform_safetensors_by_stage"
}

UNTRIED = {
    ("_apply_sf_obj_transform_operators", "operator in the same level"): "no input leads there",
    ("_apply_sf_obj_transform_operators", "checkpoint file of rank"): "no input leads there",
    ("_check_checkpoint_file_size", ""): "a lack of memory",
    ("_check_file", "BytesIO"): "contents in memory are stock's",
    ("_check_load_checkpoint_unsupported_param", ""): "encrypted safetensors are read here",
    ("_convert_to_layout", ""): "no input leads there",
    ("_extract_src_dst_layout_map_by_src", ""): "a strategy without operators is read here",
    ("_find_remove_redundancy_rank_id", ""): "raised in a child process, where nobody sees it",
    ("_gather_all_tasks", "error args"): "no input leads there",
    ("_load_ckpt_into_param_dict", ""): "only after MindSpore's own parser passed the file",
    ("_make_dir", "non-blank"): "a name of blanks is a name",
    ("_make_dir", "too long"): "the file system says what is too long",
    ("_make_dir", "No write permission"): "whoever runs the tests may be allowed to write anywhere",
    ("_merge_param_with_strategy", "param_split_shape length"): "tried: a list of another length",
    ("_parse_ckpt_proto", "err_info"): "a lack of memory",
    ("_restore_group_info_list", ""): "never raised: stock gives an empty list",
    ("_save_file_atomically", ""): "the error of another",
    ("_split_protobuf_strategy", ""): "a strategy without operators is read here",
    ("_transform_parallel_safetensor", "None of the parameters"): "no input leads there",
    ("_transform_parallel_safetensor", "The param"): "files that another rank's are merged from are enough here",
    ("dtype", "bfloat16"): "numpy of another version",
    ("load_checkpoint", "AITurbo"): "another store",
    ("load_distributed_checkpoint", "opt shard slice"): "needs communication groups",
    ("load_distributed_checkpoint", "strict_load and dec_mode"): "taken here",
    ("rank_list_for_transform", "is empty"): "an empty strategy fails before",
    ("_transform_checkpoint_by_stage", ""): "files are listed just before",
    ("transform_checkpoints", "output_format"): "taken here: .ckpt becomes safetensors",
    ("transform_checkpoints", "is not a directory"): "what is none is refused before, as empty",
}
"""(Function, part of the statement) -> why no call here leads there."""


class Statement(NamedTuple):
    """A `raise` in MindSpore's code."""

    module: str
    function: str
    lines: range
    text: str


@pytest.fixture(scope="module")
def held(ms: Any, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return places(tmp_path_factory.mktemp("wrong"))


class Raised(NamedTuple):
    """An error without its frames, which hold files that MindSpore leaves open."""

    builtin: type[BaseException]
    text: str
    lines: frozenset[tuple[str, int]]
    """(Module, line) of every place that it, and those before it, came through."""


def caught(call: Any, package: Any, held: Places) -> Optional[Exception]:
    try:
        call(package, held)
    except Exception as error:
        return error
    return None


def raised(error: BaseException) -> Raised:
    builtin = next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")
    text, lines, before = str(error), set(), error
    while before is not None:
        lines |= {(frame.f_globals.get("__name__", ""), line) for frame, line in walk_tb(before.__traceback__)}
        before = before.__cause__ or before.__context__  # type: ignore[assignment]
    return Raised(builtin, text, frozenset(lines))


@pytest.fixture(scope="module")
def stock(ms: Any, held: Places) -> dict[str, Raised]:
    """What is wrong -> what stock raises."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files open
        for title, call in CALLS.items():
            error = caught(call, ms, held)
            assert error is not None, title
            found[title] = raised(error)
            del error
        gc.collect()
    return found


@pytest.mark.parametrize("title", CALLS)
def test_the_same_built_in_error(title: str, stock: dict[str, Raised], held: Places) -> None:
    ours = caught(CALLS[title], ms_ckpt_ext, held)
    assert isinstance(ours, errors.CheckpointError) or title == "load_checkpoint into what does not fit", ours
    assert isinstance(ours, stock[title].builtin), (stock[title], ours)


def statements() -> set[Statement]:
    found = set()
    modules = [f"mindspore.parallel.{name}" for name in PARALLEL]
    for name in (*modules, "mindspore.train.serialization"):
        tree = ast.parse(inspect.getsource(importlib.import_module(name)))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            if function.name not in NOT_OURS and (name in modules or function.name in SERIALIZATION):
                raised = [node for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
                found |= {
                    Statement(name, function.name, range(node.lineno, (node.end_lineno or 0) + 1), ast.unparse(node))
                    for node in raised
                }
    return found


def test_every_raise_is_tried(stock: dict[str, Raised]) -> None:
    lines = frozenset().union(*(error.lines for error in stock.values()))
    untried = {s for s in statements() if not any((s.module, line) in lines for line in s.lines)}
    unknown = {s for s in untried if not any(s.function == f and part in s.text for f, part in UNTRIED)}
    assert sorted((s.function, s.text) for s in unknown) == []
    assert len(statements()) - len(untried) > 60


def test_classes_for_every_pair_can_be_sent() -> None:
    """To other processes, as errors of pools are."""
    pairs = [(kind, builtin_) for kind, builtins in errors._ALSO.items() for builtin_ in builtins]
    assert len(pairs) == len(set(pairs)) >= 15
    for kind, builtin_ in pairs:
        made = errors.also(kind, builtin_)
        assert issubclass(made, kind) and issubclass(made, builtin_)
        error = made(2, "told") if issubclass(kind, errors.StorageError) else made("told")
        sent = pickle.loads(pickle.dumps(error))
        assert (str(sent), isinstance(sent, made)) == ("told", True)
    assert errors.also(errors.CoverageError, TypeError) is errors.CoverageError


@pytest.mark.parametrize("kind", [errors.StorageError, errors.ReadError])
@pytest.mark.parametrize(("number", "builtin_"), [*errors._OF_ERRNO.items()])
def test_the_number_makes_the_class(number: Any, builtin_: type[OSError], kind: type[errors.StorageError]) -> None:
    error = errors.storage_error("read", str(Path("x")), OSError(number, ""), kind)
    assert isinstance(error, kind) and isinstance(error, builtin_) and error.errno == number
    assert isinstance(errors.storage_error("write", "x", OSError(28, "")), errors.StorageError)
