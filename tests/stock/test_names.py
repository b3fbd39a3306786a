"""`choice_func` and `name_map` mean the same in every function that takes them."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import convert, load_distributed_checkpoint
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import DiscoveryError, UsageError
from tests.support.checkpoints import read_file, strategy_of

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
HELD = {"emb": 1.0, "adam_m.emb": 99.0, "w": 2.0}
MAPS: list[tuple[dict[str, str], dict[str, float]]] = [
    ({"w": "emb"}, {"w": 1.0, "emb": 1.0}),
    ({"lm_head": "emb"}, {"lm_head": 1.0, "emb": 1.0, "w": 2.0}),
    ({"a": "emb", "b": "emb"}, {"a": 1.0, "b": 1.0, "emb": 1.0}),
    ({"w": "emb", "emb": "w"}, {"w": 1.0, "emb": 2.0}),
    ({"a": "nothing"}, {"emb": 1.0}),
]
"""Name maps, and what the names of a network hold under each."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One safetensors file and the same as `.ckpt`."""
    from safetensors.numpy import save_file

    (tmp_path / "held").mkdir()
    save_file({n: np.full(4, v, np.float32) for n, v in HELD.items()}, tmp_path / "held" / "x.safetensors")
    convert(tmp_path / "held", tmp_path / "ckpt", to="ckpt", digests=False)
    return tmp_path


def network(ms: Any, names: Any) -> Any:
    cell = ms.nn.Cell()
    for number, name in enumerate(names):
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(ms.Tensor(np.full(4, 77.0, np.float32)), name=name), False)
    return cell


def of(cell: Any) -> dict[str, float]:
    return {p.name: float(p.asnumpy()[0]) for p in cell.get_parameters()}


def whole(names: Any, path: Path) -> Path:
    strategy_of({name: Layout((1,), ((),)) for name in names}, path)
    return path


@pytest.mark.parametrize("with_strategy", [False, True])
@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize(("names", "expected"), MAPS, ids=str)
def test_a_network_gets_what_the_map_says(
    names: dict[str, str], expected: dict[str, float], mode: str, with_strategy: bool, ms: Any, source: Path
) -> None:
    cell = network(ms, expected)
    strategy = whole(expected, source / "t.ckpt") if with_strategy else None
    missing, unused = load_distributed_checkpoint(
        cell, [source / "ckpt" / "x.ckpt"], strategy, strict_load=True, name_map=names, mode=mode
    )
    assert of(cell) == expected and missing == []
    if not with_strategy:
        values = {HELD[name] for name in unused if name in HELD}
        assert values.isdisjoint(expected.values())


@pytest.mark.parametrize("with_strategy", [False, True])
@pytest.mark.parametrize(("names", "expected"), MAPS, ids=str)
def test_dictionaries_and_files_too(
    names: dict[str, str], expected: dict[str, float], with_strategy: bool, ms: Any, source: Path
) -> None:
    strategy = whole(expected, source / "t.ckpt") if with_strategy else None
    files = [source / "ckpt" / "x.ckpt"]
    found = load_distributed_checkpoint(network(ms, expected), files, strategy, name_map=names, return_param_dict=True)
    assert {name: float(found[name].asnumpy()[0]) for name in expected} == expected
    load_distributed_checkpoint(None, files, strategy, name_map=names, dst_safetensors_dir=source / "out")
    written = read_file(source / "out" / "rank_0" / "net.safetensors")
    assert {name: np.frombuffer(written[name].data, "f4")[0] for name in expected} == expected


def test_as_stock_has_it(ms: Any, source: Path) -> None:
    answers = {}
    for who, load in (("stock", ms.load_distributed_checkpoint), ("ours", load_distributed_checkpoint)):
        cell = network(ms, ["w"])
        load(cell, format="safetensors", unified_safetensors_dir=str(source / "held"), name_map={"w": "emb"})
        answers[who] = of(cell)
    assert answers["ours"] == answers["stock"] == {"w": 1.0}


def test_a_missing_source_is_told_and_gives_nothing(ms: Any, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    cell = network(ms, ["w"])
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        missing, _ = load_distributed_checkpoint(
            cell, [source / "ckpt" / "x.ckpt"], name_map={"w": "W"}, strict_load=True, mode="direct"
        )
    assert missing == ["w"] and of(cell) == {"w": 77.0}
    assert "name_map speaks of parameters that the checkpoint does not hold: ['W']" in caplog.text


CHOICE = {"emb": "e", "w": True, "adam_m.emb": False}
RENAMED = {"e": 1.0, "w": 2.0, "t": 1.0}


def through(ms: Any, source: Path, names: dict[str, str]) -> dict[str, Any]:
    """Every function that takes both arguments -> what it made of the file."""
    file, folder, out = source / "ckpt" / "x.ckpt", source / "ckpt", source / "out"
    both: dict[str, Any] = {"choice_func": CHOICE.__getitem__, "name_map": names}

    def merged(target: Path) -> dict[str, Any]:
        return {n: np.frombuffer(t.data, "f4") for n, t in read_file(target / "part0.safetensors").items()}

    def cut(target: Path) -> dict[str, Any]:
        return {n: np.frombuffer(t.data, "f4") for n, t in read_file(target / "net.safetensors").items()}

    ranks = source / "ranks" / "rank_0"
    ranks.mkdir(parents=True)
    (ranks / "x.ckpt").write_bytes(file.read_bytes())
    ms_ckpt_ext.merge(file, out / "merge", choice_func=CHOICE.__getitem__, name_map=names, digests=False)
    ms_ckpt_ext.unified_safetensors(ranks.parent, None, out / "unified", **both)
    ms_ckpt_ext.reshard(file, out / "reshard", digests=False, **both)
    load_distributed_checkpoint(None, [file], dst_safetensors_dir=out / "save", **both)
    ms_ckpt_ext.transform_checkpoints(ranks.parent, out / "transform", "net", output_format="safetensors", **both)
    one = out / "one" / "net.safetensors"
    ms_ckpt_ext.transform_checkpoint_by_rank(0, {0: ranks / "x.ckpt"}, one, **both)
    (out / "transform" / "rank_0" / "net0.safetensors").rename(out / "transform" / "net.safetensors")
    assert not (out / "merge" / "ms_ckpt_ext.digests.json").exists()
    cells = {mode: network(ms, RENAMED) for mode in ("direct", "cooperative")}
    for mode, cell in cells.items():
        assert load_distributed_checkpoint(cell, [file], mode=mode, strict_load=True, **both) == ([], [])
    return {
        "load": ms_ckpt_ext.load(file, **both).arrays(),
        "load_checkpoint": {n: p.asnumpy() for n, p in ms_ckpt_ext.load_checkpoint(file, **both).items()},
        "segmented": {n: p.asnumpy() for n, p in ms_ckpt_ext.load_segmented_checkpoints(folder, **both).items()},
        "merge": merged(out / "merge"),
        "unified": merged(out / "unified"),
        "reshard": cut(out / "reshard" / "rank_0"),
        "save": cut(out / "save" / "rank_0"),
        "transform": cut(out / "transform"),
        "by rank": cut(out / "one"),
        **{mode: {p.name: p.asnumpy() for p in cell.get_parameters()} for mode, cell in cells.items()},
    }


def test_every_function_reads_both_arguments_alike(ms: Any, source: Path) -> None:
    told = through(ms, source, {"t": "e"})
    assert {who: {n: float(a[0]) for n, a in held.items()} for who, held in told.items()} == dict.fromkeys(
        told, RENAMED
    )


@pytest.mark.parametrize("truth", [re.match("e", "e"), np.bool_(True), 1])
def test_what_is_true_in_stock_is_true_here(truth: Any, ms: Any, source: Path) -> None:
    def choice(name: str) -> Any:
        return truth if name == "emb" else None

    for load, path in (
        (ms_ckpt_ext.load_checkpoint, source / "ckpt" / "x.ckpt"),
        (ms_ckpt_ext.load_segmented_checkpoints, source / "ckpt"),
    ):
        assert set(load(path, choice_func=choice)) == {"emb"}
    assert set(ms.load_checkpoint(str(source / "ckpt" / "x.ckpt"), choice_func=choice)) == {"emb"}


def test_numpys_truth_and_none_count_everywhere(source: Path) -> None:
    """`None` is what a function without a return says; numpy compares to a bool of its own."""

    def choice(name: str) -> Any:
        return np.True_ if name == "emb" else None

    path = source / "ckpt" / "x.ckpt"
    assert set(ms_ckpt_ext.load(path, choice_func=choice)) == {"emb"}
    ms_ckpt_ext.convert(path, source / "chosen", choice_func=choice)
    assert set(ms_ckpt_ext.load(source / "chosen" / "x.ckpt")) == {"emb"}
    ms_ckpt_ext.reshard(path, source / "cut", choice_func=choice)
    assert set(ms_ckpt_ext.load(source / "cut" / "rank_0" / "net.safetensors")) == {"emb"}


def test_nothing_left_is_an_error(source: Path) -> None:
    for name in ("load", "load_checkpoint"):
        with pytest.raises(UsageError, match="dropped every parameter"):
            getattr(ms_ckpt_ext, name)(source / "ckpt" / "x.ckpt", choice_func=lambda _: False)


@pytest.mark.parametrize("more", [{"mode": "direct"}, {"mode": "cooperative"}, {"return_param_dict": True}], ids=str)
def test_a_named_file_that_is_not_there_is_an_error(more: Any, ms: Any, source: Path) -> None:
    files = [source / "ckpt" / "x.ckpt", source / "gone.ckpt"]
    strategy_of({"emb": Layout((2,), ((),)), "w": Layout((2,), ((),))}, source / "trained.ckpt")
    cell = network(ms, ["w"])
    with pytest.raises(DiscoveryError, match=r"the file of rank 1 in checkpoint_filenames.*gone\.ckpt"):
        load_distributed_checkpoint(cell, files, None, source / "trained.ckpt", **more)
    assert of(cell) == {"w": 77.0}
