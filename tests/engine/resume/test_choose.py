"""Which checkpoint is taken: ranks as threads, real files, hosts that see all of them or some."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.resume.candidates import candidates, check_noted
from ms_ckpt_ext.engine.resume.newest import ResumeRequest, choose_checkpoint
from ms_ckpt_ext.engine.resume.sightings import look as look_at
from ms_ckpt_ext.engine.resume.trial_order import Order
from ms_ckpt_ext.errors import CheckpointError, DisagreementError, DiscoveryError
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.checkpoints import arrays, cut, scalars
from tests.support.saved import RANKS, look, no_note, note, save, step_of


def test_the_newest_is_taken_by_all(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        save(tmp_path / "c", step)
    chosen, skipped = look(tmp_path / "c")
    assert chosen is not None and skipped == ()
    assert chosen.candidate.title == "net-1_100.safetensors"
    assert step_of(chosen) == 100
    assert sorted(chosen.seen.indexes) == ["0", "1", "2", "3"]
    assert chosen.strategy is not None and chosen.strategy.world == RANKS


def test_without_notes_names_and_layouts_beside_are_used(tmp_path: Path) -> None:
    """MindFormers: checkpoint/rank_N/PREFIX_rank_N-EPOCH_STEP, strategy/ckpt_strategy_rank_N.ckpt."""
    root = tmp_path / "out" / "checkpoint"
    for step in (5, 10):
        save(root, step, noted=False, prefix="qwen_rank_{rank}")
    with pytest.raises(AssertionError):
        step_of(look(root)[0])
    for rank in range(RANKS):
        (tmp_path / "out" / "strategy").mkdir(exist_ok=True)
        target = tmp_path / "out" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
        shutil.copy(root.parent / "made_5" / "strategy.ckpt", target)
    assert step_of(look(root)[0]) == 10
    assert step_of(look(tmp_path / "out")[0]) == 10, "a folder above will do"
    (root / "rank_3" / "qwen_rank_3-1_10.safetensors").unlink()
    chosen, skipped = look(root)
    assert step_of(chosen) == 5
    assert "files of rank 3 are missing" in skipped[0].reason


def test_given_layouts_win(tmp_path: Path) -> None:
    save(tmp_path / "c", 5, noted=False)
    given = load_strategy(tmp_path / "made_5" / "strategy.ckpt")
    assert step_of(look(tmp_path / "c", strategy=given)[0]) == 5
    assert look(tmp_path / "c")[0] is None


def test_a_note_that_is_missing_is_no_missing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20)
    no_note(tmp_path / "c")
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 20 and skipped == ()
    assert "rank 3 did not record files of 'net-1_20.safetensors'" in caplog.text


def test_the_order_is_that_of_saving_not_of_names(tmp_path: Path) -> None:
    """A resumed run counts from 1 again: its first save is newer than the last of the run before."""
    save(tmp_path / "c", 900)
    save(tmp_path / "c", 50, prefix="net_1")
    assert step_of(look(tmp_path / "c")[0]) == 50


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (PermissionError(13, "Permission denied"), "cannot look into '.*rank_2': Permission denied"),
        (FileNotFoundError(2, "No such file or directory"), "no such checkpoint directory: '.*rank_2'"),
    ],
)
def test_what_one_host_cannot_look_into_ends_all(
    problem: OSError, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and the ranks of other hosts are told the reason."""
    save(tmp_path / "ckpt", 1)
    real, here = Path.iterdir, threading.local()

    def iterdir(path: Path) -> Any:
        if path.name == "rank_2" and here.rank == 1:
            raise problem
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    heard = []

    def rank(transport: LocalTransport) -> None:
        here.rank = transport.rank
        with pytest.raises(CheckpointError, match=words) as caught:
            choose_checkpoint(transport, ResumeRequest(str(tmp_path / "ckpt"), f"host {transport.rank}"))
        heard.append(str(caught.value))

    LocalWorld(2, timeout=20).run(rank)
    assert len(heard) == 2


def test_ranks_of_one_host_must_look_into_one_directory(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    with pytest.raises(DisagreementError, match="checkpoint_dir of rank 2 is .*other"):
        look(tmp_path / "c", where=lambda rank: tmp_path / ("other" if rank == 2 else "c"))
    with pytest.raises(DisagreementError, match="format"):
        LocalWorld(2, timeout=20).run(
            lambda t: choose_checkpoint(t, ResumeRequest(str(tmp_path / "c"), "one", kind=["ckpt", None][t.rank]))
        )


def test_hosts_with_local_disks_choose_from_what_all_see(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20)
    for host, gone in (("a", (2, 3)), ("b", (0, 1))):
        shutil.copytree(tmp_path / "c", tmp_path / host)
        for rank in gone:
            shutil.rmtree(tmp_path / host / f"rank_{rank}")
            for held in (tmp_path / host / "ms_ckpt_ext").glob(f"*/rank_{rank}.json"):
                held.unlink()
        for held in (tmp_path / host / "ms_ckpt_ext").glob("*/complete.json"):
            held.unlink()
    for layouts in (tmp_path / "b" / "ms_ckpt_ext").glob("*/strategy"):
        shutil.rmtree(layouts)  # its stage's first rank is on the other host
    local = {"host": lambda rank: "ab"[rank // 2], "where": lambda rank: tmp_path / "ab"[rank // 2]}
    assert step_of(look(tmp_path, **local)[0]) == 20
    (tmp_path / "b" / "rank_3" / "net-1_20.safetensors").unlink()
    chosen, skipped = look(tmp_path, **local)
    assert step_of(chosen) == 3 and "rank 3" in skipped[0].reason


def test_hosts_with_different_files_of_one_name(tmp_path: Path) -> None:
    save(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "rank_0" / "net-1_3.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    where = {"host": lambda rank: "ab"[rank % 2], "where": lambda rank: tmp_path / "ab"[rank % 2]}
    chosen, skipped = look(tmp_path, **where)
    assert chosen is None
    assert "hosts hold different files of rank 0" in skipped[0].reason


def test_data_parallel_ranks_hold_everything(tmp_path: Path) -> None:
    full = arrays(0)
    for rank in range(2):
        path = tmp_path / "c" / f"rank_{rank}" / "net-1_9.safetensors"
        path.parent.mkdir(parents=True)
        save_file({**full, **scalars(9)}, path)
        note(path, rank, 9, None, world=2, sharded=False)
    chosen, _ = look(tmp_path / "c")
    assert step_of(chosen) == 9
    assert chosen is not None and list(chosen.seen.indexes) == ["0"] and chosen.strategy is None


@pytest.mark.parametrize("trained", [False, True])
def test_ranks_that_noted_no_layouts_and_hold_different_things(trained: bool, tmp_path: Path) -> None:
    """What an optimizer has a state of is a slice, and is not taken for the whole; a rank's statistics may differ."""
    for rank in range(2):
        own = np.full(4, rank, np.float32)
        held = {
            **arrays(0),
            **scalars(9),
            "bn.moving_mean": own,
            **({"up.w": own, "moment1.up.w": own} if trained else {}),
        }
        path = tmp_path / "c" / f"rank_{rank}" / "net-1_9.safetensors"
        path.parent.mkdir(parents=True)
        save_file(held, path)
        note(path, rank, 9, None, world=2, sharded=False)
    chosen, skipped = look(tmp_path / "c")
    if trained:
        assert chosen is None
        assert "rank 1 saved other values of what was trained than rank 0" in skipped[0].reason
        assert "give train_strategy_filename" in skipped[0].reason
    else:
        assert step_of(chosen) == 9


def test_layouts_that_are_given_count_where_the_network_told_none(tmp_path: Path) -> None:
    """Slices that a script cuts itself: the network has no layouts to record, yet each rank holds only a part."""
    root = tmp_path / "c"
    save(root, 9)
    strategy = load_strategy(tmp_path / "made_9" / "strategy.ckpt")
    for rank in range(RANKS):
        note(root / f"rank_{rank}" / "net-1_9.safetensors", rank, 9, None, sharded=False)
    shutil.rmtree(root / "ms_ckpt_ext" / "net-1_9.safetensors" / "strategy")
    chosen, _ = look(root, strategy=strategy)
    assert step_of(chosen) == 9
    assert chosen is not None and sorted(chosen.seen.indexes) == ["0", "1", "2", "3"] and chosen.strategy == strategy


def test_one_process_and_merged(tmp_path: Path, golden: Path) -> None:
    root = tmp_path / "c"
    root.mkdir()
    for step in (2, 10):
        save_file({**arrays(step), **scalars(step)}, root / f"CKP-1_{step}.safetensors")
    assert [c.title for c in Order(candidates([look_at(str(root))]))] == ["CKP-1_10.safetensors", "CKP-1_2.safetensors"]
    assert step_of(look(root)[0]) == 10
    merged = tmp_path / "m" / "release"
    shutil.copytree(golden / "full", merged)
    (merged / "model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": dict.fromkeys(read_index(str(merged / "model.safetensors")).tensors, "model.safetensors")}
        )
    )
    chosen, _ = look(tmp_path / "m")
    assert chosen is not None and chosen.candidate.merged and chosen.candidate.title == "release"


def test_pipeline_stages_record_their_own_layouts(tmp_path: Path) -> None:
    """64 ranks: dp 2, tp 8, 4 stages, optimizer sharding; 16 look, as two replicas that serve."""
    items = [
        LayoutItem(f"layers.{stage}.{kind}w", stage, Layout((2, 8), ((0,), ()), 1, -1))
        for stage in range(4)
        for kind in ("", "adam_m.")
    ]
    strategy = Strategy.from_items(items, "64 ranks")
    full = {item.name: np.arange(64 * 4, dtype=np.float32).reshape(64, 4) for item in items}
    cut(strategy, full, tmp_path / "c", scalars(2))
    for rank in range(64):
        own = Strategy.from_items([item for item in items if item.stage == rank // 16], "a stage")
        path = tmp_path / "c" / f"rank_{rank}" / "net.safetensors"
        assert note(path, rank, 2, own if rank % 16 == 0 else None, world=64) == (rank == 63)
    chosen, skipped = look(tmp_path / "c", ranks=16)
    assert step_of(chosen) == 2 and skipped == ()
    assert chosen is not None and chosen.strategy is not None
    assert (chosen.strategy.layouts, chosen.strategy.world) == (strategy.layouts, 64)
    shutil.rmtree(tmp_path / "c" / "rank_40")
    chosen, skipped = look(tmp_path / "c", ranks=16)
    assert chosen is None and "files of rank 40 are gone" in skipped[0].reason


def test_folders_of_mindformers(tmp_path: Path) -> None:
    for step in (4, 10):
        folder = tmp_path / "checkpoint" / f"iteration_{step:08d}"
        folder.mkdir(parents=True)
        save_file(arrays(step), folder / "qwen3-model-0000000-0000001.safetensors")
        (folder / "common.json").write_text(json.dumps({"epoch_num": 2, "global_step": step + 7, "ckpt_status": None}))
    chosen, _ = look(tmp_path / "checkpoint")
    assert step_of(chosen) == 10
    assert chosen is not None and chosen.candidate.title == "iteration_00000010"
    assert chosen.seen.folder is not None
    (tmp_path / "checkpoint" / "iteration_00000010" / "qwen3-model-0000000-0000001.safetensors").write_bytes(b"x" * 20)
    chosen, skipped = look(tmp_path / "checkpoint")
    assert step_of(chosen) == 4 and skipped[0].name == "iteration_00000010"


def test_nothing_there(tmp_path: Path) -> None:
    assert look(tmp_path / "no such") == (None, ())
    assert look(tmp_path) == (None, ())


def test_two_files_of_one_rank_are_no_checkpoint(tmp_path: Path) -> None:
    for folder in ("rank_0", "rank_1", "rank_01"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.safetensors").touch()
    (candidate,) = candidates([look_at(str(tmp_path))])
    with pytest.raises(DiscoveryError, match="rank_0?1/net.safetensors' and 'rank_0?1/net.safetensors' are both of"):
        check_noted(candidate)
    shutil.rmtree(tmp_path / "rank_01")
    check_noted(*candidates([look_at(str(tmp_path))]))
