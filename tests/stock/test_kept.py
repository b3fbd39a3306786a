"""What the source has and the target's strategy does not list is kept as stock MindSpore keeps it, where it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.support.formats import contents
from tests.support.outside import layouts_file, slices

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

W = np.arange(32, dtype=np.float32).reshape(8, 4)
FROZEN, STEP = W + 100, np.array([7], np.int32)
WHOLE = {"w": W, "frozen": FROZEN, "global_step": STEP, "learning_rate": np.array([0.5], np.float32)}
WHOLE |= {"epoch_num": np.array([3], np.int64), "adam_m.w": W * 2, "accu_gradsX.w": W * 3, "accu_grads_scale": STEP}
FOUR, TWO = Layout((4,), ((0,), ())), Layout((2,), ((0,), ()))
COLUMNS, EVERYWHERE = Layout((2,), ((), (0,))), Layout((4,), ((), ()))


def rank_files(root: Path, held: dict[int, dict[str, np.ndarray]], form: str, ms: Any) -> Path:
    for rank, tensors in held.items():
        folder = root / f"rank_{rank}"
        folder.mkdir(parents=True)
        if form == "safetensors":
            save_file(tensors, folder / "net.safetensors", {"format": "ms"})
        else:
            named = [{"name": name, "data": ms.Tensor(array)} for name, array in tensors.items()]
            ms.save_checkpoint(named, str(folder / "net.ckpt"))
    return root


def both(ms: Any, source: Path, made: Any, wanted: Any, form: str) -> None:
    """Both packages write the same tensors into the same files."""
    root = source.parent
    arguments = (str(source), made and str(made), str(wanted))
    for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
        package.transform_checkpoints(arguments[0], str(root / who), "net", *arguments[1:], 1, form)
    files = sorted(str(path.relative_to(root / "stock")) for path in (root / "stock").rglob("rank_*/*.*"))
    for file in files:
        theirs, ours = (contents(root / who / file) for who in ("stock", "ours"))
        assert theirs == ours and len(theirs) > 1
    assert len(files) >= 2


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_a_whole_checkpoint_for_a_strategy_of_trainable_parameters(form: str, ms: Any, tmp_path: Path) -> None:
    source = rank_files(tmp_path / "src", {0: WHOLE}, form, ms)
    both(ms, source, None, layouts_file(tmp_path / "dst.ckpt", w={0: TWO}), form)
    held = contents(tmp_path / f"ours/rank_1/net1.{form}")
    assert held.keys() == WHOLE.keys() and held["global_step"].data == STEP.tobytes()
    assert held["frozen"].data == FROZEN.tobytes()


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_frozen_parameter_that_the_target_does_not_list(listed: bool, form: str, ms: Any, tmp_path: Path) -> None:
    held = {r: {"w": W[2 * r : 2 * r + 2], "frozen": FROZEN, "global_step": STEP} for r in range(4)}
    source = rank_files(tmp_path / "src", held, form, ms)
    frozen = {"frozen": {0: EVERYWHERE}} if listed else {}
    made = layouts_file(tmp_path / "src.ckpt", w={0: FOUR}, **frozen)
    both(ms, source, made, layouts_file(tmp_path / "dst.ckpt", w={0: TWO}), form)


@pytest.mark.parametrize(
    "wanted", [{"w": {0: TWO}, "v": {1: TWO}}, {"w": {0: COLUMNS}, "v": {1: COLUMNS}}, {"w": {0: TWO}, "v": {0: TWO}}]
)
def test_it_stays_with_its_pipeline_stage(wanted: Any, ms: Any, tmp_path: Path) -> None:
    halves = [slices(TWO, W, 2)(rank) for rank in range(2)]
    held: dict[int, dict[str, np.ndarray]] = {
        rank: {"w" if rank < 2 else "v": halves[rank % 2], "global_step": STEP} for rank in range(4)
    }
    for rank in (2, 3):
        held[rank]["frozen"] = FROZEN
    source = rank_files(tmp_path / "src", held, "ckpt", ms)  # of safetensors, stock writes columns as they lie in rows
    made = layouts_file(tmp_path / "src.ckpt", w={0: TWO}, v={1: TWO})
    both(ms, source, made, layouts_file(tmp_path / "dst.ckpt", **wanted), "ckpt")


def test_each_rank_its_own_and_no_junk(ms: Any, tmp_path: Path) -> None:
    """Cut in the source and unlisted in the target: a rank's own where the ranks are the same, else no raw slice."""
    held = {r: {"w": W[2 * r : 2 * r + 2], "frozen": FROZEN[2 * r : 2 * r + 2]} for r in range(4)}
    source = rank_files(tmp_path / "src", held, "safetensors", ms)
    made = layouts_file(tmp_path / "src.ckpt", w={0: FOUR}, frozen={0: FOUR})
    both(ms, source, made, layouts_file(tmp_path / "same.ckpt", w={0: FOUR}), "safetensors")
    assert contents(tmp_path / "ours/rank_3/net3.safetensors")["frozen"].data == FROZEN[6:].tobytes()
    wanted = layouts_file(tmp_path / "dst.ckpt", w={0: TWO})
    ms.transform_checkpoints(str(source), str(tmp_path / "junk"), "net", str(made), str(wanted), 1, "safetensors")
    assert contents(tmp_path / "junk/rank_1/net1.safetensors")["frozen"].data == FROZEN[2:4].tobytes()  # of rank 1 of 4
    with pytest.raises(LayoutMismatchError, match=r"'frozen' is cut by .*src.ckpt.*dst.ckpt.*does not list it"):
        ms_ckpt_ext.transform_checkpoints(source, tmp_path / "out", "net", made, wanted, 1, "safetensors")
