"""MindSpore's names for our functions: all of them, and back."""

from __future__ import annotations

import inspect
import io
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore
import mindspore.parallel
import mindspore.parallel.checkpoint_convert
import mindspore.parallel.checkpoint_transform
import mindspore.parallel.transform_safetensors
import mindspore.train.serialization
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.api.mindspore import install as installer
from ms_ckpt_ext.bridge import names
from ms_ckpt_ext.errors import UsageError
from tests.support.checkpoints import read_file, read_merged

STOCK = names.stock_functions(installer.NAMES)
"""Name -> MindSpore's functions of it: what moved to `mindspore.parallel` has a wrapper where it was."""


def references(function: Any) -> set[tuple[str, str]]:
    """(module, attribute) of everything in MindSpore that is this function."""
    loaded = [(name, module) for name, module in list(sys.modules.items()) if name.split(".")[0] == "mindspore"]
    held = ((name, key, value) for name, module in loaded for key, value in list(vars(module).items()))
    return {(name, key) for name, key, value in held if value is function}


ALIASES = {function: references(function) for functions in STOCK.values() for function in functions}


def test_the_names_that_are_known() -> None:
    """As of MindSpore 2.10; an alias under another name, and one in a module of its own, are among them."""
    assert set(installer.NAMES) >= {"unified_safetensors", "load_distributed_checkpoint", "transform_checkpoints"}
    new, old = STOCK["load_distributed_checkpoint"]
    assert ALIASES[new] >= {
        ("mindspore", "load_distributed_checkpoint"),
        ("mindspore.parallel", "load_distributed_checkpoint"),
        ("mindspore.parallel.checkpoint_transform", "load_distributed_checkpoint"),
        ("mindspore.train.serialization", "new_load_distributed_checkpoint"),
    }
    assert ALIASES[old] == {
        ("mindspore.train", "load_distributed_checkpoint"),
        ("mindspore.train.serialization", "load_distributed_checkpoint"),
    }
    (transform,), (convert,) = STOCK["transform_checkpoints"], STOCK["ckpt_to_safetensors"]
    assert ("mindspore.parallel.checkpoint_convert", "transform_checkpoints") in ALIASES[transform]
    assert ("mindspore.train.serialization", "ckpt_to_safetensors") in ALIASES[convert]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    yield
    ms_ckpt_ext.uninstall()
    assert names.stock_functions(installer.NAMES) == STOCK


def replaced() -> list[str]:
    now = names.stock_functions(installer.NAMES)
    return [name for name in installer.NAMES if now[name] != STOCK[name]]


def test_every_alias_is_replaced_and_given_back() -> None:
    assert ms_ckpt_ext.install() == installer.NAMES
    for name, functions in STOCK.items():
        for stock, ours in zip(functions, names.stock_functions([name])[name]):
            assert ours.__wrapped__ is getattr(ms_ckpt_ext, name) and ours is not stock
            assert references(ours) == ALIASES[stock] and references(stock) == set()
    ms_ckpt_ext.uninstall()
    assert {stock: references(stock) for stock in ALIASES} == ALIASES


def test_twice_is_once_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ms_ckpt_ext"):
        ms_ckpt_ext.install()
        first = mindspore.unified_safetensors
        ms_ckpt_ext.install()
    assert mindspore.unified_safetensors is first
    assert len([r for r in caplog.records if "serves" in r.message]) == 1
    ms_ckpt_ext.uninstall()
    ms_ckpt_ext.uninstall()


def test_the_last_call_says_what_is_replaced() -> None:
    assert ms_ckpt_ext.install(only=["unified_safetensors"]) == ("unified_safetensors",) == tuple(replaced())
    some = ("unified_safetensors", "transform_checkpoints")
    assert set(ms_ckpt_ext.install(only=iter(some))) == set(some) == set(replaced())
    assert ms_ckpt_ext.install(skip=["unified_safetensors"]) == tuple(replaced())
    assert "unified_safetensors" not in replaced() and "load_distributed_checkpoint" in replaced()
    ms_ckpt_ext.uninstall(["load_distributed_checkpoint"])
    assert "load_distributed_checkpoint" not in replaced() and "merge_pipeline_strategys" in replaced()


@pytest.mark.parametrize(
    ("text", "kept"), [("unified_safetensors", ["unified_safetensors"]), ("all", list(installer.NAMES)), (" ", [])]
)
def test_the_environment_keeps_functions_stock(text: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_CKPT_EXT_STOCK", text)
    ms_ckpt_ext.install()
    assert [name for name in installer.NAMES if name not in replaced()] == kept


@pytest.mark.parametrize("how", ["only", "skip", "environment"])
def test_unknown_names_are_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_CKPT_EXT_STOCK", "merge" if how == "environment" else "")
    with pytest.raises(UsageError, match="'merge'.*unified_safetensors"):
        ms_ckpt_ext.install(**({} if how == "environment" else {how: ["merge"]}))
    assert replaced() == []


def test_modules_that_imported_a_name_before(monkeypatch: pytest.MonkeyPatch) -> None:
    user: Any = types.ModuleType("user_code")
    user.merge, user.same_name = mindspore.unified_safetensors, 1
    monkeypatch.setitem(sys.modules, "user_code", user)
    ms_ckpt_ext.install(everywhere=False)
    assert (user.merge,) == STOCK["unified_safetensors"]
    ms_ckpt_ext.uninstall()
    ms_ckpt_ext.install()
    assert user.merge is mindspore.unified_safetensors is not STOCK["unified_safetensors"][0]
    later: Any = types.ModuleType("imported_later")
    later.merge = mindspore.unified_safetensors
    monkeypatch.setitem(sys.modules, "imported_later", later)
    ms_ckpt_ext.uninstall()
    assert (user.merge,) == (later.merge,) == STOCK["unified_safetensors"]


def test_a_call_through_mindspore_is_ours(golden: Path, tmp_path: Path) -> None:
    ms_ckpt_ext.install()
    case = golden / "dp2_tp4_zero"
    report = mindspore.unified_safetensors(str(case / "shards"), str(case / "strategy.ckpt"), str(tmp_path / "out"))
    assert report.published
    assert read_merged(tmp_path / "out")[0] == read_file(golden / "full" / "model.safetensors")


def test_a_function_that_was_handed_out_turns_stock_with_uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = spy(monkeypatch)
    ms_ckpt_ext.install()
    kept = mindspore.load_distributed_checkpoint
    ms_ckpt_ext.uninstall()
    assert kept("network", format="ckpt") == "stock"
    assert stock == [(("network",), {"format": "ckpt"})]
    monkeypatch.undo()


def spy(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """A stock function of a newer release: it has one more argument, and calls another stock function."""
    calls: list[tuple[Any, Any]] = []

    def load_distributed_checkpoint(network: Any, format: str = "ckpt", shiny: Any = None) -> str:
        named = {"format": format, "shiny": shiny}
        calls.append(((network,), {key: value for key, value in named.items() if value is not None}))
        if shiny:
            mindspore.merge_pipeline_strategys("no such directory", "nowhere")
        return "stock"

    monkeypatch.setattr(mindspore, "load_distributed_checkpoint", load_distributed_checkpoint)
    return calls


def test_what_only_stock_takes_goes_to_stock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    inner: list[Any] = []
    monkeypatch.setattr(mindspore, "merge_pipeline_strategys", lambda *args: inner.append(args))
    calls = spy(monkeypatch)
    ms_ckpt_ext.install()
    assert mindspore.load_distributed_checkpoint("network", shiny=1) == "stock"
    assert calls == [(("network",), {"format": "ckpt", "shiny": 1})]
    assert inner == [("no such directory", "nowhere")], "what stock calls meanwhile is stock too"
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "mindspore.load_distributed_checkpoint" in warning and "shiny" in warning
    ms_ckpt_ext.uninstall()
    monkeypatch.undo()


def test_a_value_that_ours_refuses_goes_to_stock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Any] = []
    held = io.BytesIO()

    def load_checkpoint(ckpt_file_name: Any, net: Any = None, *, format: str = "ckpt") -> str:
        calls.append((ckpt_file_name, net, format))
        return "stock"

    monkeypatch.setattr(mindspore, "load_checkpoint", load_checkpoint)
    ms_ckpt_ext.install()
    assert mindspore.load_checkpoint(held, format="strange", verify="full") == "stock"
    assert calls == [(held, None, "strange")]
    assert "ckpt_file_name" in caplog.text and "mindspore.load_checkpoint" in caplog.text
    ms_ckpt_ext.uninstall()
    monkeypatch.undo()


def test_wrong_arguments_are_our_errors() -> None:
    ms_ckpt_ext.install()
    with pytest.raises(TypeError, match="no_such"):
        mindspore.unified_safetensors("a", None, "b", no_such=1)
    with pytest.raises(UsageError, match="max_process_num"):
        mindspore.unified_safetensors("a", None, "b", max_process_num=0)


def test_many_threads() -> None:
    go = threading.Barrier(8)

    def work(number: int) -> None:
        go.wait()
        for _ in range(20):
            ms_ckpt_ext.install() if number % 2 else ms_ckpt_ext.uninstall()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ms_ckpt_ext.install()) == set(replaced())
    ms_ckpt_ext.uninstall()
    assert replaced() == []


def test_importing_does_not_install_and_needs_no_mindspore() -> None:
    code = "import sys, ms_ckpt_ext; ms_ckpt_ext.uninstall(); sys.exit('mindspore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", installer.NAMES)
def test_what_stock_takes_by_place_or_name_ours_takes_too(name: str) -> None:
    """Arguments in MindSpore's order, with its defaults; ours has more, by keyword only."""
    theirs = list(inspect.signature(STOCK[name][0]).parameters.values())
    ours = list(inspect.signature(getattr(ms_ckpt_ext, name)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
