"""What rules make lands on the device: two ranks of the emulated Ascend, exchanged and read directly, cast and not.

An adapter in a folder of its own is added on the way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.adapters import products, save_adapter, with_adapter
from tests.support.checkpoints import cut, strategy_of
from tests.support.quantised import Tensor, dequantised, save

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
ROWS, COLUMNS = ((0,), ()), ((), (0,))


def test_rules_on_two_ranks(tmp_path: Path) -> None:
    emulator_or_skip()
    rng = np.random.default_rng(11)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    held = {"h.0.q": draw(16, 6), "h.0.k": draw(8, 6), "h.0.v": draw(8, 6)}
    held |= {"h.0.gate": draw(6, 4), "h.0.up": draw(6, 4), "h.0.out": draw(6, 10)}
    held |= {f"h.0.e.{n}.{name}": draw(4, 6) for n in range(4) for name in ("gate", "up", "down")}
    held |= {f"h.0.{name}": rng.integers(0, 255, (6, 3)).astype(np.uint8) for name in ("small", "narrow")}
    held["h.0.lora.weight"] = draw(6, 4)
    adapter = products(held, ["h.0.lora"])
    save_adapter(tmp_path / "lora", adapter, target_modules=["lora"])
    (tmp_path / "hf").mkdir()
    blocks: dict[str, Tensor] = {}
    floats = []
    for name, shape in (("q", (8, 10)), ("k", (4, 10))):
        elements, scales = rng.integers(0, 126, shape, dtype=np.uint8), rng.standard_normal((3, 3)).astype(np.float32)
        scales = scales[: -(-shape[0] // 3)]
        blocks |= {f"h.0.{name}.weight": Tensor("F8_E4M3", elements)}
        blocks |= {f"h.0.{name}.weight_scale_inv": Tensor("F32", scales)}
        floats.append(dequantised(blocks[f"h.0.{name}.weight"], "F8_E4M3", Tensor("F32", scales), "F32", (3, 4), "F32"))
    plain = {name: Tensor("F32" if array.dtype == np.float32 else "U8", array) for name, array in held.items()}
    save({**plain, **blocks}, tmp_path / "hf/model.safetensors")
    halves = np.split(floats[0] * np.float32(0.5), 2), np.split(floats[1], 2)

    def grouped(groups: int) -> np.ndarray:
        return np.concatenate([held[f"h.0.{n}"].reshape(groups, -1, 6) for n in "qkv"], axis=1).reshape(-1, 6)

    pairs = [np.concatenate([held[f"h.0.e.{n}.{name}"].T for name in ("gate", "up")], axis=1) for n in range(4)]
    full = {
        "qkv": grouped(4),
        "odd_qkv": grouped(2),
        "fc1": np.stack([held["h.0.gate"], held["h.0.up"]], axis=1).reshape(-1, 4),
        "out": np.ascontiguousarray(held["h.0.out"].T),
        "stacked": np.stack([held[f"h.0.e.{n}.down"] for n in range(4)]),
        "experts": np.concatenate(pairs),
        "floats": np.concatenate([halves[0][0], halves[1][0], halves[0][1], halves[1][1]]),
        "padded": np.concatenate([held["h.0.e.0.down"], np.full((10, 6), 2.5, np.float32)]),
        "adapted": with_adapter(held, adapter, 5 / 3)["h.0.lora.weight"],
        "bytes": np.stack([held["h.0.small"], held["h.0.narrow"]], axis=1).reshape(-1, 3),
    }
    layouts = {"qkv": ROWS, "odd_qkv": COLUMNS, "fc1": ROWS, "out": ROWS, "experts": ROWS, "bytes": ROWS}
    layouts |= {"floats": COLUMNS, "padded": ROWS, "adapted": COLUMNS}
    predicted = {name: Layout((2,), cuts) for name, cuts in layouts.items()}
    predicted["stacked"] = Layout((2,), ((0,), (), ()))
    cut(strategy_of(predicted, tmp_path / "predicted.ckpt"), full, tmp_path / "expected")
    result = run_msrun(
        Path(__file__).with_name("rules_worker.py"), tmp_path, ranks=2, device="ascend", tmp_path=tmp_path
    )
    for mode in ("cooperative", "direct"):
        for cast in (False, True):
            assert f"{mode} {cast} is right" in result.worker(1)
