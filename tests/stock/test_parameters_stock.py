"""Parameter dicts side by side with stock MindSpore: names, dtypes, shapes, bytes; arguments and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.errors import ChecksumError, DiscoveryError, UsageError
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import TensorSpec
from ms_ckpt_ext.formats.registry import read_index

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CASE = "formats_dp2_tp4_zero"
KEY = b"0123456789ABCDEF"


def described(parameters: dict[str, Any]) -> dict[str, Any]:
    """Everything about a parameter dict that can be compared."""
    return {
        name: value if isinstance(value, str) else (str(value.dtype), value.shape, bytes(value.get_bytes()))
        for name, value in parameters.items()
    }


@pytest.fixture(scope="module")
def saved(ms: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One `.ckpt` of every dtype that stock saves, with text, and one safetensors file."""
    root = tmp_path_factory.mktemp("saved")
    rng = np.random.default_rng(0)
    held = {
        "f32": ms.Tensor(rng.standard_normal((3, 4)).astype(np.float32)),
        "bf16": ms.Tensor(rng.standard_normal(5).astype(np.float32), ms.bfloat16),
        "f16": ms.Tensor(rng.standard_normal(5).astype(np.float16)),
        "i8": ms.Tensor(rng.integers(-9, 9, (2, 2)).astype(np.int8)),
        "step": ms.Tensor(7, ms.int32),
        "rate": ms.Tensor([0.5], ms.float32),
        "int4": ms.Tensor(rng.integers(-100, 100, (2, 3)).astype(np.int8), dtype=ms.qint4x2),
    }
    listed = [{"name": name, "data": data} for name, data in held.items()]
    ms.save_checkpoint(listed, str(root / "net.ckpt"), append_dict={"note": "hü", "flag": True}, crc_check=True)
    ms.save_checkpoint(listed[:6], str(root / "net.safetensors"), format="safetensors")
    return root


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"crc_check": True},
        {"choice_func": lambda name: name in ("bf16", "note")},
        {"specify_prefix": "f"},
        {"specify_prefix": ["f", "i"], "filter_prefix": ("f1",), "choice_func": lambda _: False},
    ],
)
def test_load_checkpoint(more: dict[str, Any], ms: Any, saved: Path) -> None:
    for kind in ("ckpt", "safetensors"):
        if kind == "safetensors" and "prefix" in str(more):
            continue  # stock ignores prefixes there
        path = str(saved / f"net.{kind}")
        fails = kind == "safetensors" and "crc_check" in more  # stock cannot digest bfloat16
        stock = ms.load_checkpoint(path, format=kind, **({} if fails else more))
        ours = ms_ckpt_ext.load_checkpoint(path, format=kind, **more)
        assert described(ours) == described(stock)
        assert stock


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_encrypted_checkpoints(mode: str, ms: Any, golden: Path) -> None:
    folder = golden / CASE / f"ckpt_{mode.lower().replace('-', '_')}" / "rank_0"
    path = str(next(folder.glob("*.ckpt")))
    stock = described(ms.load_checkpoint(path, dec_key=KEY, dec_mode=mode))
    assert described(ms_ckpt_ext.load_checkpoint(path, dec_key=KEY, dec_mode=mode)) == stock
    with ms_ckpt_ext.load(path, dec_key=KEY) as held:
        assert described(ms_ckpt_ext.as_parameters(held)) == stock


def test_into_a_network(ms: Any, tmp_path: Path) -> None:
    one, two, three = (ms.nn.Dense(3, 4) for _ in range(3))
    path = str(tmp_path / "net.ckpt")
    ms.save_checkpoint(one, path)
    ms.load_checkpoint(path, two)
    ms_ckpt_ext.load_checkpoint(path, three)
    assert described(three.parameters_dict()) == described(two.parameters_dict()) == described(one.parameters_dict())


def test_segments(ms: Any, tmp_path: Path) -> None:
    nets = [ms.nn.SequentialCell(ms.nn.Dense(3, 4), ms.nn.Dense(4, 2)) for _ in range(3)]
    listed = [{"name": p.name, "data": p} for p in nets[0].get_parameters()]
    for number in range(2):
        ms.save_checkpoint(listed[2 * number : 2 * number + 2], str(tmp_path / f"part{number}.ckpt"))
    stock = ms.load_segmented_checkpoints(str(tmp_path), nets[1])
    ours = ms_ckpt_ext.load_segmented_checkpoints(str(tmp_path), nets[2])
    assert described(ours) == described(stock)
    assert described(nets[2].parameters_dict()) == described(nets[1].parameters_dict())
    chosen = ms_ckpt_ext.load_segmented_checkpoints(str(tmp_path), choice_func=lambda name: name.startswith("0"))
    assert sorted(chosen) == ["0.bias", "0.weight"]


def test_a_parameter_in_two_segments(ms: Any, tmp_path: Path) -> None:
    """The same in both, it is loaded as by stock; else nobody knows which one is meant."""

    def save(name: str, append: dict[str, Any], **arrays: np.ndarray) -> None:
        listed = [{"name": n, "data": ms.Parameter(ms.Tensor(array))} for n, array in arrays.items()]
        ms.save_checkpoint(listed, str(tmp_path / name), append_dict=append)

    save("part0.ckpt", {"epoch": 3, "note": "hi"}, x=np.arange(3, dtype="f4"))
    save("part1.ckpt", {"epoch": 3}, y=np.arange(4, dtype="f4"), z=np.arange(6, dtype="f4"))
    stock = ms.load_segmented_checkpoints(str(tmp_path))
    assert described(ms_ckpt_ext.load_segmented_checkpoints(str(tmp_path))) == described(stock)
    for z in (np.arange(1, 7, dtype="f4"), np.arange(6, dtype="i4"), np.arange(6, dtype="f4").reshape(2, 3)):
        save("part2.ckpt", {"epoch": 3}, z=z)
        with pytest.raises(DiscoveryError, match="'z' is in 'part1.ckpt' and, not the same, in 'part2.ckpt'"):
            ms_ckpt_ext.load_segmented_checkpoints(str(tmp_path))
        assert "x" in ms_ckpt_ext.load_segmented_checkpoints(str(tmp_path), choice_func=lambda name: name != "z")


@pytest.mark.parametrize(
    "call",
    [
        lambda m, p: m.load_segmented_checkpoints(str(p / "nothing")),
        lambda m, p: m.load_segmented_checkpoints(5),
        lambda m, p: m.load_checkpoint(str(p / "nothing.ckpt")),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), format="safetensors"),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), format="onnx"),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), choice_func=lambda _: False),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), choice_func=lambda name: name.startswith(123)),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), specify_prefix=[]),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), filter_prefix=5),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), dec_key="text"),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), dec_key=b"x" * 16),
        lambda m, p: m.load_checkpoint(str(p / "net.ckpt"), net=5),
    ],
)
def test_what_stock_refuses_is_refused_with_the_same_built_in_error(call: Any, ms: Any, saved: Path) -> None:
    with pytest.raises((ValueError, TypeError, OSError)) as stock:
        call(ms, saved)
    with pytest.raises((ValueError, TypeError, OSError)) as ours:
        call(ms_ckpt_ext, saved)
    assert isinstance(ours.value, (TypeError,) if stock.type is TypeError else (ValueError, OSError))


def test_a_flipped_byte_under_a_checksum(ms: Any, saved: Path, tmp_path: Path) -> None:
    raw = bytearray((saved / "net.ckpt").read_bytes())
    raw[read_index(str(saved / "net.ckpt")).tensors["f32"].extents[0].offset] ^= 1
    (tmp_path / "net.ckpt").write_bytes(raw)
    with pytest.raises(ValueError, match="Failed to read the checkpoint"):
        ms.load_checkpoint(str(tmp_path / "net.ckpt"), crc_check=True)
    with pytest.raises(ChecksumError):
        ms_ckpt_ext.load_checkpoint(str(tmp_path / "net.ckpt"), crc_check=True)
    assert (
        ms_ckpt_ext.load_checkpoint(str(tmp_path / "net.ckpt")).keys()
        == ms.load_checkpoint(str(tmp_path / "net.ckpt")).keys()
    )


def public(module: Any) -> dict[str, Any]:
    found = {}
    for name in dir(module):
        try:
            found[name] = inspect.signature(getattr(module, name)).parameters
        except (TypeError, ValueError):
            continue
    return found


def test_arguments_are_mindspores(ms: Any) -> None:
    """Each function of MindSpore's that we have takes its arguments, in its order; more of ours are keywords."""
    stock, ours = public(ms), public(ms_ckpt_ext)
    both = {name for name in ms_ckpt_ext.__all__ if name in stock} - {
        "export",
        "load",
        "reshard",
    }  # these are of graphs and tensors there
    assert {"load_checkpoint", "load_segmented_checkpoints", "unified_safetensors", "ckpt_to_safetensors"} <= both
    for name in both:
        theirs = [(p.name, p.default) for p in stock[name].values()]
        assert [(p.name, p.default) for p in ours[name].values()][: len(theirs)] == theirs
        assert all(p.kind is p.KEYWORD_ONLY for p in list(ours[name].values())[len(theirs) :])


def test_crc_check_is_wherever_mindspore_has_it(ms: Any) -> None:
    """Every reader: MindSpore's one, and ours that verify what they read. Its two writers save networks, not files."""
    stock = {name for name, arguments in public(ms).items() if "crc_check" in arguments}
    ours = {name for name, arguments in public(ms_ckpt_ext).items() if "crc_check" in arguments}
    assert stock == {"load_checkpoint", "save_checkpoint", "CheckpointConfig"}
    assert ours >= {"load_checkpoint", "load", "convert", "unified_safetensors", "load_distributed_checkpoint"}


def test_eight_bit_floats(ms: Any, tmp_path: Path) -> None:
    """Stock cannot load them from either format; a dtype that MindSpore lacks is an error by name."""
    specs = [TensorSpec("a", DTYPES["F8_E4M3"], (2, 2)), TensorSpec("b", DTYPES["F8_E5M2"], (3,))]
    laid = safetensors.layout([*specs, TensorSpec("c", DTYPES["F8_E8M0"], (1,))], {})
    (tmp_path / "net.safetensors").write_bytes(laid.literals[0][1] + bytes(range(8)))
    with ms_ckpt_ext.load(tmp_path / "net.safetensors") as held:
        found = ms_ckpt_ext.as_parameters(held, ["a", "b"])
        assert {name: str(value.dtype) for name, value in found.items()} == {"a": "Float8E4M3FN", "b": "Float8E5M2"}
        assert described(found) == {
            name: (str(value.dtype), value.shape, held[name].numpy().tobytes()) for name, value in found.items()
        }
        with pytest.raises(UsageError, match="'c' is F8_E8M0, which this MindSpore has no dtype for"):
            ms_ckpt_ext.as_parameters(held)
