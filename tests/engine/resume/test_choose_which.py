"""Unrecorded saves, several savers, formats and folders: what ranks take, refuse and report."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import convert
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError
from tests.support.checkpoints import source
from tests.support.saved import RANKS, look, note, save, step_of


def whole(path: Path, step: int, name: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full(4, step, np.float32), "global_step": np.array([step + 7], np.int32)}, path)


def skipped_of(root: Path, **more: Any) -> tuple[Any, dict[str, str]]:
    chosen, skipped = look(root, ranks=2, **more)
    return chosen, {each.name: each.reason for each in skipped}


def test_a_newer_save_without_records_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A recorder that stands before the saver misses the last save; no recorder sees `exception_save`."""
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20, noted=False)
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 20 and skipped == ()
    assert chosen is not None and chosen.strategy is not None and chosen.strategy.world == RANKS
    assert "has no records, and is whole by its headers; the job is taken to be that of 'net-1_3" in caplog.text
    save(tmp_path / "c", 24, noted=False)
    for rank in range(RANKS):
        folder = tmp_path / "c" / f"rank_{rank}"
        (folder / "net-1_24.safetensors").rename(folder / "net-1_24_breakpoint.safetensors")
    assert step_of(look(tmp_path / "c")[0]) == 24


def torn_in_the_header(root: Path) -> None:
    path = root / "rank_2" / "net-1_20.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:40] + b"x" * (len(raw) - 40))


def torn_at_the_end(root: Path) -> None:
    path = root / "rank_2" / "net-1_20.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_a_rank(root: Path) -> None:
    (root / "rank_2" / "net-1_20.safetensors").unlink()


def without_all_but_rank_0(root: Path) -> None:
    for rank in range(1, RANKS):
        (root / f"rank_{rank}" / "net-1_20.safetensors").unlink()


def of_another_shape(root: Path) -> None:
    for rank in range(RANKS):
        path = root / f"rank_{rank}" / "net-1_20.safetensors"
        save_file({**load_file(path), "more": np.zeros(9, np.float32)}, path)


@pytest.mark.parametrize(
    ("tear", "reason"),
    [
        (torn_in_the_header, "no JSON header"),
        (torn_at_the_end, "differ in size from those of 'net-1_3.safetensors': give train_strategy_filename"),
        (without_a_rank, "files of rank 2 are missing, which 'net-1_3.safetensors' has"),
        (without_all_but_rank_0, "files of ranks 1, 2, 3 are missing, which 'net-1_3.safetensors' has"),
        (of_another_shape, "no layouts are on record for it, and its files differ in size"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_that_is_torn_is_skipped_for_what_it_lacks(
    tear: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20, noted=False)
    tear(tmp_path / "c")
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 3
    assert [each.name for each in skipped] == ["net-1_20.safetensors"]
    assert reason in skipped[0].reason and "cut short" not in skipped[0].reason


def test_layouts_that_are_given_are_all_that_is_needed(tmp_path: Path) -> None:
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    save(tmp_path / "c", 3)
    save(tmp_path / "c", 20, noted=False, prefix="more")
    of_another = tmp_path / "c" / "rank_0" / "more-1_20.safetensors"
    assert of_another.exists()
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 3 and "no layouts of the job" in skipped[0].reason
    given = load_strategy(tmp_path / "made_3" / "strategy.ckpt")
    assert step_of(look(tmp_path / "c", strategy=given)[0]) == 20


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ema-1_5.safetensors", "net-1_5.safetensors"),
        ("rank_0/ema-1_5.safetensors", "rank_0/net-1_5.safetensors"),
        ("a/net-1_5.safetensors", "b/net-1_5.safetensors"),
        ("best.safetensors", "last.safetensors"),
        ("text_encoder/model.safetensors", "vae/model.safetensors"),
    ],
)
def test_two_that_nothing_tells_apart_are_refused(one: str, other: str, tmp_path: Path) -> None:
    for order in ((one, other), (other, one)):
        for name in order:  # a file's time is arbitrary
            whole(tmp_path / name, 5)
        with pytest.raises(
            DiscoveryError, match="are whole and equally new.* give prefix, format or the folder"
        ) as caught:
            look(tmp_path, ranks=2)
        assert all(name.replace("rank_0/", "") in str(caught.value) for name in (one, other))
    (tmp_path / one).write_bytes(b"torn")
    chosen, skipped = skipped_of(tmp_path)
    assert step_of(chosen) == 5
    assert list(skipped) == [one.replace("rank_0/", "")]


def test_a_prefix_or_a_format_says_which(tmp_path: Path) -> None:
    whole(tmp_path / "ema-1_5.safetensors", 1)
    whole(tmp_path / "net-1_5.safetensors", 2)
    whole(tmp_path / "net_1-1_3.safetensors", 3)
    for prefix, step in (("ema", 1), ("net", 3)):
        chosen, skipped = skipped_of(tmp_path, prefix=prefix)
        assert step_of(chosen) == step
        assert list(skipped) == (["net-1_5.safetensors"] if prefix == "net" else [])
    assert look(tmp_path, ranks=2, prefix="other") == (None, ())
    convert(tmp_path / "ema-1_5.safetensors", tmp_path / "ema-1_5.ckpt")
    with pytest.raises(
        DiscoveryError, match="'ema-1_5.ckpt', 'ema-1_5.safetensors'|'ema-1_5.safetensors', 'ema-1_5.ckpt'"
    ):
        look(tmp_path, ranks=2, prefix="ema")
    chosen, _ = skipped_of(tmp_path, prefix="ema", kind="ckpt")
    assert chosen.candidate.title == "ema-1_5.ckpt"


def test_another_prefix_that_is_passed_over_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole(tmp_path / "net-1_15.safetensors", 15)
    whole(tmp_path / "ema-1_10.safetensors", 10)
    chosen, skipped = skipped_of(tmp_path)
    assert step_of(chosen) == 15
    assert "'net-1_15.safetensors' is taken for newer" in skipped["ema-1_10.safetensors"]
    assert "checkpoint 'ema-1_10.safetensors'" in caplog.text


def test_the_next_of_the_same_saver_is_taken(tmp_path: Path) -> None:
    for name, step in (("net-1_5", 5), ("ema-1_5", 1), ("net-1_12", 12), ("ema-1_10", 1)):
        whole(tmp_path / f"{name}.safetensors", step)
    (tmp_path / "net-1_12.safetensors").write_bytes(b"torn")
    with pytest.raises(DiscoveryError, match="'net-1_5.safetensors', 'ema-1_5.safetensors'"):
        look(tmp_path, ranks=2)
    (tmp_path / "ema-1_5.safetensors").unlink()
    chosen, skipped = skipped_of(tmp_path)
    assert step_of(chosen) == 5
    assert list(skipped) == ["net-1_12.safetensors", "ema-1_10.safetensors"]


def test_what_is_no_model_is_skipped_as_load_refuses_it(tmp_path: Path) -> None:
    whole(tmp_path / "parts" / "model-00002-of-00002.safetensors", 1)
    whole(tmp_path / "scalars" / "hyper_param.safetensors", 1)
    whole(tmp_path / "adapter" / "adapter_model.safetensors", 1)
    whole(tmp_path / "both" / "adapter_model.safetensors", 1)
    whole(tmp_path / "both" / "model.safetensors", 1)
    chosen, skipped = skipped_of(tmp_path)
    assert chosen is None
    assert len(skipped) == 4
    told = " ".join(skipped.values())
    for words in ("of the 2 parts", "training scalars", "an adapter to a model, and no model", "not applied here"):
        assert words in told
    for name in ("parts", "scalars", "adapter", "both"):
        assert look(tmp_path / name, ranks=2)[0] is None


def test_models_of_many_files_are_candidates(tmp_path: Path) -> None:
    for number in (1, 2):
        whole(tmp_path / "all" / f"m-0000{number}-of-00002.safetensors", 4, f"p{number}")
        path = tmp_path / "all" / f"m-0000{number}-of-00002.safetensors"
        save_file({f"p{number}": np.zeros(2, np.float32)}, path)
    chosen, skipped = skipped_of(tmp_path)
    assert chosen is not None and skipped == {}
    assert sorted(chosen.seen.indexes) == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    (tmp_path / "all" / "m.safetensors.index.json").write_text(
        '{"weight_map": {"p1": "m-00001-of-00002.safetensors", "p2": "m-00002-of-00002.safetensors"}}'
    )
    chosen, _ = skipped_of(tmp_path)
    assert chosen is not None and chosen.candidate.merged and len(chosen.seen.indexes) == 2
    chosen, _ = skipped_of(tmp_path / "all" / "m.safetensors.index.json")
    assert chosen is not None and len(chosen.seen.indexes) == 2
    chosen, _ = skipped_of(tmp_path / "all" / "m-00001-of-00002.safetensors")
    assert chosen is not None and len(chosen.seen.indexes) == 1


def test_one_file_is_a_directory_of_one(tmp_path: Path) -> None:
    whole(tmp_path / "net-1_5.safetensors", 5)
    whole(tmp_path / "net-1_9.safetensors", 9)
    assert step_of(skipped_of(tmp_path / "net-1_5.safetensors")[0]) == 5
    strategy = source(tmp_path / "made") / "strategy.ckpt"
    with pytest.raises(CheckpointError, match="strategy.ckpt' is a file, and no .safetensors or .ckpt checkpoint"):
        look(strategy, ranks=2)
    with pytest.raises(CheckpointError, match="is a file, and no .ckpt checkpoint"):
        look(tmp_path / "net-1_5.safetensors", ranks=2, kind="ckpt")


def test_what_one_process_saved_beside_rank_folders_is_seen(tmp_path: Path) -> None:
    save(tmp_path / "c", 3)
    whole(tmp_path / "c" / "net-1_3.safetensors", 9)
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 3, "the recorded one of two that are equally new"
    assert [each.name for each in skipped] == ["./net-1_3.safetensors"]
    whole(tmp_path / "c" / "net-1_9.safetensors", 9)
    chosen, skipped = look(tmp_path / "c")
    assert step_of(chosen) == 9 and [each.name for each in skipped] == ["net-1_3.safetensors"]
    assert chosen is not None and [index.path for index in chosen.seen.indexes.values()] == [
        str(tmp_path / "c" / "net-1_9.safetensors")
    ]


def test_a_slice_alone_is_no_model(tmp_path: Path) -> None:
    save(tmp_path / "c", 3, noted=False)
    for rank in (0, 1, 2):
        shutil.rmtree(tmp_path / "c" / f"rank_{rank}")
    chosen, skipped = look(tmp_path / "c")
    assert chosen is None and "only file is that of rank 3" in skipped[0].reason


def test_a_file_that_lacks_what_other_ranks_hold_is_no_model(tmp_path: Path) -> None:
    """Data-parallel ranks that divide the parameters among themselves, without a strategy that says so."""
    for rank in range(2):
        path = tmp_path / "c" / f"rank_{rank}" / "net-1_9.safetensors"
        path.parent.mkdir(parents=True)
        save_file({f"p{rank}": np.zeros(3, np.float32)}, path, {"remove_redundancy": "True"})
        note(path, rank, 9, None, world=2, sharded=False)
    chosen, skipped = look(tmp_path / "c", ranks=2)
    assert chosen is None and "was saved with remove_redundancy" in skipped[0].reason


def test_a_prefix_with_a_rank_in_it(tmp_path: Path) -> None:
    """Ten ranks: rank 8's file says `rank_8` as all others do."""
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from tests.support.checkpoints import cut

    items = [LayoutItem("w", 0, Layout((10,), ((0,), ())))]
    strategy = Strategy.from_items(items, "10 ranks")
    full = np.arange(40, dtype=np.float32).reshape(20, 2)
    for step in (5, 10):
        cut(strategy, {"w": full * step}, tmp_path / f"cut_{step}", {"global_step": np.array([step + 7], np.int32)})
        for rank in range(10):
            made = tmp_path / f"cut_{step}" / f"rank_{rank}" / "net.safetensors"
            path = tmp_path / "c" / f"rank_{rank}" / f"lora_rank_8-1_{step}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(made, path)
            assert note(path, rank, step, strategy if rank == 0 else None, world=10) == (rank == 9)
    assert sorted(os.listdir(tmp_path / "c" / "ms_ckpt_ext")) == [
        "lora_rank_-1_10.safetensors",
        "lora_rank_-1_5.safetensors",
    ]
    chosen, skipped = look(tmp_path / "c", ranks=2)
    assert step_of(chosen) == 10 and skipped == ()
    assert chosen is not None and len(chosen.seen.indexes) == 10 and len(chosen.candidate.records) == 10


@pytest.mark.parametrize("name", ["lost+found", "private"])
@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_folder_that_may_not_be_looked_into(
    name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder may refuse to be listed, or to be searched."""
    whole(tmp_path / "rank_0" / "net-1_1.safetensors", 1)
    (tmp_path / name).mkdir()
    real, closed = getattr(os, call), str(tmp_path / name) + ("/." if call == "stat" else "")

    def refuse(path: Any = ".", *args: Any, **more: Any) -> Any:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)

    monkeypatch.setattr(os, call, refuse)
    chosen, skipped = look(tmp_path, ranks=2)
    assert step_of(chosen) == 1 and skipped == ()
    assert f"{name}' is passed over: it cannot be looked into (Permission denied)" in caplog.text
