"""The rest of the checkpoint family beside MindSpore's own: layouts as messages, slices in memory, ranks, futures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ms_ckpt_ext
from ms_ckpt_ext import errors
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.checkpoints import CASES, strategy_of

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def described(value: Any) -> Any:
    """A Parameter as values; its dtype by name."""
    flags = (value.name, value.requires_grad, value.layerwise_parallel)
    return (*flags, str(value.dtype), tuple(value.shape), value.asnumpy().tobytes())


# --- build_searched_strategy


def as_bytes(messages: dict[str, Any]) -> dict[str, bytes]:
    return {name: message.SerializeToString() for name, message in messages.items()}


@pytest.mark.parametrize("case", CASES)
def test_layouts_are_mindspores_messages(case: str, ms: Any, golden: Path) -> None:
    for path in (golden / case / "strategy.ckpt", *(golden / case / "strategy_stages").iterdir()):
        stock, ours = ms.build_searched_strategy(str(path)), ms_ckpt_ext.build_searched_strategy(path)
        assert list(ours) == list(stock) and as_bytes(ours) == as_bytes(stock)
        assert {type(message) for message in ours.values()} == {type(message) for message in stock.values()}


def test_layouts_of_json(ms: Any, tmp_path: Path) -> None:
    layout = {"field": 0, "opt_weight_shard_size": -1, "opt_weight_shard_step": 4, "param_split_shape": []}
    item = {"dev_matrix": [2, 4], "tensor_map": [0, -1], **layout, "indices_offset": []}
    (tmp_path / "s.json").write_text(json.dumps({"parallel_layout_item": {"0-a.w": item, "1-a.w": item}}))
    stock = ms.build_searched_strategy(str(tmp_path / "s.json"))
    ours = ms_ckpt_ext.build_searched_strategy(tmp_path / "s.json")
    assert ours == stock and as_bytes(ours) == as_bytes(stock)
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "none.ckpt").write_bytes(b"\x08\x02")
    for name in ("none.json", "none.ckpt"):
        assert ms_ckpt_ext.build_searched_strategy(tmp_path / name) == ms.build_searched_strategy(str(tmp_path / name))
    assert ms_ckpt_ext.build_searched_strategy(None) is None is ms.build_searched_strategy(None)


def test_what_no_layouts_are(ms: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "other.ckpt").write_bytes(b"\xff\xff no strategy")
    for given_, kind in ((5, TypeError), ("nothing.ckpt", ValueError), ("empty.ckpt", ValueError)):
        path: Any = str(tmp_path / given_) if isinstance(given_, str) else given_
        for package in (ms, ms_ckpt_ext):
            with pytest.raises(kind):
                package.build_searched_strategy(path)
    with pytest.raises(errors.StrategyError, match="is not a strategy file"):
        ms_ckpt_ext.build_searched_strategy(tmp_path / "other.ckpt")


# --- merge_sliced_parameter


def message(ms: Any, layout: Layout, split: Sequence[int] = (), field: int = 0) -> Any:
    built = ms.train.node_strategy_pb2.ParallelLayouts()
    built.dev_matrix.add().dim.extend(layout.dev_matrix)
    built.tensor_map.add().dim.extend((*group, -1)[0] for group in layout.tensor_map)
    built.param_split_shape.add().dim.extend(split)
    built.field = field
    built.opt_weight_shard_step, built.opt_weight_shard_size = layout.opt_shard_step, layout.opt_shard_size
    return built


def parameters(ms: Any, arrays: Sequence[Any], name: str = "w") -> list[Any]:
    return [ms.Parameter(ms.Tensor(array), name=name, requires_grad=False) for array in arrays]


def numbers(shape: Sequence[int], dtype: str) -> Any:
    return np.random.default_rng(3).integers(0, 255, shape).astype(dtype)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    matrix = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    axes = draw(st.permutations(range(len(matrix))))
    return Layout(matrix, tuple((axis,) if draw(st.booleans()) else () for axis in axes))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts(), dtype=st.sampled_from(["f4", "f2", "f8", "i4", "i1", "u1", "bool"]))
def test_slices_come_together_as_in_stock(layout: Layout, dtype: str, ms: Any) -> None:
    shape = tuple(2 * parts for parts in layout.parts)
    whole = numbers(shape, dtype)
    arrays = [np.ascontiguousarray(whole[layout.region(rank, shape).slices]) for rank in range(layout.devices)]
    for strategy in ({"w": message(ms, layout)}, None):
        stock = described(ms.merge_sliced_parameter(parameters(ms, arrays), strategy))
        assert described(ms_ckpt_ext.merge_sliced_parameter(parameters(ms, arrays), strategy)) == stock
        assert strategy is None or stock[-1] == whole.tobytes()


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        (Layout((2,), ((0,), ())), [1, 3]),
        (Layout((2, 2), ((1,), (0,))), [1, 1, 3, 3]),
        (Layout((2, 2), ((0,), ())), [3, 2]),
        (Layout((3, 2), ((), (0,))), [4, 4]),
    ],
)
def test_slices_that_differ_in_rows(layout: Layout, split: list[int], ms: Any) -> None:
    columns = layout.parts[1]
    starts = np.cumsum([0, *split[::columns]])
    whole = numbers((starts[-1], 2 * columns), "f4")
    arrays = [
        np.ascontiguousarray(whole[starts[row] : starts[row + 1], 2 * column : 2 * column + 2])
        for row, column in layout.cells
    ]
    strategy = {"w": message(ms, layout, split)}
    ours = described(ms_ckpt_ext.merge_sliced_parameter(parameters(ms, arrays), strategy))
    assert ours == described(ms.merge_sliced_parameter(parameters(ms, arrays), strategy))
    assert ours[-1] == whole.tobytes()


@pytest.mark.parametrize(("fields", "devices"), [(3, 2), (1, 4), (2, 1)])
def test_tables_of_several_fields(fields: int, devices: int, ms: Any) -> None:
    arrays = [numbers((2 * fields, 3), "f4") + rank for rank in range(devices)]
    strategy = {"w": message(ms, Layout((devices,), ((0,), ())), field=fields)}
    ours = described(ms_ckpt_ext.merge_sliced_parameter(parameters(ms, arrays), strategy))
    assert ours == described(ms.merge_sliced_parameter(parameters(ms, arrays), strategy))


@pytest.mark.parametrize("strategy", [True, False])
def test_bfloat16_stays_what_it_is(strategy: bool, ms: Any) -> None:
    """Stock gives Float32 of the same values."""
    layout = Layout((2, 2), ((1,), (0,)))
    whole = ms.Tensor(numbers((4, 4), "f4"), ms.bfloat16)
    arrays = [ms.Tensor(whole.asnumpy()[layout.region(rank, (4, 4)).slices].copy()) for rank in range(4)]
    assert {str(array.dtype) for array in arrays} == {"BFloat16"}
    layouts_ = {"w": message(ms, layout)} if strategy else None
    ours = ms_ckpt_ext.merge_sliced_parameter([ms.Parameter(array, name="w") for array in arrays], layouts_)
    stock = ms.merge_sliced_parameter([ms.Parameter(array, name="w") for array in arrays], layouts_)
    assert (str(ours.dtype), str(stock.dtype)) == ("BFloat16", "Float32")
    assert np.array_equal(ours.asnumpy().astype("f4"), stock.asnumpy())
    assert not strategy or ours.asnumpy().tobytes() == whole.asnumpy().tobytes()


@pytest.mark.parametrize(
    "layout", [Layout((4,), ((), ()), 1, -1), Layout((2, 2), ((0,), ()), 2, 2), Layout((2, 2, 2), ((1,), (0,)), 1, 2)]
)
def test_optimizer_shards_come_into_their_places(layout: Layout, ms: Any) -> None:
    """Stock passes over the shard and puts one rank's part in the place of all."""
    whole = numbers((8, 4), "f4")
    arrays = [np.ascontiguousarray(whole[layout.region(rank, (8, 4)).slices]) for rank in range(layout.devices)]
    ours = ms_ckpt_ext.merge_sliced_parameter(parameters(ms, arrays), {"w": message(ms, layout)})
    assert ours.asnumpy().tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("slices", "layout", "kind"),
    [
        (5, None, TypeError),
        ([], None, ValueError),
        ([5], None, TypeError),
        (["w", "v"], None, ValueError),
        (["w", "w"], 5, TypeError),
        (["w", "w"], "v", KeyError),
        (["w", "w"], Layout((4,), ((0,), ())), ValueError),
        (["w", "w"], 7.5, ValueError),
    ],
    ids=str,
)
def test_wrong_slices(slices: Any, layout: Any, kind: type[Exception], ms: Any) -> None:
    if isinstance(slices, list):
        slices = [parameters(ms, [numbers((2, 2), "f4")], n)[0] if isinstance(n, str) else n for n in slices]
    strategy: Any = {"w": message(ms, layout)} if isinstance(layout, Layout) else layout
    strategy = {"v": None} if layout == "v" else {"w": object()} if layout == 7.5 else strategy
    for package in (ms, ms_ckpt_ext):
        with pytest.raises(kind):
            package.merge_sliced_parameter(slices, strategy)


def test_slices_that_contradict_each_other(ms: Any) -> None:
    """Numpy would make float64 of float32 and int32."""
    for other in (numbers((2, 2), "i4"), numbers((2, 3), "f4"), numbers((2,), "f4")):
        with pytest.raises(errors.LayoutMismatchError, match="slice 1 of 'w' is .*, slice 0 is Float32"):
            ms_ckpt_ext.merge_sliced_parameter(parameters(ms, [numbers((2, 2), "f4"), other]))
    with pytest.raises(errors.MissingNameError, match="^strategy has no layout of parameter 'w', but of v$"):
        ms_ckpt_ext.merge_sliced_parameter(parameters(ms, [numbers((2, 2), "f4")]), {"v": None})


# --- restore_group_info_list


@pytest.mark.parametrize("ranks", [[0, 1], [7], [3, 300, 2]])
def test_groups(ranks: list[int], ms: Any, tmp_path: Path) -> None:
    groups = ms.train.node_strategy_pb2.ParallelGroupMap()
    item = groups.parallel_group_item.add()
    item.group_name = "4-x"
    item.parallel_group_ranks.dim.extend([9, 10])
    groups.ckpt_restore_rank_list.dim.extend(ranks)
    path = tmp_path / "groups.pb"
    path.write_bytes(groups.SerializeToString())
    assert ms_ckpt_ext.restore_group_info_list(path) == ms.restore_group_info_list(str(path)) == ranks
    packed = b"".join(bytes([0x80 | n & 0x7F, n >> 7]) for n in ranks)
    path.write_bytes(bytes([0x12, len(packed) + 2, 0x0A, len(packed)]) + packed)
    assert ms_ckpt_ext.restore_group_info_list(path) == ms.restore_group_info_list(str(path)) == ranks


@pytest.mark.parametrize("contents", [None, b"", b"\xff", b"\x12\x00"])
def test_files_without_groups(contents: Any, tmp_path: Path) -> None:
    if contents is not None:
        (tmp_path / "groups.pb").write_bytes(contents)
    with pytest.raises((errors.FormatError, errors.StorageError), match=r"groups\.pb"):
        ms_ckpt_ext.restore_group_info_list(tmp_path / "groups.pb")
    with pytest.raises(TypeError):
        ms_ckpt_ext.restore_group_info_list(5)  # type: ignore[arg-type]


# --- get_ckpt_path_with_strategy


def backups(root: Path, present: Sequence[int]) -> str:
    """Files of some ranks; the path pattern has the rank twice, as MindFormers has it."""
    for rank in present:
        (root / f"rank_{rank}").mkdir(exist_ok=True)
        (root / f"rank_{rank}" / f"net_rank_{rank}-1_2.ckpt").touch()
    return str(root)


@pytest.mark.parametrize(
    "layouts_",
    [
        {"w": Layout((2, 4), ((0,), ()))},
        {"w": Layout((2, 4), ((0,), ())), "v": Layout((2, 4), ((), ()))},
        {"w": Layout((2, 2, 2), ((1,), ())), "v": Layout((2, 2, 2), ((1,), (0,)))},
        {"w": Layout((8,), ((), ())), "accu_grads.w": Layout((8,), ((0,), ())), "inputs": Layout((8,), ((0,), ()))},
        {"w": Layout((8,), ((), ()), 1, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("present", [[0, 1, 2, 3], [4, 5, 6], [7], [2, 6], []], ids=str)
def test_another_ranks_checkpoint(
    layouts_: dict[str, Layout], present: list[int], ms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mindspore.train._utils as utils
    import mindspore.train.serialization as serialization
    from mindspore import communication

    strategy_of(layouts_, tmp_path / "s.ckpt")
    root = backups(tmp_path, present)
    for rank in range(8):
        monkeypatch.setattr(serialization, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(utils, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(communication, "get_rank", lambda rank=rank: rank)
        path = f"{root}/rank_{rank}/net_rank_{rank}-1_2.ckpt"
        ours = ms_ckpt_ext.get_ckpt_path_with_strategy(path, tmp_path / "s.ckpt")
        assert ours == ms.get_ckpt_path_with_strategy(path, str(tmp_path / "s.ckpt")), rank


def test_ranks_that_agree_in_all_though_groups_are_not_nested(
    ms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 shares w with ranks 1, 2, 3 and v with 1, 4, 5: rank 1 has both. Stock looks at no other rank."""
    from mindspore import communication

    layouts_ = {"w": Layout((2, 2, 2), ((2,), ())), "v": Layout((2, 2, 2), ((1,), ()))}
    strategy_of(layouts_, tmp_path / "s.ckpt")
    path = backups(tmp_path, [1, 2, 4]) + "/rank_0/net_rank_0-1_2.ckpt"
    monkeypatch.setattr(communication, "get_rank", lambda: 0)
    assert ms.get_ckpt_path_with_strategy(path, str(tmp_path / "s.ckpt")) is None
    found = ms_ckpt_ext.get_ckpt_path_with_strategy(path, tmp_path / "s.ckpt")
    assert found == path.replace("rank_0", "rank_1")


def test_stages(ms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the strategy of all stages, or of the rank's own, whatever number that file gives it."""
    from mindspore import communication

    cut, whole = Layout((2, 2), ((0,), ())), Layout((2, 2), ((), ()))
    save_strategy(
        Strategy.from_items([LayoutItem("a", 0, whole), LayoutItem("b", 1, cut)], "both"), tmp_path / "both.ckpt"
    )
    strategy_of({"b": cut}, tmp_path / "alone.ckpt")
    path = backups(tmp_path, [4, 6, 7]) + "/rank_5/net_rank_5-1_2.ckpt"
    monkeypatch.setattr(communication, "get_rank", lambda: 5)
    for name in ("both", "alone"):
        found = ms_ckpt_ext.get_ckpt_path_with_strategy(path, tmp_path / f"{name}.ckpt")
        assert found == path.replace("rank_5", "rank_7")
    monkeypatch.setattr(communication, "get_rank", lambda: 1)
    (tmp_path / "rank_12").mkdir()
    (tmp_path / "rank_12" / "net.ckpt").touch()
    found = ms_ckpt_ext.get_ckpt_path_with_strategy(f"{tmp_path}/rank_12/net.ckpt", tmp_path / "both.ckpt")
    assert found is None, "rank 12 is not rank 1"
    (tmp_path / "net.ckpt").touch()
    for package in (ms, ms_ckpt_ext):
        assert package.get_ckpt_path_with_strategy(str(tmp_path / "net.ckpt"), str(tmp_path / "both.ckpt")) == str(
            tmp_path / "net.ckpt"
        )
