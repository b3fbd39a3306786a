"""A network served without the wrapper it was trained in: every way that fills one, beside stock MindSpore."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, LayoutMismatchError, UsageError
from tests.support.checkpoints import cut, strategy_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
Stored = dict[str, Any]
KEPT = np.full(3, -7, np.float32)


class Network(nn.Cell):
    """Three Parameters in two Cells, all of value -7, and one of float16 beside them."""

    def __init__(self, names: str = "d.w d.b e.w s", dtypes: str = "float32 float32 float32 float16") -> None:
        super().__init__()
        for number, (name, dtype) in enumerate(zip(names.split(), dtypes.split())):
            data = ms.Tensor(KEPT, getattr(ms, dtype))
            self.insert_param_to_cell(f"p{number}", ms.Parameter(data, name=name))

    @property
    def held(self) -> dict[str, float]:
        return {p.name: float(p.asnumpy().astype(np.float32)[0]) for p in self.get_parameters()}


def write(path: Path, **values: float) -> None:
    """A file of arrays of three equal numbers; `__` in a name stands for a dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [{"name": n.replace("__", "."), "data": ms.Tensor(np.full(3, v, np.float32))} for n, v in values.items()]
    ms.save_checkpoint(listed, str(path), format=path.suffix[1:])


def load_direct(network: nn.Cell, path: Path, mode: str = "direct") -> Any:
    return ms_ckpt_ext.load_distributed_checkpoint(
        network, format=path.suffix[1:], unified_safetensors_dir=path.parent, mode=mode
    )


WAYS: dict[str, Callable[[nn.Cell, Path], Any]] = {
    "direct": load_direct,
    "cooperative": lambda network, path: load_direct(network, path, "cooperative"),
    "inference": lambda network, path: ms_ckpt_ext.load_for_inference(network, path.parent, allow_missing=True),
    "resume": lambda network, path: ms_ckpt_ext.resume(
        network, None, path.parent, strict_load=False, allow_missing=True, mode="cooperative"
    ),
    "load_checkpoint": lambda network, path: ms_ckpt_ext.load_checkpoint(path, network, format=path.suffix[1:]),
}
every_way = pytest.mark.parametrize("way", WAYS)
every_format = pytest.mark.parametrize("form", ["ckpt", "safetensors"])


def stock(path: Path, network: Network) -> Network:
    ms.load_param_into_net(network, ms.load_checkpoint(str(path), format=path.suffix[1:]))
    return network


@every_way
@every_format
@pytest.mark.parametrize("state", ["adam_m", "moments", "zeta"])
def test_weights_and_not_their_states(way: str, form: str, state: str, tmp_path: Path) -> None:
    """safetensors has names in order, so that stock meets `adam_m.net.d.w` before `net.d.w`."""
    path = tmp_path / f"net-1_1.{form}"
    weights = {"net__d__w": 1.0, "net__d__b": 2.0, "net__e__w": 3.0, "net__s": 4.0}
    write(path, **{f"{state}__{name}": 9.0 for name in weights}, **weights)
    network = Network()
    WAYS[way](network, path)
    assert network.held == {"d.w": 1.0, "d.b": 2.0, "e.w": 3.0, "s": 4.0}


@every_way
@every_format
def test_a_lost_weight_keeps_its_value(way: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"net-1_1.{form}"
    write(path, net__d__w=1.0, net__d__b=2.0, net__s=4.0, adam_m__net__e__w=9.0, zeta__net__d__w=9.0, x__y=1.0)
    network = Network()
    WAYS[way](network, path)
    assert network.held == {"d.w": 1.0, "d.b": 2.0, "e.w": -7.0, "s": 4.0}


@pytest.mark.parametrize("way", ["direct", "cooperative"])
def test_the_log_says_why_a_weight_got_nothing(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "net.ckpt", d__w=1.0, d__b=2.0, s=3.0, adam_m__e__w=9.0)
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        assert WAYS[way](Network(), tmp_path / "net.ckpt") == (["e.w"], ["adam_m.e.w"])
    assert "not loaded: ['e.w'] ('adam_m.e.w' is no 'e.w'" in caplog.text


def test_a_lost_weight_is_an_error_where_all_are_needed(tmp_path: Path) -> None:
    write(tmp_path / "net-1_1.ckpt", d__w=1.0, d__b=2.0, s=3.0, adam_m__e__w=9.0)
    network = Network()
    with pytest.raises(LayoutMismatchError, match=r"'adam_m.e.w' is no 'e.w'"):
        ms_ckpt_ext.load_for_inference(network, tmp_path)
    assert set(network.held.values()) == {-7.0}


@pytest.mark.parametrize("way", ["direct", "cooperative", "inference"])
@pytest.mark.parametrize("other", ["zeta__net__d__b", "text__d__b"])
def test_what_a_map_lists_and_no_file_has_is_no_other_ones(way: str, other: str, tmp_path: Path) -> None:
    write(tmp_path / "part0.safetensors", net__d__w=1.0, net__e__w=2.0, **{other: 9.0})
    write(tmp_path / "part1.safetensors", x=1.0)
    parts = {"net.d.w": 0, "net.e.w": 0, "net.d.b": 0, other.replace("__", "."): 0, "x": 1}
    named = {name: f"part{number}.safetensors" for name, number in parts.items()}
    (tmp_path / "param_name_map.json").write_text(json.dumps(named))
    network = Network("d.w e.w d.b", "float32 float32 float32")
    with pytest.raises((CoverageError, DiscoveryError), match=r"'net.d.b' should be in .*part0.safetensors"):
        WAYS[way](network, tmp_path / "part0.safetensors")
    assert set(network.held.values()) == {-7.0}


@every_way
@every_format
def test_two_towers_are_an_error_that_names_the_parameter(way: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"net-1_1.{form}"
    names = ["d__w", "d__b", "e__w", "s"]
    write(path, **{f"{tower}__{name}": 1.0 for tower in ("audio", "text") for name in names})
    network = Network()
    with pytest.raises(LayoutMismatchError, match=r"no parameter 'd.w' but several .* 'audio.d.w', 'text.d.w'"):
        WAYS[way](network, path)
    assert set(network.held.values()) == {-7.0}


@pytest.mark.parametrize("way", ["direct", "inference", "load_checkpoint"])
def test_and_can_be_told_apart(way: str, tmp_path: Path) -> None:
    path = tmp_path / "net-1_1.safetensors"
    write(path, **{f"{tower}__{name}": v for tower, v in (("a", 1.0), ("b", 2.0)) for name in ("d__w", "d__b", "s")})
    network = Network("d.w d.b s")
    telling: dict[str, Callable[[dict[str, Any]], Any]] = {
        "direct": lambda more: ms_ckpt_ext.load_distributed_checkpoint(
            network, format="safetensors", unified_safetensors_dir=tmp_path, **more
        ),
        "inference": lambda more: ms_ckpt_ext.load_for_inference(network, tmp_path, **more),
        "load_checkpoint": lambda more: ms_ckpt_ext.load_checkpoint(path, network, format="safetensors", **more),
    }
    telling[way]({"choice_func": lambda name: not name.startswith("a.")})
    assert set(network.held.values()) == {2.0}
    telling[way]({"name_map": {name: f"a.{name}" for name in network.held}})
    assert set(network.held.values()) == {1.0}


@every_way
def test_a_prefix_ends_with_a_dot(way: str, tmp_path: Path) -> None:
    path = tmp_path / "net-1_1.safetensors"
    write(path, block__10__w=9.0, block__0__w=1.0, xs=9.0)
    network = Network("0.w s", "float32 float32")
    WAYS[way](network, path)
    assert network.held == {"0.w": 1.0, "s": -7.0}


@pytest.mark.parametrize("way", ["direct", "cooperative"])
def test_what_a_suffix_found_is_used_and_told_once(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "net.safetensors"
    write(path, net__d__w=1.0, net__d__b=2.0, net__e__w=3.0, net__s=4.0, adam_m__net__d__w=9.0)
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        assert WAYS[way](Network(), path) == ([], ["adam_m.net.d.w"])
    told = [line for line in caplog.messages if "end as theirs" in line]
    assert told == [
        "4 parameters are loaded from names that end as theirs do, behind 'net.' (4): 'd.w' from 'net.d.w', and so on"
    ]


def test_a_resume_has_used_them_too(tmp_path: Path) -> None:
    write(tmp_path / "net-1_1.safetensors", net__d__w=1.0, net__d__b=2.0, net__e__w=3.0, net__s=4.0, other=5.0)
    state = ms_ckpt_ext.resume(Network(), None, tmp_path, strict_load=False)
    assert (state.not_loaded, state.unused) == ((), ("other",))
    with pytest.raises(LayoutMismatchError, match="nothing for 4 parameters"):
        ms_ckpt_ext.resume(Network(), None, tmp_path)


@every_way
@every_format
@pytest.mark.parametrize(
    "stored",
    [
        {"d__w": 1.0, "d__b": 2.0, "e__w": 3.0, "s": 4.0, "adam_m__d__w": 9.0},
        {"net__d__w": 1.0, "net__d__b": 2.0, "net__e__w": 3.0, "net__s": 4.0, "loss__scale": 9.0},
        {"x__y__d__w": 1.0, "x__y__d__b": 2.0, "x__y__e__w": 3.0, "x__y__s": 4.0},
        {"d__w": 1.0, "d__b": 2.0, "wrapped__e__w": 3.0, "s": 4.0},
        {"g__d__w": 1.0, "g__d__b": 2.0, "h__e__w": 3.0, "k__s": 4.0},
        {"net__d__w": 1.0, "net__d__b": 2.0, "net__s": 4.0, "net__lost__x": 9.0},
    ],
)
def test_where_names_have_one_reading_stock_does_the_same(way: str, form: str, stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / f"net-1_1.{form}"
    write(path, **stored)
    ours, theirs = Network(), stock(path, Network())
    WAYS[way](ours, path)
    assert ours.held == theirs.held


@pytest.mark.parametrize("way", ["direct", "load_checkpoint"])
def test_what_a_map_gives_another_name_makes_no_group(way: str, tmp_path: Path) -> None:
    """`d.w` is `old.d.w` itself, so `old.` holds no states, and its other names are as good as ever."""
    write(tmp_path / "net.ckpt", old__d__w=1.0, old__d__b=2.0, old__e__w=3.0)
    network, names = Network("d.w d.b e.w", "float32 float32 float32"), {"d.w": "old.d.w"}
    if way == "direct":
        ms_ckpt_ext.load_distributed_checkpoint(
            network, format="ckpt", unified_safetensors_dir=tmp_path, name_map=names, mode="direct"
        )
    else:
        ms_ckpt_ext.load_checkpoint(tmp_path / "net.ckpt", network, name_map=names)
    assert network.held == {"d.w": 1.0, "d.b": 2.0, "e.w": 3.0}


def test_segments_are_matched_together(tmp_path: Path) -> None:
    """Weights in one file, states in another, which stock takes in the order of the directory."""
    write(tmp_path / "a.ckpt", adam_m__net__d__w=9.0, adam_m__net__d__b=9.0, net__e__w=3.0)
    write(tmp_path / "b.ckpt", net__d__w=1.0, net__d__b=2.0, net__s=4.0)
    network = Network()
    ms_ckpt_ext.load_segmented_checkpoints(tmp_path, network)
    assert network.held == {"d.w": 1.0, "d.b": 2.0, "e.w": 3.0, "s": 4.0}


WHOLE = {"net.d.w": np.arange(24, dtype=np.float32).reshape(4, 6), "net.d.b": np.arange(4, dtype=np.float32)}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks trained the network in a wrapper, cut by columns; two serve it alone, cut by rows."""
    root = tmp_path_factory.mktemp("halves")
    columns = {"net.d.w": Layout((2, 2), ((), (0,))), "net.d.b": Layout((2, 2), ((1,),))}
    trained = strategy_of({f"{p}{n}": each for p in ("", "adam_m.") for n, each in columns.items()}, root / "t.ckpt")
    cut(trained, {**WHOLE, **{f"adam_m.{name}": -array for name, array in WHOLE.items()}}, root / "shards")
    ms_ckpt_ext.unified_safetensors(root / "shards", root / "t.ckpt", root / "merged")
    strategy_of({"d.w": Layout((2,), ((0,), ())), "d.b": Layout((2,), ((0,),))}, root / "p.ckpt")
    strategy_of({"x.y": Layout((2,), ((0,), ()))}, root / "other.ckpt")
    return root


def served(rows: int = 2) -> nn.Cell:
    cell = nn.Cell()
    for name, shape in (("d.w", (rows, 6)), ("d.b", (rows,))):
        parameter = ms.Parameter(ms.Tensor(np.full(shape, -7, np.float32)), name=name)
        cell.insert_param_to_cell(name.replace(".", ""), parameter, False)
    return cell


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize("source", ["shards", "merged"])
@pytest.mark.parametrize("rows", [2, 4])
def test_a_layout_is_that_of_the_name_in_the_network(mode: str, source: str, rows: int, halves: Path) -> None:
    """Sliced already or not: the rows that `predict_strategy` gives this rank of the network's own names."""
    trained = {"train_strategy_filename": halves / "t.ckpt"} if source == "shards" else {}
    for load in (
        lambda cell: ms_ckpt_ext.load_for_inference(
            cell, halves / source, predict_strategy=halves / "p.ckpt", mode=mode, **trained
        ),
        lambda cell: ms_ckpt_ext.load_distributed_checkpoint(
            cell, None, halves / "p.ckpt", format="safetensors", unified_safetensors_dir=halves / source, mode=mode,
            **trained,
        ),
    ):  # fmt: skip
        cell = served(rows)
        load(cell)
        held = {name: parameter.asnumpy().tobytes() for name, parameter in cell.parameters_dict().items()}
        assert held == {name: WHOLE[f"net.{name}"][:2].tobytes() for name in ("d.w", "d.b")}


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_a_strategy_of_another_model_is_an_error_still(mode: str, halves: Path) -> None:
    with pytest.raises(UsageError, match="gives rank 0 no parameter that the checkpoint holds"):
        ms_ckpt_ext.load_distributed_checkpoint(
            served(), None, halves / "other.ckpt", format="safetensors", unified_safetensors_dir=halves / "merged",
            mode=mode,
        )  # fmt: skip


def test_a_cast_that_mindspore_does_not_make_is_its_error(tmp_path: Path) -> None:
    write(tmp_path / "net.ckpt", net__s=1.0)
    for load in (ms_ckpt_ext.load_checkpoint, ms.load_checkpoint):
        with pytest.raises(RuntimeError, match="should have the same type"):
            load(str(tmp_path / "net.ckpt"), Network("s", "int32"))
