"""Ranks that lost what they held, among others that did not, by processes of the CPU and of the emulated Ascend.

dp 2, tp 2, two parameters cut four ways by optimizer sharding; one or two ranks hold poison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext.core.geometry.layout import Layout
from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.checkpoints import arrays, cut, read_file, scalars, strategy_of
from tests.support.saved import RANKS, note, save

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("peers_worker.py")
STEP = 3
PARAMETER = 64 * 32 * 4
"""Bytes. Of `a.w` and `c.w` each rank holds a quarter, of `b.w` half, which one other has too; of `d.w` all."""
SCALARS = 8
_NUMPY = {"F32": np.float32, "I32": np.int32}


def saved_alike(root: Path) -> Path:
    """A checkpoint of this job, in which everything is wrong that any one rank of two holds."""
    save(root / "alike", STEP)
    for path in (root / "alike").glob("rank_*/*.safetensors"):
        held = {name: np.frombuffer(t.data, _NUMPY[t.dtype]).reshape(t.shape) for name, t in read_file(path).items()}
        wrong = {name: np.full_like(held[name], 99) for name in ("b.w", "d.w", "learning_rate")}
        save_file({**held, **wrong}, path, {"format": "ms"})
    return root / "alike"


def saved_by_two(root: Path) -> Path:
    """The same step as two ranks would have left it; wrong in the same things."""
    layouts = {"a.w": ((0,), ()), "b.w": ((), (0,)), "c.w": ((), (0,)), "d.w": ((), ())}
    strategy = strategy_of({name: Layout((2,), axes) for name, axes in layouts.items()}, root / "two.ckpt")
    full = {name: a if name in "a.w c.w" else np.full_like(a, 99) for name, a in arrays(STEP).items()}
    extras = {**scalars(STEP), "learning_rate": np.array(99, np.float32)}
    for path in cut(strategy, full, root / "two", extras).glob("rank_*/net.safetensors"):
        rank = int(path.parent.name[5:])
        note(path.rename(path.with_name(f"net-1_{STEP}.safetensors")), rank, STEP, None if rank else strategy, 2)
    return root / "two"


def case(name: str, root: Path, lost: Sequence[int], mode: str = "direct", steps: Sequence[int] = (STEP,) * RANKS,
         **more: Any) -> dict[str, Any]:  # fmt: skip
    made = root.parent / f"made_{STEP}"
    return {
        "name": name, "root": root, "lost": [*lost], "steps": [*steps], "mode": mode, "held": made / "shards",
        "predicted": made / "strategy.ckpt", "bucket": 4096, "verify": "none", **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "ahead"),
    [("cpu", "0"), *(pytest.param("ascend", ahead, marks=pytest.mark.ascend) for ahead in "01")],
)
def test_only_what_no_rank_holds_is_read(device: str, ahead: str, tmp_path: Path) -> None:
    if device == "ascend":
        emulator_or_skip()
        if ahead == "0":
            long_one("streams that do not run ahead hide faults")
    alike, two = saved_alike(tmp_path), saved_by_two(tmp_path)
    right = [
        case("one rank", alike, [2]),
        case("two ranks", alike, [0, 3], "cooperative", verify="replicas"),
        case("one rank, from two", two, [2], "cooperative"),
        case("two ranks, from two", two, [0, 3]),
    ]
    refused = [
        case("another step", alike, [2], steps=[5] * RANKS, says="of step 5, and the checkpoint"),
        case("steps", alike, [1], steps=[3, 3, 3, 4], says="ranks 0, 2: step 3; rank 3: step 4"),
    ]
    (tmp_path / "cases.json").write_text(json.dumps([*right, *refused], default=str))
    result = run_msrun(
        WORKER, tmp_path / "cases.json", device, ranks=RANKS, device=device, tmp_path=tmp_path,
        env={"CANNEMU_ASYNC": ahead, "CANNEMU_POISON": ahead},
    )  # fmt: skip
    told: dict[str, list[dict[str, Any]]] = {}
    for rank in range(RANKS):
        lines = result.worker(rank).splitlines()
        assert all(f"case {each['name']} is right" in lines for each in (*right, *refused))
        for line in lines:
            if line.startswith("PEERS "):
                found = json.loads(line[6:])
                told.setdefault(found["case"], []).append(found)
    given = PARAMETER // 2 + PARAMETER + SCALARS
    for each in right:
        ranks, lost = told[each["name"]], each["lost"]
        assert [rank["given"] for rank in ranks] == [given if rank in lost else 0 for rank in range(RANKS)]
        least, read = len(lost) * PARAMETER // 2, sum(rank["read"] for rank in ranks)  # quarters of `a.w` and of `c.w`
        assert read == least or (each["mode"] == "direct" and read == least + PARAMETER // 2), "and `b.w` between them"
        assert {(rank["step"], rank["mode"]) for rank in ranks} == {(STEP, each["mode"])}
