"""What a target's strategy does not list is kept, or a line in the log says what was left out, and how much."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext import load, load_distributed_checkpoint, rank_list_for_transform, transform_checkpoints
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import LayoutMismatchError
from tests.support.outside import Source, layouts_file, slices
from tests.support.outside_jobs import held_by, reshard, reshard_by_rank, save, transform

W = np.arange(32, dtype=np.float32).reshape(8, 4)
FOUR, TWO, EVERYWHERE = Layout((4,), ((0,), ())), Layout((2,), ((0,), ())), Layout((4,), ((), ()))
STEP = np.array([7], np.int32)


def made(root: Path, layouts: dict[str, Layout], outside: dict[str, np.ndarray]) -> Source:
    """Four ranks; every parameter is `W` plus its length of name, cut as `layouts` say."""
    for rank in range(4):
        held = {name: slices(layout, W + len(name), 4)(rank) for name, layout in layouts.items()}
        (root / f"src/rank_{rank}").mkdir(parents=True)
        save_file({**held, **outside}, root / f"src/rank_{rank}/net.safetensors", {"format": "ms"})
    strategy = layouts_file(root / "src.ckpt", **{name: {0: layout} for name, layout in layouts.items()})
    return Source(root / "src", strategy, {})


def whole(name: str) -> bytes:
    return bytes((W + len(name)).tobytes())


def target(root: Path, *names: str, layout: Layout = TWO) -> Path:
    return layouts_file(root / "dst.ckpt", **{name: {0: layout} for name in names})


@pytest.mark.parametrize("recut", [save, transform, reshard, reshard_by_rank])
def test_what_is_whole_is_kept_whole(recut: Any, tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": EVERYWHERE}, {"step": STEP, "other": W})
    out = recut(held, tmp_path / "out", target(tmp_path, "w"))
    for rank in range(2):
        found = held_by(out, rank)
        assert found["frozen"] == whole("frozen") and found["other"] == W.tobytes() and found["step"] == STEP.tobytes()
        assert found["w"] == (W + 1)[4 * rank : 4 * rank + 4].tobytes()


@pytest.mark.parametrize("recut", [save, transform, reshard, reshard_by_rank])
def test_what_is_cut_is_kept_by_the_same_ranks(recut: Any, tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": Layout((4,), ((), (0,)))}, {"step": STEP})
    out = recut(held, tmp_path / "out", target(tmp_path, "w", layout=FOUR))
    for rank in range(4):
        assert held_by(out, rank)["frozen"] == np.ascontiguousarray((W + 6)[:, rank : rank + 1]).tobytes()


@pytest.mark.parametrize("recut", [save, transform, reshard, reshard_by_rank])
def test_what_is_cut_and_wanted_by_nobody_is_an_error(recut: Any, tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": FOUR}, {"step": STEP})
    with pytest.raises(LayoutMismatchError, match=r"'frozen' is cut by .*src.ckpt.*dst.ckpt.*Give its layout"):
        recut(held, tmp_path / "out", target(tmp_path, "w"))
    out = recut(held, tmp_path / "left", target(tmp_path, "w"), **_without("frozen", recut))
    assert held_by(out, 1).keys() == {"w", "step"}
    supplied: Any = [target(tmp_path, "w"), {"frozen": ((2,), (-1, -1))}]
    if recut is not reshard_by_rank:
        assert held_by(recut(held, tmp_path / "given", supplied), 1)["frozen"] == whole("frozen")


def _without(name: str, recut: Any) -> dict[str, Any]:
    return {"choice_func": lambda each: each != name}


@pytest.mark.parametrize("layout", [Layout((1,), ((), ())), None])
def test_one_device_takes_everything_whole(layout: Any, tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": FOUR}, {"step": STEP})
    wanted: Any = target(tmp_path, "w", layout=layout) if layout else None
    found = held_by(reshard(held, tmp_path / "out", wanted), 0)
    assert found == {"w": whole("w"), "frozen": whole("frozen"), "step": STEP.tobytes()}


STATES = {"w": FOUR, "adam_m.w": FOUR, "adam_v.w": FOUR, "moments.w": EVERYWHERE}


@pytest.mark.parametrize("recut", [save, reshard, reshard_by_rank])
def test_a_target_without_an_optimizer(recut: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = made(tmp_path, STATES, {"step": STEP})
    out = recut(held, tmp_path / "out", target(tmp_path, "w"))
    assert held_by(out, 0).keys() == {"w", "step"}
    assert "3 parameters of 384 bytes, optimizer states" in caplog.text and "'adam_m.w', 'adam_v.w'" in caplog.text


def test_transform_keeps_optimizer_states_or_names_them(tmp_path: Path) -> None:
    """As stock, which keeps what is whole; of what is cut it writes a raw slice."""
    held = made(tmp_path, {"w": FOUR, "moments.w": EVERYWHERE}, {"step": STEP})
    found = held_by(transform(held, tmp_path / "out", target(tmp_path, "w")), 1)
    assert found["moments.w"] == whole("moments.w")
    held = made(tmp_path / "cut", STATES, {"step": STEP})
    with pytest.raises(LayoutMismatchError, match="'adam_m.w' .and 1 more"):
        transform(held, tmp_path / "refused", target(tmp_path, "w"))


def test_one_rank_of_one_pipeline_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The strategy may be that of the rank's stage: trained parameters that it does not list are other stages'."""
    layouts = {"w": FOUR, "adam_m.w": FOUR, "v": FOUR, "adam_m.v": FOUR, "frozen": EVERYWHERE}
    held = made(tmp_path, layouts, {"step": STEP})
    wanted = layouts_file(tmp_path / "stage.ckpt", **{"v": {1: TWO}, "adam_m.v": {1: TWO}})
    load_distributed_checkpoint(
        None, None, wanted, held.strategy, format="safetensors", unified_safetensors_dir=held.shards,
        dst_safetensors_dir=tmp_path / "out", rank_id=3,
    )  # fmt: skip
    assert held_by(tmp_path / "out", 3).keys() == {"v", "adam_m.v", "frozen", "step"}
    assert "2 parameters of 256 bytes, trained parameters" in caplog.text


@pytest.mark.parametrize("recut", [save, transform, reshard, reshard_by_rank])
def test_what_a_name_map_gives_to_a_listed_name_is_used_up(recut: Any, tmp_path: Path) -> None:
    held = made(tmp_path, {"model.w": FOUR}, {"model.step": STEP, "other": W})
    names = {"w": "model.w", "v": "other", "step": "model.step"}
    out = recut(held, tmp_path / "out", target(tmp_path, "w", "v"), name_map=names)
    assert held_by(out, 1).keys() == {"w", "v", "step"}
    both = target(tmp_path, "w", "model.w")
    assert held_by(recut(held, tmp_path / "both", both, name_map={"w": "model.w"}), 1).keys() >= {"w", "model.w"}


def test_one_stage_of_a_source_cuts_what_the_target_lists(tmp_path: Path) -> None:
    """The files of stage 0's part: what the source has whole outside its strategy is cut as the target says."""
    held = made(tmp_path, {"w": FOUR}, {"frozen": W, "step": STEP})
    ms_ckpt_ext.convert(held.shards, tmp_path / "ckpt", to="ckpt")
    wanted = target(tmp_path, "w", "frozen", "elsewhere")
    transform_checkpoints(tmp_path / "ckpt", tmp_path / "out", "net", held.strategy, wanted)
    for rank in range(2):
        with load(tmp_path / f"out/rank_{rank}/net{rank}_part0.ckpt") as found:
            assert found["frozen"][...].tobytes() == W[4 * rank : 4 * rank + 4].tobytes()
            assert set(found) == {"w", "frozen", "step"}


def test_a_whole_checkpoint_keeps_all_it_has(tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": FOUR, "adam_m.w": FOUR}, {"step": STEP})
    ms_ckpt_ext.merge(held.shards, tmp_path / "merged", strategy=held.strategy)
    ms_ckpt_ext.reshard(tmp_path / "merged", tmp_path / "out", to_strategy=target(tmp_path, "w", "adam_m.w"))
    for rank in range(2):
        found = held_by(tmp_path / "out", rank)
        assert found.keys() == {"w", "frozen", "adam_m.w", "step"} and found["frozen"] == whole("frozen")


def test_what_is_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    held = made(tmp_path, {"w": FOUR}, {"step": STEP, "accu_grads.w": W, "accu_grads_scale": STEP, "accu_gradsX.w": W})
    reshard(held, tmp_path / "out", target(tmp_path, "w"), choice_func=lambda name: name != "step")
    assert "choice_func leaves out 1 parameters, 16 bytes: 'step'" in caplog.text
    assert "1 accumulated gradients of 128 bytes" in caplog.text and "'accu_grads.w'" in caplog.text
    assert held_by(tmp_path / "out", 1).keys() == {"w", "accu_grads_scale", "accu_gradsX.w"}


def test_rank_0_alone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = made(tmp_path, {"w": EVERYWHERE}, {"step": STEP})
    transform_checkpoints(held.shards, tmp_path / "out", "net", None, target(tmp_path, "w"), 1, "safetensors")
    assert "rank 0 is taken for the whole model, and those of ranks 1, 2, 3 are passed over" in caplog.text


def test_globs_leave_out_what_differs(tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "v": FOUR}, {"step": STEP})
    for rank in range(4):
        path = tmp_path / f"src/rank_{rank}/net.safetensors"
        save_file({**load_file(path), "dense.frozen": W[2 * rank : 2 * rank + 2]}, path, {"format": "ms"})
    with pytest.raises(LayoutMismatchError, match="'dense.frozen'"):
        ms_ckpt_ext.merge(held.shards, tmp_path / "merged", strategy=held.strategy, exclude="v")
    ms_ckpt_ext.merge(held.shards, tmp_path / "merged", strategy=held.strategy, exclude="dense.*")
    with load(tmp_path / "merged") as found:
        assert set(found) == {"w", "v", "step"}


def test_the_same_ranks_list_themselves(tmp_path: Path) -> None:
    layouts_file(tmp_path / "a.ckpt", w={0: EVERYWHERE}, v={0: Layout((2, 2), ((), ()), 1, 2)})
    for rank in range(4):
        found = rank_list_for_transform(rank, tmp_path / "a.ckpt", tmp_path / "a.ckpt")
        assert rank in found


def test_encrypted_and_ckpt_sources_keep_too(tmp_path: Path) -> None:
    held = made(tmp_path, {"w": FOUR, "frozen": EVERYWHERE}, {"step": STEP, "alike": W})
    key = b"0123456789abcdef"
    ms_ckpt_ext.convert(held.shards, tmp_path / "ckpt", to="ckpt", enc_key=key)
    transform_checkpoints(
        tmp_path / "ckpt", tmp_path / "out", "net", held.strategy, target(tmp_path, "w"), dec_key=key
    )  # fmt: skip
    with load(tmp_path / "out/rank_1/net1.ckpt") as found:
        assert set(found) == {"w", "frozen", "step", "alike"}
        assert found["frozen"][...].tobytes() == whole("frozen") and found["alike"][...].tobytes() == W.tobytes()
