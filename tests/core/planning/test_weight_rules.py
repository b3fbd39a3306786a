"""Weight rules against numpy: any arrangement, from any layout, under any layout, read directly or together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.core.planning.weight_rules import (
    QKV,
    Concat,
    Experts,
    Interleave,
    Part,
    Rename,
    Rule,
    Stack,
    Transpose,
)
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.files.execution import execute
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.source.catalog import Catalog, catalog_of, open_catalog
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, UsageError
from ms_ckpt_ext.formats.registry import open_reader
from ms_ckpt_ext.storage.reader import ReaderPool
from ms_ckpt_ext.storage.sink import MemorySink
from tests.support.checkpoints import cut
from tests.support.loads import Load

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A rule, the sources it takes, and what numpy makes of them."""

    rule: Rule
    sources: Arrays
    expected: np.ndarray


def fused(arrays: Sequence[np.ndarray], groups: int, axis: int) -> np.ndarray:
    """Group by group, the slow way."""
    cuts = [np.split(array, groups, axis) for array in arrays]
    return np.concatenate([cut[group] for group in range(groups) for cut in cuts], axis)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = st.integers(1, 4)
    dtype = draw(st.sampled_from([np.float32, np.int16, np.uint8, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))

    def array(*shape: int) -> np.ndarray:
        return rng.integers(0, 255, shape).astype(dtype)

    kind = draw(st.sampled_from(["rename", "concat", "qkv", "interleave", "stack", "transpose", "experts", "part"]))
    shape = [draw(small) * 2 for _ in range(draw(st.integers(1, 3)))]
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    if kind == "rename":
        return Case(Rename("a", "t"), {"a": (a := array(*shape))}, a)
    if kind == "transpose":
        axes = tuple(draw(st.permutations(range(len(shape)))))
        return Case(Transpose("a", "t", axes), {"a": (a := array(*shape))}, a.transpose(axes))
    if kind == "part":
        parts = draw(st.integers(1, 3))
        shape[axis] *= parts
        number = draw(st.integers(0, parts - 1))
        return Case(Part("a", "t", number, parts, axis), {"a": (a := array(*shape))}, np.split(a, parts, axis)[number])
    if kind == "experts":
        experts, inner, transpose, merge = draw(small), draw(small), draw(st.booleans()), draw(st.booleans())
        widths = [draw(small) for _ in names]
        held = {f"e.{e}.{n}": array(w, inner) for n, w in zip(names, widths) for e in range(experts)}
        whole = np.stack([np.concatenate([held[f"e.{e}.{n}"] for n in names]) for e in range(experts)])
        whole = whole.transpose(0, 2, 1) if transpose else whole
        whole = whole.reshape(-1, whole.shape[-1]) if merge else whole
        return Case(Experts([f"e.{{e}}.{n}" for n in names], "t", transpose, merge), held, whole)
    if kind == "stack":
        axis = draw(st.integers(-len(shape) - 1, len(shape)))
        held = {f"w.{n}": array(*shape) for n in range(len(names))}
        return Case(Stack("w.{n}", "t", axis), held, np.stack(list(held.values()), axis))
    if kind == "interleave":
        held = {name: array(*shape) for name in names}
        rows = draw(st.sampled_from([1, 2]))
        return Case(Interleave(names, "t", axis, rows), held, fused(list(held.values()), shape[axis] // rows, axis))
    groups = draw(small) if kind == "qkv" else 1
    held = {}
    for name in names:
        shape[axis] = groups * draw(small)
        held[name] = array(*shape)
    rule = QKV(names, "t", groups, axis) if kind == "qkv" else Concat(names, "t", axis)
    return Case(rule, held, fused(list(held.values()), groups, axis))


@st.composite
def layout_for(draw: st.DrawFn, shape: tuple[int, ...], devices: int) -> Layout:
    """Any layout that cuts `shape` evenly over exactly `devices`; what is left over are replicas."""
    matrix: list[int] = []
    left = devices
    for extent in shape:
        ways = draw(st.sampled_from([n for n in range(1, left + 1) if extent % n == 0 and left % n == 0]))
        matrix.append(ways)
        left //= ways
    return Layout((*matrix, left), tuple((len(shape) - axis,) for axis in range(len(shape))))


def strategy(layouts: Mapping[str, Layout]) -> Strategy:
    return Strategy.from_items([LayoutItem(name, 0, layout) for name, layout in layouts.items()], "the test's strategy")


def store(case: Case, root: Path, data: st.DataObject) -> tuple[Path, Any]:
    """Save the sources, merged or cut by layouts of their own; (directory, strategy)."""
    devices = data.draw(st.sampled_from([0, 2, 4]))
    if not devices:
        save_file({name: np.ascontiguousarray(array) for name, array in case.sources.items()}, root / "m.safetensors")
        return root, None
    cutting = strategy({name: data.draw(layout_for(array.shape, devices)) for name, array in case.sources.items()})
    return cut(cutting, case.sources, root), cutting


def ruled(catalog: Catalog, rules: Sequence[Rule]) -> Catalog:
    return Catalog(catalog.files, apply_rules(catalog.tensors, rules), catalog.extras, catalog.notes)


def opened(case: Case, directory: Path, trained: Any) -> Catalog:
    """The checkpoint with the rule applied; a cut that falls inside its rows is refused, which is tested elsewhere."""
    try:
        return ruled(open_catalog(str(directory), trained), [case.rule])
    except LayoutMismatchError as error:
        assume("are no boxes" not in str(error))
        raise


@given(cases(), st.data())
@settings(deadline=None, max_examples=150)
def test_a_rank_reads_its_bytes_and_they_are_right(case: Case, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        catalog = opened(case, *store(case, Path(root), data))
        tensor = catalog.tensors["t"]
        assert tensor.meta.shape == case.expected.shape
        layout = data.draw(layout_for(case.expected.shape, data.draw(st.sampled_from([1, 2, 3, 4]))))
        limits = Limits(
            tile=data.draw(st.sampled_from([8, 64, 4096])), gap=0, direct=data.draw(st.sampled_from([8, 4096]))
        )
        for rank in range(layout.devices):
            region = layout.region(rank, tensor.meta.shape)
            nbytes = tensor.meta.dtype.nbytes(region.size)
            sink = MemorySink(np.full(nbytes, 0xAA, np.uint8))
            task = Task(tensor, (Target(region, (Landing(0, (Extent(0, nbytes),)),)),))
            with ReaderPool(catalog.files, open_reader) as readers:
                worker.run(schedule([task], catalog.stored, limits), readers, [sink], 1, lambda *_: None)
                assert nbytes <= readers.count.nbytes <= 1.25 * nbytes
            assert sink.bytes.tobytes() == case.expected[region.slices].tobytes()


class Ruled(Load):
    """A cooperative load through rules."""

    rules: Sequence[Rule] = ()

    def catalog(self, seen: Any) -> Catalog:
        return ruled(compared(catalog_of(seen.indexes, seen.sharded, seen.names, self.trained)), self.rules)


@given(cases(), st.data())
@settings(deadline=None, max_examples=60)
def test_ranks_exchange_what_rules_make(case: Case, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        directory, trained = store(case, Path(root), data)
        opened(case, directory, trained)
        layout = data.draw(layout_for(case.expected.shape, data.draw(st.sampled_from([1, 2, 3, 4]))))
        load = Ruled(directory, trained, strategy({"t": layout}), bucket_bytes=4096)
        load.rules = [case.rule]
        loaded = load.run()
        for rank, held in enumerate(loaded):
            box = layout.region(rank, case.expected.shape)
            assert held.contents == {"t": case.expected[box.slices].tobytes()}
        assert sum(held.report.reads.nbytes for held in loaded) <= sum(array.nbytes for array in case.sources.values())


def test_a_merge_writes_what_rules_make(tmp_path: Path) -> None:
    """Layers, experts and what no rule touches, file to file; the result is an ordinary checkpoint."""
    rng = np.random.default_rng(3)
    held = {
        f"h.{layer}.{name}": rng.standard_normal((rows, 6), np.float32)
        for layer in range(2)
        for name, rows in {"q": 8, "k": 4, "v": 4, "gate": 5, "up": 5}.items()
    }
    held["norm"] = np.arange(6, dtype=np.float32)
    (tmp_path / "hf").mkdir()
    save_file(held, tmp_path / "hf/model.safetensors")
    rules = [QKV([f"h.{{i}}.{n}" for n in "qkv"], "l.{i}.qkv", 2), Interleave(["h.{i}.gate", "h.{i}.up"], "l.{i}.fc1")]
    catalog = ruled(open_catalog(str(tmp_path / "hf"), None), rules)
    execute(merge_job(catalog, str(tmp_path / "out"), MergeOptions()), str(tmp_path / "out"), 2, Limits(tile=64))
    got = load_file(tmp_path / "out/part0.safetensors")
    for layer in range(2):
        qkv = fused([held[f"h.{layer}.{n}"] for n in "qkv"], 2, 0)
        assert np.array_equal(got.pop(f"l.{layer}.qkv"), qkv)
        assert np.array_equal(got.pop(f"l.{layer}.fc1")[1::2], held[f"h.{layer}.up"])
    assert np.array_equal(got.pop("norm"), held["norm"])
    assert got == {}


def test_what_the_rule_for_training_means() -> None:
    """MindFormers' layout of grouped queries, spelled out."""
    q, k, v = np.arange(8), np.arange(10, 14), np.arange(20, 24)
    assert fused([q, k, v], 2, 0).tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


@pytest.mark.parametrize(
    ("rules", "error", "told"),
    [
        ([QKV(["a", "missing"], "t", 1)], CoverageError, "nothing called 'missing'"),
        ([Stack("e.{n}", "t")], CoverageError, "nothing called 'e.{n}' for 1"),
        ([Concat(["a", "b"], "t")], LayoutMismatchError, "cannot be joined along axis 0"),
        ([QKV("a", "t", 5)], LayoutMismatchError, "in 5 equal groups"),
        ([Concat(["a", "i"], "t")], LayoutMismatchError, "different dtypes"),
        ([Rename("a", "t"), Rename("b", "t")], UsageError, "two rules make 't'"),
        ([Rename("f.{n}", "t")], UsageError, "takes one source, but 2 match"),
        ([Transpose("a", "t", (0, 1, 2))], LayoutMismatchError, "do not permute"),
        ([Part("a", "t", 0, 3)], LayoutMismatchError, "into 3 equal parts"),
        ([Stack(["a", "b"], "t")], LayoutMismatchError, "must have one shape"),
        ([Interleave("a", "t", rows=3)], LayoutMismatchError, "no multiple of 3 rows"),
        ([Concat(["a"], "t", axis=2)], LayoutMismatchError, "no axis 2"),
        ([Experts("v", "t")], LayoutMismatchError, "must be matrices"),
    ],
)
def test_refused(rules: list[Rule], error: type[Exception], told: str, tmp_path: Path) -> None:
    held = {"a": np.zeros((4, 4), np.float32), "b": np.zeros((4, 2), np.float32), "i": np.zeros((4, 4), np.int32)}
    held |= {"e.0": held["a"], "e.2": held["a"], "v": np.zeros(4, np.float32), "f.0": held["a"], "f.1": held["a"]}
    save_file(held, tmp_path / "m.safetensors")
    with pytest.raises(error) as caught:
        ruled(open_catalog(str(tmp_path), None), rules)
    assert told in str(caught.value)


def test_cuts_inside_the_rows_of_a_rule_are_refused(tmp_path: Path) -> None:
    held = {"a": np.zeros((6, 4), np.float32), "b": np.zeros((6, 4), np.float32)}
    cutting = strategy({name: Layout((2,), ((0,), ())) for name in held})
    with pytest.raises(
        LayoutMismatchError, match="apply the rules to a merged checkpoint, or to a network that holds it whole"
    ):
        ruled(open_catalog(str(cut(cutting, held, tmp_path)), cutting), [QKV(["a", "b"], "t", 3)])


def test_a_rule_without_sources_makes_nothing(tmp_path: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "m.safetensors")
    catalog = ruled(open_catalog(str(tmp_path), None), [QKV(["x.{i}.q", "x.{i}.k"], "t.{i}", 1)])
    assert list(catalog.tensors) == ["a"]


def test_bad_rules_are_told_at_birth() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        QKV("a", "t", 0)
    with pytest.raises(UsageError, match="parts count from 0"):
        Part("a", "t", 2, 2)
    with pytest.raises(UsageError, match="parts count from 0"):
        Part("a", "t", -1, 2)
    with pytest.raises(UsageError, match="experts must be at least 1"):
        Experts("e.{n}", "t", experts=0)
    with pytest.raises(UsageError, match="names of its sources"):
        Rename([], "t")
    with pytest.raises(UsageError, match="names a placeholder twice"):
        apply_rules({}, [Rename("a.{i}.{i}", "t")])


def test_a_transposed_matrix_in_many_tiles(tmp_path: Path) -> None:
    """A tile of the target is a block of columns of the source: far apart there, and nothing between is read."""
    whole = np.arange(512 * 4096, dtype=np.int32).reshape(512, 4096)
    save_file({"a": whole}, tmp_path / "m.safetensors")
    catalog = ruled(open_catalog(str(tmp_path), None), [Transpose("a", "t")])
    sink = MemorySink(np.zeros(whole.nbytes, np.uint8))
    task = Task(catalog.tensors["t"], (Target(Region.whole((4096, 512)), (Landing(0, (Extent(0, whole.nbytes),)),)),))
    with ReaderPool(catalog.files, open_reader) as readers:
        units = schedule([task], catalog.stored, Limits(tile=256 << 10))
        worker.run(units, readers, [sink], 2, lambda *_: None)
        assert readers.count.nbytes == whole.nbytes
    assert sink.bytes.tobytes() == whole.T.tobytes()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
@pytest.mark.parametrize(
    "rule",
    [
        Concat(["h.{i}.q", "h.{i}.k"], "g.{i}"),
        QKV(["h.{i}.q", "h.{i}.k", "h.{i}.v"], "g.{i}", groups=2),
        Interleave(["h.{i}.q", "h.{i}.k"], "g.{i}"),
        Stack("h.{i}.q", "g"),
        Transpose("h.{i}.q", "g.{i}"),
        Experts(["h.{i}.q", "h.{i}.k"], "g"),
        Part("h.{i}.q", "g.{i}", 0, 2),
    ],
)
def test_sources_without_elements_are_refused_by_name(rule: Rule, shape: tuple[int, ...]) -> None:
    held = {n: stored_whole(TensorMeta(n, DTYPES["F32"], shape), (0,)) for n in ("h.0.q", "h.0.k", "h.0.v")}
    with pytest.raises(LayoutMismatchError, match="'h.0.q' .* which has no elements"):
        apply_rules(held, [rule])
    renamed = apply_rules(held, [Rename("h.{i}.q", "g.{i}")])
    assert renamed["g.0"].meta.shape == shape


def test_an_error_about_values_without_axes_names_them() -> None:
    held = {n: stored_whole(TensorMeta(n, DTYPES["F32"], ()), (0,)) for n in ("h.0.q", "h.0.k")}
    with pytest.raises(LayoutMismatchError, match=r"no axis 0 among 0; it is made of 'h.0.q' \[\], 'h.0.k' \[\]"):
        apply_rules(held, [Concat(["h.{i}.q", "h.{i}.k"], "g.{i}")])
