"""Any subset of MindSpore's functions replaced: what is left runs as if nothing were, and what is replaced is ours."""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import mindspore
import mindspore.parallel
import pytest
from mindspore.train.serialization import load_checkpoint

import ms_ckpt_ext
from ms_ckpt_ext.api.mindspore import install as installer
from tests.support import family

pytestmark = pytest.mark.stock
_THREADED = {"load_checkpoint_async": "load_checkpoint"}
"""A stock function -> what it calls in a thread of its own, where nothing says who started that."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mindspore.set_device("CPU")
    return family.checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def stock(held: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What MindSpore makes of every call."""
    return outcomes(held, tmp_path_factory.mktemp("stock"))


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of this package's functions, as they are called by MindSpore's names."""
    calls: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            calls.append(name)
            return function(*args, **named)

        return call

    for name, home in installer._HOMES.items():
        module = importlib.import_module(f"ms_ckpt_ext.{home}")
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    yield calls
    ms_ckpt_ext.uninstall()


def outcomes(held: Path, out: Path) -> dict[str, Any]:
    return {title: family.told(call(held, out / str(n))) for n, (title, call) in enumerate(family.CALLS.items())}


def test_every_function_is_called() -> None:
    assert {title.split()[0] for title in family.CALLS} == set(installer.NAMES)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, how) for name in installer.NAMES for how in ("only", "skip")),
        ("load_checkpoint", "environment"),
        ("rank_list_for_transform", "environment"),
        ("unified_safetensors", "environment"),
    ],
)
def test_one_and_all_but_one(
    name: str,
    how: str,
    held: Path,
    stock: dict[str, Any],
    entered: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same outcome as MindSpore's alone, contents byte for byte, and of ours exactly the chosen are called."""
    if how == "environment":
        monkeypatch.setenv(installer.STOCK_VARIABLE, ",".join(each for each in installer.NAMES if each != name))
        chosen = ms_ckpt_ext.install()
    else:
        chosen = ms_ckpt_ext.install(**{how: [name]})
    assert set(chosen) == (set(installer.NAMES) - {name} if how == "skip" else {name})
    for number, (title, call) in enumerate(family.CALLS.items()):
        entered.clear()
        assert family.told(call(held, tmp_path / str(number))) == stock[title], title
        asked = title.split()[0]
        expected = {asked} if asked in chosen else {_THREADED[asked]} & {*chosen} if asked in _THREADED else set()
        helper = {"build_searched_strategy"} if asked == "merge_sliced_parameter" else set()  # the call does both
        assert {*entered} - helper == expected, title


def test_all(held: Path, stock: dict[str, Any], entered: list[str], tmp_path: Path) -> None:
    ms_ckpt_ext.install()
    assert outcomes(held, tmp_path) == stock
    assert {*entered} == {*installer.NAMES}


@pytest.mark.parametrize("many", [2, 5, 9])
def test_some(many: int, held: Path, stock: dict[str, Any], tmp_path: Path) -> None:
    """Every many-th, from each beginning."""
    for start in range(0, many, max(1, many // 2)):
        ms_ckpt_ext.install(only=installer.NAMES[start::many])
        assert outcomes(held, tmp_path / str(start)) == stock


def test_by_names_that_were_imported_before(held: Path, entered: list[str]) -> None:
    """`from mindspore.train.serialization import load_checkpoint`, as most code has it, in its own module."""
    ms_ckpt_ext.install()
    assert load_checkpoint(family.rank_files(held, "ckpt")[0])
    assert entered == ["load_checkpoint"]


def test_other_threads_and_processes(held: Path, entered: list[str], stock: dict[str, Any]) -> None:
    """A function that goes to another process is named to it as MindSpore's: where that is ours, it is ours there."""
    ms_ckpt_ext.install()
    files = family.rank_files(held, "ckpt")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(mindspore.load_checkpoint, [files[0], files[0]]))
    assert [family.told(each) for each in found] == [stock["load_checkpoint"]] * 2
    assert entered == ["load_checkpoint"] * 2
    for name in installer.NAMES:
        function = getattr(mindspore, name, None) or getattr(mindspore.parallel, name)
        assert pickle.loads(pickle.dumps(function)) is function


def test_what_a_choice_of_a_stock_call_calls_is_stock(held: Path, entered: list[str]) -> None:
    ms_ckpt_ext.install(skip=["load_segmented_checkpoints"])

    def choice(name: str) -> bool:
        mindspore.load_checkpoint(family.rank_files(held, "ckpt")[0])
        return True

    assert mindspore.load_segmented_checkpoints(str(held / "ckpt" / "rank_0"), choice_func=choice)
    assert entered == []
