"""`load`: any checkpoint as a dictionary that reads only what is asked for."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, load, load_checkpoint, unified_safetensors
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.source.lazy import LazyTensor, select
from ms_ckpt_ext.errors import (
    ArgumentTypeError,
    ChecksumError,
    CoverageError,
    DecryptionError,
    DiscoveryError,
    FormatError,
    UsageError,
)
from ms_ckpt_ext.formats import ckpt_writer
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import Access, read_index
from tests.support.checkpoints import FULL, arrays, read_file, scalars, source
from tests.support.formats import CASE, KEY, write_ckpt
from tests.support.formats import contents_and_notes as contents

KIB = 1 << 10


def same(found: Any, expected: np.ndarray) -> bool:
    return bool(
        found.shape == expected.shape and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
    )


def test_a_map_may_speak_of_what_is_not_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({name: np.ones(2, "f4") for name in ("w", "b")}, tmp_path / "a.safetensors")

    def found(source: str, choice: Any = None) -> set[str]:
        return set(load(tmp_path / "a.safetensors", names="w", name_map={"q": source}, choice_func=choice))

    with caplog.at_level("WARNING", "ms_ckpt_ext"):
        assert found("b") == {"w"} and found("w") == {"w", "q"}
        assert found("new.b", lambda name: f"new.{name}") == {"new.w"}
        assert caplog.text == ""
        assert found("c") == {"w"}
    assert "does not hold: ['c']" in caplog.text


def test_without_axes_it_is_as_numpys(tmp_path: Path) -> None:
    held = {"s": np.array(3, "i4"), "z": np.array(0, "i4"), "one": np.array([0.5], "f4"), "w": np.ones((2, 3), "f4")}
    save_file(held, tmp_path / "a.safetensors")
    with load(tmp_path / "a.safetensors") as found:
        for name, index in (("s", ...), ("s", (...,)), ("s", ()), ("one", (..., 0)), ("one", 0), ("w", (1, ..., 2))):
            mine, numpys = found[name][index], held[name][index]
            assert type(mine) is type(numpys) and same(mine, numpys)
        assert type(found["s"].numpy()) is np.ndarray and found["s"].numpy().shape == ()
        assert [bool(found[name]) for name in ("s", "z", "one")] == [True, False, True]
        with pytest.raises(TypeError, match="'s' has no axes"):
            len(found["s"])
        with pytest.raises(ValueError, match=r"'w' of shape \[2, 3\] is neither true nor false"):
            bool(found["w"])
        assert len(found["w"]) == 2


def keys(extent: int) -> st.SearchStrategy[Any]:
    numbers = st.integers(-extent, extent - 1) if extent else st.nothing()
    bound = st.none() | st.integers(-extent - 2, extent + 2)
    return numbers | st.builds(slice, bound, bound, st.none() | st.sampled_from([1, 2, 3, -1, -2]))


@given(st.data())
def test_every_index_is_numpys(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    index: list[Any] = [data.draw(keys(extent)) for extent in shape]
    index = index[: data.draw(st.integers(0, len(index)))]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(index)))
        index[at:] = [...] if data.draw(st.booleans()) or at == len(index) else index[at:]
    whole = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
    box, extents, then = select(shape, tuple(index))
    read = whole[box.slices] if box else np.empty(extents, whole.dtype)
    assert read.shape == extents
    assert np.array_equal(read[then], whole[tuple(index)])


@pytest.mark.parametrize("index", [[1, 2], None, True, np.array([True]), "a", (0, 0, 0), (..., ...)])
def test_indexes_that_are_refused(index: Any) -> None:
    with pytest.raises(UsageError):
        select((4, 4), index)
    with pytest.raises(IndexError):
        select((4, 4), 4)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_ckpt(tmp_path / "net.ckpt")


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_file(kind: str, written: Path, tmp_path: Path) -> None:
    convert(written, tmp_path / "net.safetensors")
    truth = contents(written)
    with load(tmp_path / f"net.{kind}") as held:
        assert sorted(held) == sorted(truth)
        assert len(held) == len(truth)
        assert held["note"] == "nöte"
        assert "nothing" not in held
        for name, (dtype, shape, data, packed) in truth.items():
            value = held[name]
            if isinstance(value, str):
                continue
            assert (value.name, value.dtype, value.shape, value.nbytes) == (name, dtype, shape, len(data))
            assert value.packed == packed
            assert value[...].tobytes() == np.asarray(value).tobytes() == data
        weight = np.frombuffer(truth["z.weight"][2], np.float32).reshape(7, 9)
        lazy = held["z.weight"]
        assert isinstance(lazy, LazyTensor)
        assert same(lazy[2:5, 1:8:3], weight[2:5, 1:8:3])
        assert same(lazy[-1], weight[-1])
        assert same(held["learning_rate"][()], np.frombuffer(truth["learning_rate"][2], np.float32).reshape(()))
        assert held["a.bias"][1:3].dtype == np.uint16  # BF16 as its bit patterns
        assert held["none"].numpy().shape == (0, 3)
        assert len(lazy) == 7
        found = held.arrays()
        assert {name: value.tobytes() for name, value in found.items() if name != "note"} == {
            name: entry[2] for name, entry in truth.items() if name != "note"
        }
        assert found["note"] == "nöte"
    with pytest.raises(UsageError, match="was closed"):
        lazy[0]


def test_types_that_numpy_lacks(tmp_path: Path) -> None:
    from ms_ckpt_ext.formats import safetensors

    laid = safetensors.layout([TensorSpec("f8", DTYPES["F8_E4M3"], (4,)), TensorSpec("f4", DTYPES["F4"], (6,))], {})
    data = bytes(range(7))
    (tmp_path / "a.safetensors").write_bytes(laid.literals[0][1] + data)
    with load(tmp_path / "a.safetensors") as held:
        assert held["f8"][1:3].dtype == np.uint8
        assert sorted(held["f8"].numpy().tolist() + held["f4"].numpy().tolist()) == list(data)
        assert held.arrays()["f4"].shape == (3,)
        with pytest.raises(UsageError, match="narrower than a byte"):
            held["f4"][0]


@pytest.mark.parametrize("case", ["dp2_tp4_zero", "dp2_tp2_pp2_zero", "dp3_tp8"])
def test_a_sharded_checkpoint_is_seen_whole(case: str, golden: Path, tmp_path: Path) -> None:
    truth = read_file(golden / FULL[case] / "model.safetensors")
    with load(golden / case / "shards", golden / case / "strategy.ckpt") as held:
        found = held.arrays(name for name in held if name in truth)
        assert {name: value.tobytes() for name, value in found.items()} == {n: t.data for n, t in truth.items()}
    unified_safetensors(golden / case / "shards", golden / case / "strategy.ckpt", tmp_path / "merged")
    with load(tmp_path / "merged") as merged:
        assert {n: merged[n].numpy().tobytes() for n in truth} == {n: t.data for n, t in truth.items()}


@pytest.mark.parametrize("kind", ["ckpt", "ckpt_crc", "safetensors", "dedup"])
@pytest.mark.parametrize("case", ["formats_dp2_tp4", "formats_dp2_tp4_zero"])
def test_every_golden_set_is_the_truth(case: str, kind: str, golden: Path) -> None:
    truth = read_file(golden / "full" / "model.safetensors")
    with load(golden / case / kind, golden / case / "strategy.ckpt", crc_check=True) as held:
        found = held.arrays()
    assert {name: found[name].tobytes() for name in truth} == {name: tensor.data for name, tensor in truth.items()}
    outside = {"global_step", "learning_rate", "epoch_num", "step_num", "loss_scale", "scale_sense"}
    assert found.keys() - truth.keys() == {*outside, "current_iterator_step"}


@pytest.mark.parametrize("mode", ["aes_gcm", "aes_cbc", "sm4_cbc"])
def test_an_encrypted_file(mode: str, golden: Path) -> None:
    path = next((golden / CASE / f"ckpt_{mode}" / "rank_1").glob("*.ckpt"))
    truth = contents(golden / CASE / "ckpt" / "rank_1" / path.name)
    with load(path, dec_key=KEY) as held:
        assert {name: value.tobytes() for name, value in held.arrays().items()} == {n: t[2] for n, t in truth.items()}
    for key in (None, b"x" * 16):
        with pytest.raises(DecryptionError):
            load(path, dec_key=key)


@pytest.mark.parametrize("enc", [{}, {"enc_key": KEY}, {"enc_key": KEY, "enc_mode": "AES-CBC"}])
def test_digests_are_compared_on_request(enc: dict[str, Any], tmp_path: Path) -> None:
    """For what is chosen, and before anything is handed out; CBC and plain files detect nothing by themselves."""
    root, dec = source(tmp_path / "src"), {"dec_key": KEY} if enc else {}
    names = sorted(arrays(0))
    unified_safetensors(
        root / "shards", root / "strategy.ckpt", tmp_path / "out", output_format="ckpt", part_bytes=9000, **enc
    )
    where = json.loads((tmp_path / "out/param_name_map.json").read_text())["weight_map"]
    victim = tmp_path / "out" / where[names[0]]
    other = next(name for name in names if where[name] != victim.name)
    with load(tmp_path / "out", verify="full", **dec) as held:
        assert same(held[names[0]][...], arrays(0)[names[0]])
    raw = bytearray(victim.read_bytes())
    at = read_index(str(victim), Access(Key(KEY), optional=True)).tensors[names[0]].extents[0].offset
    raw[at + 100] ^= 1  # before the tensor there are at most 48 bytes of a block's header
    victim.write_bytes(raw)
    if enc != {"enc_key": KEY}:  # in blocks of AES-GCM, tables of contents are decrypted with the rest
        with load(tmp_path / "out", names=other, verify="full", **dec) as held:
            assert list(held) == [other]
    with pytest.raises((ChecksumError, DecryptionError), match=victim.name):
        load(tmp_path / "out", verify="full", **dec)
    bare = tmp_path / "bare.ckpt"
    convert(tmp_path / "out" / where[other], bare, digests=False, enc_key=KEY, enc_mode="AES-CBC", **dec)
    with pytest.raises(UsageError, match="no digest of .* is on record"):
        load(bare, verify="full", dec_key=KEY)
    with pytest.raises(UsageError, match='verify must be "none" or "full"'):
        load(victim, verify="replicas", **dec)


def test_names(written: Path) -> None:
    assert set(load(written, names="*.*")) == {"z.weight", "a.bias"}
    assert set(load(written, names=["note", "packed"])) == {"note", "packed"}
    assert set(load(written, choice_func=lambda name: "step" in name)) == {"global_step"}
    dotted = lambda name: f"net.{name}" if "." in name else False  # noqa: E731
    held = load(written, choice_func=dotted, name_map={"w": "net.z.weight"})
    assert set(held) == {"w", "net.a.bias", "net.z.weight"}
    assert held["w"].shape == (7, 9)
    with pytest.raises(UsageError, match="both 'z.weight' and 'a.bias' the name 'x'"):
        load(written, choice_func=lambda _: "x")
    tied = load(written, name_map={"u": "z.weight", "v": "z.weight", "a.bias": "z.weight"})
    assert {tied[name].shape for name in ("u", "v", "a.bias", "z.weight")} == {(7, 9)}
    for names in ("zzz", ["note", "zzz"]):
        with pytest.raises(UsageError, match="no parameter like 'zzz', but for example"):
            load(written, names=names)
    with pytest.raises(ArgumentTypeError):
        load(written, names=[1])  # type: ignore[list-item]


def test_what_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must end in .safetensors"):
        load(written, format="safetensors")
    with pytest.raises(UsageError, match="format must be one of"):
        load(written, format="onnx")
    for name in ("nothing.ckpt", "no/dir"):
        with pytest.raises(DiscoveryError, match="no such file or directory"):
            load(tmp_path / name)
    with pytest.raises(DiscoveryError, match="no such file or directory"):
        load_checkpoint(tmp_path / "none.ckpt")
    source(tmp_path / "src")
    with pytest.raises(DiscoveryError, match="the strategy that cut them is needed"):
        load(tmp_path / "src" / "shards")


def test_a_missing_shard_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    root = source(tmp_path / "src")
    os.unlink(root / "shards" / "rank_1" / "net.safetensors")
    os.unlink(root / "shards" / "rank_3" / "net.safetensors")
    held = load(root / "shards", root / "strategy.ckpt")
    assert same(held["d.w"].numpy(), arrays(0)["d.w"])  # whole on every rank
    with pytest.raises(CoverageError, match=r"'b.w'.*rank"):
        held["b.w"].numpy()
    assert same(held["global_step"].numpy(), scalars(0)["global_step"])


def test_text_that_is_none_is_our_error(written: Path) -> None:
    raw = bytearray(written.read_bytes())
    at = raw.index("nöte".encode("utf-32-le"))
    raw[at : at + 4] = b"\xff" * 4
    written.write_bytes(raw)
    with pytest.raises(FormatError, match="not UTF-32"):
        load(written)["note"]


def test_files_are_closed_with_the_last_reference(written: Path) -> None:
    gc.collect()  # other tests' files, so that they are not closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    held = load(written)
    _ = held["z.weight"][0]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del held, _
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_reads_its_slices_and_little_more(kind: str, rank: int, tmp_path: Path) -> None:
    """At most 1.05 times the bytes of one of eight ranks' slices (dp2 tp4, rows and columns), and the index."""
    layouts = {
        "rows": Layout((2, 4), ((0,), ())),
        "columns": Layout((2, 4), ((), (0,))),
        "zero": Layout((2, 4), ((0,), ()), 1, -1),
        "experts": Layout((2, 4), ((1,), (), (0,))),
    }
    shapes = {"rows": (512, 256), "columns": (64, 8192), "zero": (512, 256), "experts": (4, 8, 8192)}
    specs = [TensorSpec(name, DTYPES["F32"], shape) for name, shape in shapes.items()]
    full = {name: np.random.default_rng(len(name)).standard_normal(shape, np.float32) for name, shape in shapes.items()}
    path = tmp_path / f"net.{kind}"
    if kind == "safetensors":
        save_file(full, path)
    else:
        laid = ckpt_writer.layout(specs, piece=100 * KIB)
        with path.open("wb") as file:
            for offset, literal in laid.literals:
                file.seek(offset)
                file.write(literal)
            for name, entry in laid.tensors.items():
                data = full[name].tobytes()
                for offset, length in entry.extents:
                    file.seek(offset)
                    file.write(data[:length])
                    data = data[length:]
    with load(path) as held:
        wanted = 0
        for name, layout in layouts.items():
            box = layout.region(rank, shapes[name])
            value = held[name]
            assert isinstance(value, LazyTensor)
            assert same(value[box.slices], full[name][box.slices])
            wanted += full[name][box.slices].nbytes
        assert wanted <= held.count.nbytes <= 1.05 * wanted
