"""The rows of docs/differences.md, one by one: what stock does, measured here, and what is right, which ours does."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.stock.fuzz import sides
from tests.stock.fuzz.files import metadata_of, write_strategy
from tests.stock.fuzz.model import Cut, Job
from tests.support.checkpoints import cut, read_file, strategy_of
from tests.support.formats import contents

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]
ROWS, COLUMNS, WHOLE = Layout((2,), ((0,), ())), Layout((2,), ((), (0,))), Layout((2,), ((), ()))


@pytest.fixture(scope="module", autouse=True)
def ms() -> Iterator[Any]:
    import mindspore

    mindspore.set_device("CPU")
    allowed = os.sched_getaffinity(0)
    yield mindspore
    os.sched_setaffinity(0, allowed)


def by_stock(name: str, *args: Any, helped: bool = True, **named: Any) -> tuple[Any, list[BaseException]]:
    """Call a function of stock MindSpore, its processes in this one: what it returns, and what it says nothing of."""
    silent: list[BaseException] = []
    paths = [str(value) if isinstance(value, Path) else value for value in args]
    named = {key: str(value) if isinstance(value, Path) else value for key, value in named.items()}
    with sides.stock(silent, helped) as functions, sides.quiet():
        return functions(name)(*paths, **named), silent


def staged(items: list[tuple[str, int, Layout]], path: Path) -> Strategy:
    """A strategy of several stages, written to `path` as well."""
    strategy = Strategy.from_items([LayoutItem(*item) for item in items], str(path))
    save_strategy(strategy, path)
    return strategy


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1


def network(ms: Any, parameters: Mapping[str, tuple[int, ...]]) -> Any:
    cell = ms.nn.Cell()
    for number, (name, shape) in enumerate(parameters.items()):
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(ms.Tensor(np.zeros(shape), ms.float32), name=name))
    return cell


def held(cell: Any) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in cell.get_parameters()}


def arrays(path: Path) -> dict[str, np.ndarray]:
    """F32 tensors of a file of either format."""
    found = read_file(path) if path.suffix == ".safetensors" else contents(path)
    return {name: np.frombuffer(t.data, np.float32).reshape(t.shape) for name, t in found.items() if t.dtype == "F32"}


def test_optimizer_shards(tmp_path: Path) -> None:
    """Two tensor axes cut, the first one by the inner device axis, and replicas sharded: stock merges them in another
    order than ranks hold them, and says nothing."""
    strategy = strategy_of({"w": Layout((2, 2, 2), ((0,), (1,)), 4, -1)}, tmp_path / "s.ckpt")
    source = cut(strategy, {"w": numbers(8, 4)}, tmp_path / "src")
    by_stock("unified_safetensors", source, tmp_path / "s.ckpt", tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(source, tmp_path / "s.ckpt", tmp_path / "ours")
    theirs, mine = (arrays(tmp_path / who / "part0.safetensors")["w"] for who in ("stock", "ours"))
    assert sorted(theirs.ravel()) == sorted(mine.ravel()) and not np.array_equal(theirs, mine)
    assert np.array_equal(mine, numbers(8, 4))


def test_optimizer_shards_into_slices(tmp_path: Path) -> None:
    """The same in save mode: most ranks get another rank's slice."""
    strategy = strategy_of({"w": Layout((2, 2, 2), ((0,), (1,)), 4, -1)}, tmp_path / "s.ckpt")
    right = cut(strategy, {"w": numbers(8, 4)}, tmp_path / "right")
    (tmp_path / "merged").mkdir()
    save_file({"w": numbers(8, 4)}, tmp_path / "merged/part0.safetensors")
    wrong = 0
    for rank in range(8):
        told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": rank}
        call = (None, None, tmp_path / "s.ckpt")
        by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
        ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
        name = f"rank_{rank}/net.safetensors"
        expected = arrays(right / name)["w"]
        assert np.array_equal(arrays(tmp_path / "ours" / name)["w"], expected)
        wrong += not np.array_equal(arrays(tmp_path / "stock" / name)["w"], expected)
    assert wrong == 4


def transformed(root: Path, **named: Any) -> tuple[dict[str, dict[str, np.ndarray]], ...]:
    """What stock and ours make of `src` between the strategies `s.ckpt` and `d.ckpt`: file -> its tensors."""
    for who in ("stock", "ours"):
        call = (root / "src", root / who, "n", root / "s.ckpt", root / "d.ckpt")
        if who == "stock":
            by_stock("transform_checkpoints", *call, **named)
        else:
            ms_ckpt_ext.transform_checkpoints(*call, **{k: v for k, v in named.items() if k != "helped"})
    return tuple(
        {path.parent.name: arrays(path) for path in (root / who).rglob("*") if path.suffix in (".ckpt", ".safetensors")}
        for who in ("stock", "ours")
    )


def test_parameters_tied_over_stages(tmp_path: Path) -> None:
    """Cut by rows in stage 1 and by columns in stage 2: stock gives ranks of stage 1 the columns."""
    items = [("a", 0, ROWS), ("emb", 1, ROWS), ("emb", 2, COLUMNS), ("b", 2, ROWS)]
    strategy = staged(items, tmp_path / "s.ckpt")
    staged(items, tmp_path / "d.ckpt")
    full = {"a": numbers(4, 4), "emb": numbers(4, 6), "b": numbers(2, 2)}
    cut(strategy, full, tmp_path / "src")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(mine["rank_2"]["emb"], full["emb"][:2])
    assert np.array_equal(theirs["rank_2"]["emb"], full["emb"][:, :3])


def test_parameters_that_the_target_ties(tmp_path: Path) -> None:
    """Two stages of the target share an embedding, and all its ranks need the same files: stock's files of the second
    stage lack it."""
    source = strategy_of({"emb": ROWS, "a": ROWS, "b": ROWS}, tmp_path / "s.ckpt")
    items = [("emb", 0, COLUMNS), ("a", 0, COLUMNS), ("emb", 1, COLUMNS), ("b", 1, COLUMNS)]
    target = staged(items, tmp_path / "d.ckpt")
    full = {"a": numbers(4, 4), "emb": numbers(4, 6), "b": numbers(2, 2)}
    cut(source, full, tmp_path / "src")
    cut(target, full, tmp_path / "right")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    for rank in range(4):
        right = arrays(tmp_path / f"right/rank_{rank}/net.safetensors")
        assert {n: a.tolist() for n, a in mine[f"rank_{rank}"].items()} == {n: a.tolist() for n, a in right.items()}
        assert theirs[f"rank_{rank}"].keys() == ({"b"} if rank > 1 else {"a", "emb"})


def test_safetensors_of_today(tmp_path: Path) -> None:
    """safetensors 0.8 takes an array's memory as it lies; stock hands it slices of columns, which lie in pieces."""
    strategy = strategy_of({"w": WHOLE}, tmp_path / "s.ckpt")
    strategy_of({"w": COLUMNS}, tmp_path / "d.ckpt")
    cut(strategy, {"w": numbers(2, 4)}, tmp_path / "src")
    theirs, mine = transformed(tmp_path, output_format="safetensors", helped=False)
    assert np.array_equal(mine["rank_1"]["w"], numbers(2, 4)[:, 2:])
    assert theirs["rank_1"]["w"].tolist() == [[3, 4], [5, 6]]  # the next four numbers, whoever they belong to
    shutil.rmtree(tmp_path / "stock")
    shutil.rmtree(tmp_path / "ours")
    theirs, _ = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(theirs["rank_1"]["w"], numbers(2, 4)[:, 2:])


def test_the_int4_mark(tmp_path: Path) -> None:
    """Packed int4 is stored as int8, and the metadata says so: a re-cut of stock's loses that."""
    strategy_of({"q": ROWS}, tmp_path / "s.ckpt")
    strategy_of({"q": COLUMNS}, tmp_path / "d.ckpt")
    packed = np.arange(16, dtype=np.int8).reshape(4, 4)
    for rank in range(2):
        (tmp_path / f"src/rank_{rank}").mkdir(parents=True)
        slices = np.ascontiguousarray(packed[2 * rank : 2 * rank + 2])
        save_file({"q": slices}, tmp_path / f"src/rank_{rank}/net.safetensors", {"format": "ms", "q": "Int4"})
    transformed(tmp_path, output_format="safetensors")
    notes = {who: metadata_of(tmp_path / who / "rank_0/n0.safetensors") for who in ("stock", "ours")}
    assert notes == {"stock": {"format": "ms"}, "ours": {"format": "ms", "q": "Int4"}}


def test_a_network_after_an_error(ms: Any, tmp_path: Path) -> None:
    """The second parameter does not fit: stock has put the first one in place by then."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "b": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "b": (5,)}) for _ in range(2)]
    with pytest.raises(RuntimeError):
        by_stock("load_distributed_checkpoint", pair[0], **told)
    with pytest.raises(LayoutMismatchError):
        ms_ckpt_ext.load_distributed_checkpoint(pair[1], **told)
    assert np.array_equal(held(pair[0])["a"], numbers(4))
    assert not held(pair[1])["a"].any()


def test_files_that_stock_leaves_out(tmp_path: Path) -> None:
    """Stock's processes die without a word where device counts do not divide: no file, no error."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    thirds = strategy_of({name: Layout((3,), ((0,), ())) for name in "ab"}, tmp_path / "d.ckpt")
    full = {name: numbers(6, 4) for name in "ab"}
    cut(strategy, full, tmp_path / "src")
    cut(thirds, full, tmp_path / "right")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    _, silent = by_stock("transform_checkpoints", *call, output_format="safetensors")
    assert [str(error) for error in silent] == ["Cannot transform device_num from 2 to 3"] * 2
    assert not list((tmp_path / "stock").rglob("*.safetensors"))
    ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="safetensors")
    for rank in range(3):
        mine = read_file(tmp_path / f"ours/rank_{rank}/n{rank}.safetensors")
        assert mine == read_file(tmp_path / f"right/rank_{rank}/net.safetensors")


def test_one_device_to_one_device(tmp_path: Path) -> None:
    """No strategy on either side: stock writes nothing."""
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({"a": numbers(4)}, tmp_path / "src/rank_0/net.safetensors")
    by_stock("transform_checkpoints", tmp_path / "src", tmp_path / "stock", "n", output_format="safetensors")
    ms_ckpt_ext.transform_checkpoints(tmp_path / "src", tmp_path / "ours", "n", output_format="safetensors")
    assert not list((tmp_path / "stock").rglob("*.safetensors"))
    assert np.array_equal(arrays(tmp_path / "ours/rank_0/n0.safetensors")["a"], numbers(4))


def test_frozen_parameters_of_later_stages(tmp_path: Path) -> None:
    """Outside the strategy, whole, on the ranks of stage 1: stock's merge looks into rank 0's file only."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    for rank in (2, 3):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "frozen": numbers(3)}, path, {"format": "ms"})
    by_stock("unified_safetensors", tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "ours")
    assert not (tmp_path / "stock/hyper_param.safetensors").exists()
    assert np.array_equal(arrays(tmp_path / "ours/hyper_param.safetensors")["frozen"], numbers(3))


def test_what_a_choice_leaves_out(tmp_path: Path) -> None:
    """Stock writes rank 0's slice of it to hyper_param.safetensors, as if it were whole."""
    strategy = strategy_of({"a": ROWS, "b": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    call = (tmp_path / "src", tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock", choice_func=lambda name: name != "b")
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", choice_func=lambda name: name != "b")
    assert np.array_equal(arrays(tmp_path / "stock/hyper_param.safetensors")["b"], numbers(4, 2)[:2])
    assert not (tmp_path / "ours/hyper_param.safetensors").exists()


def test_total_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied parameter that stages cut differently is counted by the slice of the file that is listed first."""
    items = [("a", 0, WHOLE), ("emb", 0, WHOLE), ("emb", 1, ROWS)]
    cut(staged(items, tmp_path / "s.ckpt"), {"a": numbers(4, 2), "emb": numbers(4, 2)}, tmp_path / "src")
    sizes = []
    for backwards in (False, True):
        listed = SimpleNamespace(glob=lambda pattern: sorted(glob.glob(pattern), reverse=backwards))  # noqa: B023
        monkeypatch.setattr("mindspore.parallel.transform_safetensors.glob", listed)
        by_stock("unified_safetensors", tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "stock")
        sizes.append(json.loads((tmp_path / "stock/param_name_map.json").read_text())["metadata"]["total_size"])
    assert sizes == [64, 48]
    ms_ckpt_ext.unified_safetensors(tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "ours")
    assert json.loads((tmp_path / "ours/param_name_map.json").read_text())["metadata"]["total_size"] == 64


def test_listed_by_the_target_only(tmp_path: Path) -> None:
    """A parameter that was frozen, whole on every rank, and is trained under the target: stock leaves it uncut."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    strategy_of({"a": COLUMNS, "frozen": ROWS}, tmp_path / "d.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src", {"frozen": numbers(4, 2)})
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert np.array_equal(theirs["rank_1"]["frozen"], numbers(4, 2))
    assert np.array_equal(mine["rank_1"]["frozen"], numbers(4, 2)[2:])


def test_names_by_suffix(ms: Any, tmp_path: Path) -> None:
    """The weight is not in the file, its moment is: stock fills the weight from it."""
    save_file({"adam_m.w": numbers(4), "v": numbers(4)}, tmp_path / "net.safetensors")
    pair = [network(ms, {"w": (4,), "v": (4,)}) for _ in range(2)]
    by_stock("load_checkpoint", tmp_path / "net.safetensors", pair[0], format="safetensors")
    ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", pair[1], format="safetensors")
    assert np.array_equal(held(pair[0])["w"], numbers(4))
    assert not held(pair[1])["w"].any()
    assert all(np.array_equal(held(cell)["v"], numbers(4)) for cell in pair)


def test_prefixes_of_safetensors(tmp_path: Path) -> None:
    """Stock takes them and does nothing with them."""
    save_file({"a.w": numbers(4), "b.w": numbers(4)}, tmp_path / "net.safetensors")
    call = {"format": "safetensors", "specify_prefix": "a"}
    theirs, _ = by_stock("load_checkpoint", tmp_path / "net.safetensors", **call)
    assert list(theirs) == ["a.w", "b.w"]
    assert list(ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", **call)) == ["a.w"]


def test_names_of_parameters(tmp_path: Path) -> None:
    """Parameters out of safetensors have no names of their own in stock."""
    save_file({"a.w": numbers(4)}, tmp_path / "net.safetensors")
    theirs, _ = by_stock("load_checkpoint", tmp_path / "net.safetensors", format="safetensors")
    assert theirs["a.w"].name != "a.w"
    assert ms_ckpt_ext.load_checkpoint(tmp_path / "net.safetensors", format="safetensors")["a.w"].name == "a.w"


def test_a_checksum_under_encryption(ms: Any, tmp_path: Path) -> None:
    """What stock writes with both it does not read."""
    key = b"0123456789ABCDEF"
    data = [{"name": "a", "data": ms.Tensor(numbers(4))}]
    ms.save_checkpoint(data, str(tmp_path / "net.ckpt"), enc_key=key, crc_check=True)
    with pytest.raises(ValueError, match="may be encrypted or tempered with"):
        by_stock("load_checkpoint", tmp_path / "net.ckpt", dec_key=key, crc_check=True)
    found = ms_ckpt_ext.load_checkpoint(tmp_path / "net.ckpt", dec_key=key, crc_check=True)
    assert np.array_equal(found["a"].asnumpy(), numbers(4))


def loaded(layout: Layout, ms: Any, root: Path) -> tuple[Any, Any, list[str], dict[str, Any]]:
    """Two networks, and the call that loads `.ckpt` files of `layout` into one."""
    strategy = strategy_of({"w": layout}, root / "s.ckpt")
    source = cut(strategy, {"w": numbers(8, 2)}, root / "src")
    ms_ckpt_ext.convert(source, root / "ckpt", to="ckpt")
    files = [str(root / f"ckpt/rank_{rank}/net.ckpt") for rank in range(strategy.world)]
    stock, ours = (network(ms, {"w": (8, 2)}) for _ in range(2))
    return stock, ours, files, {"train_strategy_filename": root / "s.ckpt"}


def test_optimizer_shards_in_loads_of_ckpt(ms: Any, tmp_path: Path) -> None:
    """A cut between two device axes that hold an optimizer shard: stock fills the network with some rows twice, and
    others not at all."""
    stock, ours, files, told = loaded(Layout((2, 2, 2), ((), (1,)), 1, 4), ms, tmp_path)
    by_stock("load_distributed_checkpoint", stock, files, **told)
    ms_ckpt_ext.load_distributed_checkpoint(ours, files, **told)
    assert 0 < len(np.unique(held(stock)["w"])) < 16
    assert np.array_equal(held(ours)["w"], numbers(8, 2))


def test_several_device_axes_in_loads_of_ckpt(ms: Any, tmp_path: Path) -> None:
    stock, ours, files, told = loaded(Layout((2, 2), ((1, 0), ())), ms, tmp_path)
    with pytest.raises(TypeError, match="'>=' not supported between instances of 'list' and 'int'"):
        by_stock("load_distributed_checkpoint", stock, files, **told)
    ms_ckpt_ext.load_distributed_checkpoint(ours, files, **told)
    assert np.array_equal(held(ours)["w"], numbers(8, 2))


def test_name_map_and_the_parameter_map(tmp_path: Path) -> None:
    """Names in the map as the files have them: stock leaves out what name_map renames."""
    (tmp_path / "merged").mkdir()
    for number in range(2):
        save_file({f"model.p{number}": numbers(4)}, tmp_path / f"merged/part{number}.safetensors")
    weights = {f"model.p{number}": f"part{number}.safetensors" for number in range(2)}
    (tmp_path / "merged/param_name_map.json").write_text(json.dumps({"weight_map": weights}))
    strategy_of({f"p{number}": Layout((2,), ((0,),)) for number in range(2)}, tmp_path / "d.ckpt")
    told = {
        "format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": 0,
        "name_map": {f"p{number}": f"model.p{number}" for number in range(2)},
    }  # fmt: skip
    call = (None, None, tmp_path / "d.ckpt")
    by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
    assert not list((tmp_path / "stock").rglob("*.safetensors")) or not arrays(
        tmp_path / "stock/rank_0/net.safetensors"
    )
    assert arrays(tmp_path / "ours/rank_0/net.safetensors").keys() == {"p0", "p1"}


def test_a_dash_in_a_name(tmp_path: Path) -> None:
    """Stock takes what stands before a dash for a pipeline stage."""
    strategy_of({"side-car.w": ROWS}, tmp_path / "s.ckpt")
    with pytest.raises(ValueError, match="invalid literal for int"):
        by_stock("rank_list_for_transform", 0, tmp_path / "s.ckpt", tmp_path / "s.ckpt")
    assert ms_ckpt_ext.rank_list_for_transform(0, tmp_path / "s.ckpt", tmp_path / "s.ckpt") == [0]


def test_strategies_in_json(tmp_path: Path) -> None:
    """Deduplicated slices under a strategy in JSON: stock reads it as protobuf."""
    strategy = strategy_of({"w": ROWS}, tmp_path / "s.json")
    call = (cut(strategy, {"w": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.json")
    with pytest.raises(Exception, match="wire type|end tag|[Pp]ars"):
        by_stock("unified_safetensors", *call, tmp_path / "stock", merge_with_redundancy=False)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", merge_with_redundancy=False)
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["w"], numbers(4, 2))


def test_deduplicated_slices(tmp_path: Path) -> None:
    """Two device axes on one tensor axis, and no replica in a file twice: stock takes the wrong files' slices."""
    layout = Layout((3, 2, 2), ((), (2, 0)))
    strategy = strategy_of({"w": layout}, tmp_path / "s.ckpt")
    source = cut(strategy, {"w": numbers(2, 12)}, tmp_path / "src")
    call = (source, tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock", merge_with_redundancy=False)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", merge_with_redundancy=False)
    assert not np.array_equal(arrays(tmp_path / "stock/part0.safetensors")["w"], numbers(2, 12))
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["w"], numbers(2, 12))


def test_cut_outside_the_strategy(tmp_path: Path) -> None:
    """A frozen matrix that ranks hold in halves, and no strategy lists: stock merges rank 0's half as the whole."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src")
    for rank in range(2):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "frozen": numbers(4, 2)[2 * rank : 2 * rank + 2]}, path, {"format": "ms"})
    call = (tmp_path / "src", tmp_path / "s.ckpt")
    by_stock("unified_safetensors", *call, tmp_path / "stock")
    assert np.array_equal(arrays(tmp_path / "stock/hyper_param.safetensors")["frozen"], numbers(4, 2)[:2])
    with pytest.raises(LayoutMismatchError, match="'frozen' is not in .* the ranks' files differ in it"):
        ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_every_ranks_own(tmp_path: Path) -> None:
    """States of random numbers, under a strategy that changes nothing: stock gives stage 0 those of stage 1."""
    items = [("a", 0, ROWS), ("emb", 0, ROWS), ("emb", 1, ROWS), ("b", 1, ROWS)]
    strategy = staged(items, tmp_path / "s.ckpt")
    cut(strategy, {name: numbers(4, 2) for name in ("a", "b", "emb")}, tmp_path / "src")
    for rank in range(4):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "state": numbers(3) * (rank + 1)}, path, {"format": "ms"})
    ms_ckpt_ext.convert(tmp_path / "src", tmp_path / "ckpt", to="ckpt")
    given = {rank: str(tmp_path / f"ckpt/rank_{rank}/net.ckpt") for rank in range(4)}
    told = {"src_strategy_file": tmp_path / "s.ckpt", "dst_strategy_file": tmp_path / "s.ckpt"}
    (tmp_path / "stock").mkdir()
    by_stock("transform_checkpoint_by_rank", 0, given, tmp_path / "stock/net.ckpt", **told)
    ms_ckpt_ext.transform_checkpoint_by_rank(0, given, tmp_path / "ours/net.ckpt", **told)
    assert np.array_equal(arrays(tmp_path / "stock/net.ckpt")["state"], numbers(3) * 3)
    assert np.array_equal(arrays(tmp_path / "ours/net.ckpt")["state"], numbers(3))


def test_gradients_that_are_accumulated(tmp_path: Path) -> None:
    """They are zero when saved, and whole but for the weight's own cut, while the strategy gives them its optimizer
    shard as well: stock makes a tensor of twice the size of them, and ours leaves them out."""
    shard = Layout((2, 2), ((0,), ()), 2, -1)
    strategy = strategy_of({"w": shard}, tmp_path / "s.ckpt")
    cut(strategy, {"w": numbers(8, 2)}, tmp_path / "src")
    for rank in range(4):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**arrays(path), "accu_grads.w": np.zeros((4, 2), np.float32)}, path, {"format": "ms"})
    strategy_of({"w": shard, "accu_grads.w": shard}, tmp_path / "s.ckpt")
    strategy_of({"w": WHOLE, "accu_grads.w": WHOLE}, tmp_path / "d.ckpt")
    theirs, mine = transformed(tmp_path, output_format="safetensors")
    assert theirs["rank_0"]["accu_grads.w"].shape == (16, 2)
    assert mine["rank_0"].keys() == {"w"}


def test_files_that_are_missing(tmp_path: Path) -> None:
    """One stage's file alone for one device: stock writes what there is, as if it were all."""
    strategy = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    ms_ckpt_ext.convert(tmp_path / "src", tmp_path / "ckpt", to="ckpt")
    given = {rank: str(tmp_path / f"ckpt/rank_{rank}/net.ckpt") for rank in (0, 1)}
    (tmp_path / "stock").mkdir()
    by_stock("transform_checkpoint_by_rank", 0, given, tmp_path / "stock/net.ckpt", tmp_path / "s.ckpt")
    assert list(arrays(tmp_path / "stock/net.ckpt")) == ["a"]
    with pytest.raises(ms_ckpt_ext.CheckpointError, match="'b' .*should be in the files of ranks 2, 3"):
        ms_ckpt_ext.transform_checkpoint_by_rank(0, given, tmp_path / "ours/net.ckpt", tmp_path / "s.ckpt")


def test_errors_that_stock_did_not_mean(tmp_path: Path) -> None:
    """From stages of two devices to stages of one: stock asks for a device that the layout lacks."""
    source = staged([("a", 0, ROWS), ("b", 1, ROWS)], tmp_path / "s.ckpt")
    single = Layout((1,), ((), ()))
    staged([("a", 0, single), ("b", 1, single), ("b", 2, single)], tmp_path / "d.ckpt")
    cut(source, {"a": numbers(4, 2), "b": numbers(4, 2)}, tmp_path / "src")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    with pytest.raises(RuntimeError, match="is not in the current stage"):
        by_stock("transform_checkpoints", *call, output_format="safetensors")
    ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="safetensors")
    for rank, name in enumerate("abb"):
        found = arrays(tmp_path / f"ours/rank_{rank}/n{rank}.safetensors")
        assert list(found) == [name] and np.array_equal(found[name], numbers(4, 2))


def test_nothing_to_convert(tmp_path: Path) -> None:
    """A pattern that means no file: stock converts nothing, and says nothing."""
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({"a": numbers(4)}, tmp_path / "src/rank_0/net.safetensors")
    by_stock("safetensors_to_ckpt", tmp_path / "src", tmp_path / "stock", file_name_regex="other")
    with pytest.raises(
        ms_ckpt_ext.CheckpointError, match=r"no \.safetensors file to convert; check the path and file_name_regex"
    ):
        ms_ckpt_ext.safetensors_to_ckpt(tmp_path / "src", tmp_path / "ours", file_name_regex="other")


def test_shorter_lists_of_ranks(tmp_path: Path) -> None:
    """Of what every rank holds whole, one rank is enough."""
    source = [("a", 0, WHOLE), ("b", 1, ROWS)]
    staged(source, tmp_path / "s.ckpt")
    strategy_of({"a": ROWS, "b": COLUMNS}, tmp_path / "d.ckpt")
    theirs, _ = by_stock("rank_list_for_transform", 1, tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    mine = ms_ckpt_ext.rank_list_for_transform(1, tmp_path / "s.ckpt", tmp_path / "d.ckpt")
    assert (theirs, mine) == ([3, 2, 1, 0], [3, 2, 1])


def test_no_number_of_processes(tmp_path: Path) -> None:
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    call = (cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.ckpt")
    with pytest.raises(TypeError):
        by_stock("unified_safetensors", *call, tmp_path / "stock", max_process_num=None)
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours", max_process_num=None)
    assert np.array_equal(arrays(tmp_path / "ours/part0.safetensors")["a"], numbers(4, 2))


def test_integers_of_any_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.ckpt"
    strategy_of({"a": ROWS}, path)
    with pytest.raises(TypeError, match="should be a int"):
        by_stock("rank_list_for_transform", np.int64(1), path, path)
    assert ms_ckpt_ext.rank_list_for_transform(np.int64(1), path, path) == [1]


def test_mistakes_that_stock_does_not_see(tmp_path: Path) -> None:
    """A format that is none, where the source is `.ckpt`."""
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    cut(strategy, {"a": numbers(4, 2)}, tmp_path / "plain")
    ms_ckpt_ext.convert(tmp_path / "plain", tmp_path / "src", to="ckpt")
    call = (tmp_path / "src", tmp_path / "stock", "n", tmp_path / "s.ckpt", tmp_path / "s.ckpt")
    by_stock("transform_checkpoints", *call, output_format="npz")
    assert (tmp_path / "stock/rank_0/n0.ckpt").exists()
    with pytest.raises(ValueError, match="output_format must be one of"):
        ms_ckpt_ext.transform_checkpoints(*call[:1], tmp_path / "ours", *call[2:], output_format="npz")
    assert not (tmp_path / "ours").exists()


def test_arguments_of_a_wrong_type(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="True is not a directory"):
        by_stock("merge_pipeline_strategys", True, tmp_path / "s.ckpt")
    for kind in (TypeError, ValueError):
        with pytest.raises(kind, match="src_strategy_dirs must be a path, got bool"):
            ms_ckpt_ext.merge_pipeline_strategys(True, tmp_path / "s.ckpt")


def test_the_note_remove_redundancy(tmp_path: Path) -> None:
    strategy = strategy_of({"a": ROWS}, tmp_path / "s.ckpt")
    call = (cut(strategy, {"a": numbers(4, 2)}, tmp_path / "src"), tmp_path / "s.ckpt")
    for rank in range(2):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file(arrays(path), path, {"format": "ms", "remove_redundancy": "False"})
    by_stock("unified_safetensors", *call, tmp_path / "stock")
    ms_ckpt_ext.unified_safetensors(*call, tmp_path / "ours")
    notes = {who: metadata_of(tmp_path / who / "part0.safetensors") for who in ("stock", "ours")}
    assert notes == {"stock": {"format": "ms", "remove_redundancy": "False"}, "ours": {"format": "ms"}}
    assert read_file(tmp_path / "ours/part0.safetensors") == read_file(tmp_path / "stock/part0.safetensors")


def test_the_order_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Cut((2,), ((0,), ()))
    job = Job(2, 2, {"a": {0: rows}, "b": {1: rows}}, frozenset("ab"))
    for stage in range(2):
        write_strategy(tmp_path / f"src/s_{stage}.ckpt", job, stage)
    results = []
    for backwards in (False, True):
        listed = SimpleNamespace(glob=lambda pattern: sorted(glob.glob(pattern), reverse=backwards))  # noqa: B023
        monkeypatch.setattr("mindspore.parallel.checkpoint_transform.glob", listed)
        by_stock("merge_pipeline_strategys", tmp_path / "src", tmp_path / "stock.ckpt")
        results.append((tmp_path / "stock.ckpt").read_bytes())
    ms_ckpt_ext.merge_pipeline_strategys(tmp_path / "src", tmp_path / "ours.ckpt")
    assert results[0] != results[1]
    assert (tmp_path / "ours.ckpt").read_bytes() == results[0]


def test_the_order_of_safetensors_in_ckpt(tmp_path: Path) -> None:
    """Of one whole checkpoint: ours keeps the file's order."""
    strategy_of(dict.fromkeys("dacb", ROWS), tmp_path / "d.ckpt")
    (tmp_path / "src/rank_0").mkdir(parents=True)
    save_file({name: numbers(4, 2) for name in "abcd"}, tmp_path / "src/rank_0/net.safetensors")
    call = {"dst_strategy_file": tmp_path / "d.ckpt"}
    by_stock("transform_checkpoints", tmp_path / "src", tmp_path / "stock", "n", **call)
    ms_ckpt_ext.transform_checkpoints(tmp_path / "src", tmp_path / "ours", "n", **call)
    theirs, mine = (arrays(tmp_path / who / "rank_1/n1.ckpt") for who in ("stock", "ours"))
    assert list(mine) == ["a", "b", "c", "d"]
    assert sorted(theirs) == list(mine)
    assert all(np.array_equal(theirs[name], mine[name]) for name in mine)


def test_whole_parameters_that_the_target_does_not_list(tmp_path: Path) -> None:
    strategy_of({"a": ROWS}, tmp_path / "d.ckpt")
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4, 2), "frozen": numbers(3)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged", "rank_id": 1}
    call = (None, None, tmp_path / "d.ckpt")
    by_stock("load_distributed_checkpoint", *call, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(*call, **told, dst_safetensors_dir=tmp_path / "ours")
    assert arrays(tmp_path / "stock/rank_1/net.safetensors").keys() == {"a"}
    mine = arrays(tmp_path / "ours/rank_1/net.safetensors")
    assert np.array_equal(mine["a"], numbers(4, 2)[2:]) and np.array_equal(mine["frozen"], numbers(3))


def test_slices_in_memory(ms: Any, tmp_path: Path) -> None:
    """`merge_sliced_parameter`: stock makes float32 of bfloat16, and leaves optimizer shards out."""
    layouts = {"w": Layout((2, 2), ((0,), ()), 2, -1), "b": ROWS}
    for name, layout in layouts.items():
        strategy_of({name: layout}, tmp_path / f"{name}.ckpt")
    shard = [np.array(numbers(8, 2)[2 * row : 2 * row + 2]) for row in (0, 2, 1, 3)]
    slices = {
        "w": [ms.Parameter(ms.Tensor(each), name="w") for each in shard],
        "b": [ms.Parameter(ms.Tensor(numbers(2, 2), ms.bfloat16), name="b") for _ in range(2)],
    }
    found = {}
    for name in layouts:
        strategy = ms_ckpt_ext.build_searched_strategy(tmp_path / f"{name}.ckpt")
        theirs, _ = by_stock("merge_sliced_parameter", slices[name], strategy)
        found[name] = theirs, ms_ckpt_ext.merge_sliced_parameter(slices[name], strategy)
    assert found["w"][0].shape == (4, 2)
    assert np.array_equal(found["w"][1].asnumpy(), numbers(8, 2))
    assert [each.dtype for each in found["b"]] == [ms.float32, ms.bfloat16]


def test_no_strategy_for_one_file(ms: Any, tmp_path: Path) -> None:
    """One whole `.ckpt` file needs no strategy."""
    save_file({"w": numbers(4)}, tmp_path / "net.safetensors")
    ms_ckpt_ext.safetensors_to_ckpt(tmp_path / "net.safetensors")
    pair = [network(ms, {"w": (4,)}) for _ in range(2)]
    with pytest.raises(ValueError, match="no such strategy file"):
        by_stock("load_distributed_checkpoint", pair[0], [str(tmp_path / "net.ckpt")])
    ms_ckpt_ext.load_distributed_checkpoint(pair[1], [str(tmp_path / "net.ckpt")])
    assert np.array_equal(held(pair[1])["w"], numbers(4))


def test_names_loaded_by_their_ends(ms: Any, tmp_path: Path) -> None:
    """A wrapper's prefix before every name: loaded by both; stock tells of the same names that they went nowhere."""
    (tmp_path / "merged").mkdir()
    save_file({"backbone.a": numbers(4), "backbone.b": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "b": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], **told)
    assert (theirs, mine) == (([], ["backbone.a", "backbone.b"]), ([], []))
    assert all(np.array_equal(held(cell)["b"], numbers(4)) for cell in pair)


def test_empty_layouts(ms: Any, tmp_path: Path) -> None:
    """The layouts of a network that is not compiled are an empty dictionary: one device, in save mode too."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4)}, tmp_path / "merged/part0.safetensors")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    with pytest.raises(TypeError, match="should be string, but got <class 'dict'>"):
        by_stock("load_distributed_checkpoint", None, None, {}, **told, dst_safetensors_dir=tmp_path / "stock")
    ms_ckpt_ext.load_distributed_checkpoint(None, None, {}, **told, dst_safetensors_dir=tmp_path / "ours")
    assert np.array_equal(arrays(tmp_path / "ours/rank_0/net.safetensors")["a"], numbers(4))


def test_names_that_went_nowhere(ms: Any, tmp_path: Path) -> None:
    """What the strategy does not list and the network does not have: nothing is said of it by stock."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "adam_m.a": numbers(4)}, tmp_path / "merged/part0.safetensors")
    strategy_of({"a": Layout((1,), ((),))}, tmp_path / "d.ckpt")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], None, tmp_path / "d.ckpt", **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], None, tmp_path / "d.ckpt", **told)
    assert (theirs, mine) == (([], []), ([], ["adam_m.a"]))


def test_loads_of_what_the_strategy_does_not_list(ms: Any, tmp_path: Path) -> None:
    """A frozen parameter in network and checkpoint, whole: stock leaves the network's value."""
    (tmp_path / "merged").mkdir()
    save_file({"a": numbers(4), "frozen": numbers(4)}, tmp_path / "merged/part0.safetensors")
    strategy_of({"a": Layout((1,), ((),))}, tmp_path / "d.ckpt")
    told = {"format": "safetensors", "unified_safetensors_dir": tmp_path / "merged"}
    pair = [network(ms, {"a": (4,), "frozen": (4,)}) for _ in range(2)]
    theirs, _ = by_stock("load_distributed_checkpoint", pair[0], None, tmp_path / "d.ckpt", **told)
    mine = ms_ckpt_ext.load_distributed_checkpoint(pair[1], None, tmp_path / "d.ckpt", **told)
    assert (theirs, mine) == ((["frozen"], []), ([], []))
    assert not held(pair[0])["frozen"].any()
    assert np.array_equal(held(pair[1])["frozen"], numbers(4))
