"""Damaged safetensors files, plain and encrypted, and strategy files: the right data or one of our errors.

The same for `.ckpt` stands in test_fuzz_ckpt.py. `damage.survives` guards time and memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, FileDigests, Manifest, load_manifest, opened
from ms_ckpt_ext.errors import CheckpointError, StrategyError
from ms_ckpt_ext.formats import crypto, safetensors
from ms_ckpt_ext.formats.crypto import decrypting_reader
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from tests.support.damage import BUDGET, edits, lies, memory_limit, mutate, survives, time_limit
from tests.support.encrypted import in_chunks
from tests.support.memory import MemoryReader

KEY = bytes(range(32))
SPECS = [TensorSpec("layer.0.weight", DTYPES["F32"], (4, 3)), TensorSpec("layer.0.bias", DTYPES["BF16"], (5,))] + [
    TensorSpec("step", DTYPES["I64"], ()),
    TensorSpec("none", DTYPES["F32"], (0, 7)),
    TensorSpec("packed", DTYPES["I8"], (6,)),
]


def plain() -> bytes:
    laid = safetensors.layout(SPECS, {"format": "ms", "packed": "Int4"})
    head = laid.literals[0][1]
    return head + bytes(i % 251 for i in range(laid.size - len(head)))


PLAIN = plain()
SEEDS = {"plain": PLAIN, "chunked": in_chunks(PLAIN, KEY, chunk=64)}


def contents(data: bytes, encrypted: bool = False) -> dict[str, tuple[Any, ...]]:
    """Everything a file says."""
    source = decrypting_reader(MemoryReader(data), KEY) if encrypted else MemoryReader(data)
    found = {}
    for name, entry in safetensors.read_index(source).tensors.items():
        part = bytearray(entry.extents[0].length)
        source.read_into(entry.extents[0].offset, memoryview(part))
        found[name] = (entry.dtype.name, entry.shape, bytes(part))
    return found


TRUTH = contents(PLAIN)


@pytest.mark.parametrize("kind", SEEDS)
@settings(max_examples=200)
@given(changes=edits)
def test_mutated_safetensors(kind: str, changes: list[Any]) -> None:
    data = mutate(SEEDS[kind], changes)
    found = survives(lambda raw: contents(raw, kind == "chunked"), data, CheckpointError)
    if found is not None and kind == "chunked":
        assert found == TRUTH  # authenticated: what is accepted is true
    if found is not None:
        assert sum(len(entry[2]) for entry in found.values()) <= len(data)


@pytest.mark.parametrize("kind", SEEDS)
def test_huge_numbers_everywhere(kind: str) -> None:
    seed = SEEDS[kind]
    for data in [*lies(seed[:160])]:
        found = survives(lambda raw: contents(raw, kind == "chunked"), data + seed[160:], CheckpointError)
        assert found is None or kind == "plain"


json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 1 << 70), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "str", 7]) | json_value,
        "shape": st.lists(st.sampled_from([0, 1, 2, 3, 1 << 40, 1 << 63, -1, True]), max_size=4) | json_value,
        "data_offsets": st.lists(st.sampled_from([0, 4, 8, 12, 1 << 63]), min_size=2, max_size=2) | json_value,
    }
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entry | json_value, max_size=3),
    st.binary(max_size=16),
)
def test_headers_of_any_json(header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    survives(contents, len(text).to_bytes(8, "little") + text + data, CheckpointError)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F32","shape":[' + b"4294967295," * 200_000 + b'1],"data_offsets":[0,0]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":"","data_offsets":[0,4]}}',
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
    ],
    ids=["many axes", "half a character", "a long number", "a text for a shape", "deep"],
)
def test_headers_that_are_meant_to_hurt(text: bytes) -> None:
    with time_limit(), pytest.raises(CheckpointError) as caught:
        contents(len(text).to_bytes(8, "little") + text + bytes(4))
    assert len(str(caught.value)) < 1000


def use(strategy: Strategy) -> int:
    """What jobs ask of a strategy."""
    strategy.check_complete()
    return sum(len(strategy.layout(name, 0).cells) for name in strategy.names_of(0))  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def strategies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("strategies")
    items = [
        LayoutItem("a.w", 0, Layout((2, 4), ((0,), ()), 1, -1)),
        LayoutItem("b.w", 1, Layout((2, 4), ((1, 0), ()))),
        LayoutItem("a.w", 1, Layout((2, 4), ((0,), ()))),
    ]
    found = {}
    for suffix in ("ckpt", "json"):
        save_strategy(Strategy.from_items(items, "a test"), folder / f"s.{suffix}")
        found[suffix] = (folder / f"s.{suffix}").read_bytes()
    return folder / "damaged.ckpt", found


@pytest.mark.parametrize("kind", ["ckpt", "json"])
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits)
def test_mutated_strategies(kind: str, changes: list[Any], strategies: tuple[Path, dict[str, bytes]]) -> None:
    path, seeds = strategies
    path.write_bytes(mutate(seeds[kind], changes))
    with time_limit(), memory_limit(64 << 20):
        try:
            assert use(load_strategy(path)) >= 0
        except CheckpointError as error:
            assert "damaged.ckpt" in str(error)


def test_huge_numbers_in_strategies(strategies: tuple[Path, dict[str, bytes]]) -> None:
    path, seeds = strategies
    for data in lies(seeds["ckpt"]):
        path.write_bytes(data)
        with time_limit(), memory_limit(64 << 20):
            try:
                use(load_strategy(path))
            except CheckpointError as error:
                assert "damaged.ckpt" in str(error)


@pytest.mark.parametrize(
    "layouts",
    [
        {"a": {"dev_matrix": [65536, 65536], "tensor_map": [0, -1]}},
        {"4000000000-a": {"dev_matrix": [8], "tensor_map": [0, -1]}, "0-b": {"dev_matrix": [8], "tensor_map": [0]}},
        {"999999999-a": {"dev_matrix": [8], "tensor_map": [0, -1]}, "0-b": {"dev_matrix": [8], "tensor_map": [0]}},
    ],
    ids=["devices", "a name of digits", "stages"],
)
def test_more_ranks_than_there_are(layouts: dict[str, Any], tmp_path: Path) -> None:
    """Ranks are enumerated, so a damaged number of them would take all memory."""
    (tmp_path / "s.json").write_text(json.dumps({"parallel_layout_item": layouts}))
    with time_limit(), memory_limit(1 << 20):
        if "4000000000-a" in layouts:
            assert set(load_strategy(tmp_path / "s.json").layouts) == {"4000000000-a", "b"}
            return
        with pytest.raises(StrategyError, match="it is damaged"):
            load_strategy(tmp_path / "s.json")


def test_deep_json_is_no_strategy(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"a":' * 100_000)
    with time_limit(), pytest.raises(StrategyError, match="not valid JSON"):
        load_strategy(tmp_path / "s.json")


@settings(max_examples=200)
@given(changes=edits)
def test_mutated_manifests(changes: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A manifest of digests is one, or is refused; what it lists is checked against the files, not believed."""
    folder = tmp_path_factory.getbasetemp() / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "a.safetensors").write_bytes(PLAIN)
    index = read_index(str(folder / "a.safetensors"))
    held, key = digest_file(index), crypto.Key(bytes(16))
    listed = {"a.safetensors": held, "b/c.ckpt": FileDigests(5, {}), "d.ckpt": held.sealed_by(key, "d.ckpt")}
    seed = Manifest(listed).to_json()
    (folder / MANIFEST_NAME).write_bytes(mutate(seed, changes))
    with time_limit(), memory_limit(BUDGET):
        try:
            found = load_manifest(str(folder))
            assert found is not None
            readable, _ = opened(found, key)
            assert readable.files.get("d.ckpt", held)[1:3] in (held[1:3], ({}, None))
            check_digests(str(folder), readable)
        except CheckpointError as error:
            assert len(str(error)) > 20


def test_a_manifest_of_names_that_no_file_has(tmp_path: Path) -> None:
    names = ("a\0b", "\ud800", "../" * 2000 + "x")
    found = check_digests(str(tmp_path), Manifest({name: FileDigests(5, {}) for name in names}))
    assert [fault.found for fault in found] == ["no file"] * 3
