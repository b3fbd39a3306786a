"""What no strategy lists, through every job on files: each rank's own, whole, or an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import (
    CheckpointError,
    load,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError
from tests.support.checkpoints import read_file, tree
from tests.support.outside import listed, slices, source
from tests.support.outside_jobs import (
    FROZEN,
    HALF,
    OUTSIDE,
    RNG,
    STEP,
    Recut,
    held_by,
    lora,
    merges,
    recuts,
    strategy_file,
    transform,
)


@recuts
def test_the_same_ranks_keep_their_own(recut: Recut, tmp_path: Path) -> None:
    held = lora(tmp_path)
    target = recut(held, tmp_path / "out", held.strategy)
    for rank in range(4):
        assert held_by(target, rank) == {n: t.data for n, t in read_file(held.file(rank)).items()}


@recuts
def test_an_optimizer_shard_in_the_target_is_no_other_cut(recut: Recut, tmp_path: Path) -> None:
    held = source(
        tmp_path / "src", listed(4, matrices=[(2, 2)]), {"frozen": slices(Layout((2, 2), ((0,), ())), FROZEN, 4)}
    )
    sharded = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2, 2), ((1,), ()), 1, -1))], "it")
    target = recut(held, tmp_path / "out", strategy_file(sharded, tmp_path / "dst.ckpt"))
    for rank in range(4):
        assert held_by(target, rank)["frozen"] == held.held[rank]["frozen"].tobytes()
    assert len(held_by(target, 0)["w0.0"]) == len(read_file(held.file(0))["w0.0"].data) // 2


@recuts
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_other_ranks_are_refused_by_name(recut: Recut, devices: int, tmp_path: Path) -> None:
    held = lora(tmp_path)
    wanted = strategy_file(listed(devices), tmp_path / "dst.ckpt")
    with pytest.raises(LayoutMismatchError, match=r"'frozen' is not in .*differ.*rank 0.*only_trainable_params"):
        recut(held, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists() or tree(tmp_path / "out") == {}


@recuts
def test_leaving_it_out_helps(recut: Recut, tmp_path: Path) -> None:
    held = lora(tmp_path)
    wanted = strategy_file(listed(2), tmp_path / "dst.ckpt")
    target = recut(held, tmp_path / "out", wanted, choice_func=lambda name: name != "frozen")
    assert held_by(target, 1).keys() == {"w0.0", "global_step"} and held_by(target, 1)["global_step"] == STEP.tobytes()


@recuts
def test_its_new_name_keeps_it_apart_too(recut: Recut, tmp_path: Path) -> None:
    held = lora(tmp_path)
    renamed = {"frozen": "model.frozen", "w0.0": "w0.0"}
    target = recut(held, tmp_path / "out", held.strategy, choice_func=lambda name: renamed.get(name, True))
    for rank in range(4):
        assert held_by(target, rank)["model.frozen"] == held.held[rank]["frozen"].tobytes()


@recuts
def test_a_name_map_gives_every_rank_its_own(recut: Recut, tmp_path: Path) -> None:
    held = lora(tmp_path)
    target = recut(held, tmp_path / "out", held.strategy, name_map={"base": "frozen"})
    for rank in range(4):
        found = held_by(target, rank)
        assert found["base"] == held.held[rank]["frozen"].tobytes() and "frozen" not in found


@pytest.mark.parametrize("number", range(6))
def test_a_merge_is_refused_by_name(number: int, tmp_path: Path) -> None:
    held = lora(tmp_path)
    with pytest.raises(LayoutMismatchError, match=r"'frozen' is not in .*ranks' files differ.*choice_func"):
        merges(held, tmp_path / "out")[number]()
    assert not (tmp_path / "out").exists() or tree(tmp_path / "out") == {}


@pytest.mark.parametrize("number", range(4))
def test_a_merge_without_it(number: int, tmp_path: Path) -> None:
    held = lora(tmp_path)
    merges(held, tmp_path / "out")[number](choice_func=lambda name: name != "frozen")
    with load(tmp_path / "out") as found:
        assert set(found) == {"w0.0", "global_step"}


def test_a_merge_under_another_name_is_refused_too(tmp_path: Path) -> None:
    held = lora(tmp_path)
    for more in ({"name_map": {"base": "frozen"}}, {"choice_func": lambda name: f"model.{name}"}):
        with pytest.raises(LayoutMismatchError, match=r"'(base|model.frozen|frozen)'.* is not in"):
            unified_safetensors(held.shards, held.strategy, tmp_path / "out", **more)


@pytest.mark.parametrize(
    "content",
    [
        lambda rank: np.array([rank], np.uint64),  # a cursor
        lambda rank: np.array(rank / 2, np.float32),
        lambda rank: np.frombuffer(bytes([rank]) * 16, np.uint8),  # the state of a generator
        lambda rank: np.array([True, rank == 3]),
        lambda rank: FROZEN[: rank + 1],
        lambda rank: FROZEN.astype(np.float16 if rank % 2 else np.float32),
        lambda rank: FROZEN[rank:rank] if rank else FROZEN[:1],  # nothing at all on most
    ],
)
def test_everything_that_differs_by_rank(content: Any, tmp_path: Path) -> None:
    held = lora(tmp_path, {"state": content, "global_step": STEP})
    target = transform(held, tmp_path / "own", held.strategy)
    for rank in range(4):
        assert held_by(target, rank) == {n: t.data for n, t in read_file(held.file(rank)).items()}
        assert (
            read_file(target / f"rank_{rank}/net.safetensors")["state"][:2] == read_file(held.file(rank))["state"][:2]
        )
    other = strategy_file(listed(2), tmp_path / "dst.ckpt")
    for refused in (
        lambda: unified_safetensors(held.shards, held.strategy, tmp_path / "out"),
        lambda: transform(held, tmp_path / "out", other),
        lambda: transform(held, tmp_path / "out", None),  # type: ignore[arg-type]
    ):
        with pytest.raises(LayoutMismatchError, match="'state'"):
            refused()


@pytest.mark.parametrize(
    "content",
    [STEP, np.array(2.5, np.float64), np.array([True, False]), np.zeros((0, 3), np.float32), FROZEN, np.zeros((3, 0))],
)
@recuts
def test_what_is_alike_goes_to_every_rank(recut: Recut, content: np.ndarray, tmp_path: Path) -> None:
    held = lora(tmp_path, {"x": content})
    target = recut(held, tmp_path / "out", strategy_file(listed(2), tmp_path / "dst.ckpt"))
    for rank in range(2):
        found = read_file(target / f"rank_{rank}/net.safetensors")["x"]
        assert (found.shape, found.data) == (content.shape, content.tobytes())


def test_the_file_of_the_rank_itself_is_needed(tmp_path: Path) -> None:
    large = slices(Layout((4,), ((0,), ())), RNG.standard_normal((4096, 6), np.float32), 4)
    held = source(tmp_path / "src", listed(4), {"frozen": large, "global_step": STEP})
    files = {rank: held.file(rank) for rank in range(4)}
    arguments = tmp_path / "net.safetensors", held.strategy, held.strategy
    for given in ({0, 1, 2}, {0, 2}):
        with pytest.raises(CheckpointError, match="rank 3"):
            transform_checkpoint_by_rank(3, {rank: files[rank] for rank in given}, *arguments)
    transform_checkpoint_by_rank(3, {3: files[3]}, *arguments)
    assert read_file(tmp_path / "net.safetensors")["frozen"].data == held.held[3]["frozen"].tobytes()


def test_replicas_do_not_stand_in_for_what_is_unlisted(tmp_path: Path) -> None:
    """All that is listed could be taken from rank 0, but what is not is known by nobody."""
    whole = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2,), ((), ())))], "it")
    large = RNG.standard_normal((2, 2048), np.float32)
    held = source(tmp_path / "src", whole, {"frozen": lambda rank: large[rank], "global_step": STEP})
    with pytest.raises(CoverageError, match="'frozen'.*rank 1 keeps what its own file"):
        transform_checkpoint_by_rank(1, {0: held.file(0)}, tmp_path / "n.ckpt", held.strategy, held.strategy)


def test_one_rank_after_another_at_one_path(tmp_path: Path) -> None:
    """Same names, sizes and shapes: only the owner differs."""
    whole = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2,), ((), ())))], "it")
    held = source(tmp_path / "src", whole, {"frozen": lambda rank: FROZEN[rank : rank + 1]})
    files = {rank: held.file(rank) for rank in range(2)}
    for rank in (0, 1, 0):
        transform_checkpoint_by_rank(rank, files, tmp_path / "net.safetensors", held.strategy, held.strategy)
        assert read_file(tmp_path / "net.safetensors")["frozen"].data == FROZEN[rank].tobytes()


def test_deduplicated_files(tmp_path: Path) -> None:
    """A replica stored only in another rank's file is found there; what differs there belongs to that rank alone."""
    from safetensors.numpy import load_file, save_file

    strategy = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2, 2), ((0,), ())))], "it")
    for name, content, expected in (
        ("alike", FROZEN, None),
        ("cut", slices(Layout((2, 2), ((0,), ())), FROZEN, 4), LayoutMismatchError),
    ):
        held = source(tmp_path / name, strategy, {"frozen": content})
        for rank in range(4):
            keep = {"w0.0", "frozen"} if rank < 2 and (name == "cut" or rank == 0) else {"w0.0"}
            mine = {n: a for n, a in load_file(held.file(rank)).items() if n in keep}
            save_file(mine, held.file(rank), {"format": "ms", "remove_redundancy": "True"})
        if expected is None:
            target = transform(held, tmp_path / "out", held.strategy)
            for rank in range(4):
                assert held_by(target, rank)["frozen"] == FROZEN.tobytes()
            continue
        with pytest.raises(CoverageError, match="'frozen'.*rank 2"):
            transform(held, tmp_path / "cut_out", held.strategy)
        with pytest.raises(LayoutMismatchError, match="'frozen'"):
            unified_safetensors(held.shards, held.strategy, tmp_path / "merged")


@pytest.mark.parametrize("key", [None, b"0123456789abcdef"])
def test_ckpt_files_encrypted_or_not(key: Any, tmp_path: Path) -> None:
    held = lora(tmp_path)
    ms_ckpt_ext.convert(held.shards, tmp_path / "ckpt", to="ckpt", **({"enc_key": key} if key else {}))
    more = {"dec_key": key} if key else {}
    source, strategy = tmp_path / "ckpt", held.strategy
    transform_checkpoints(source, tmp_path / "out", "net", strategy, strategy, 1, "safetensors", **more)
    for rank in range(4):
        found = read_file(tmp_path / f"out/rank_{rank}/net{rank}.safetensors")
        assert found["frozen"].data == held.held[rank]["frozen"].tobytes()
    with pytest.raises(LayoutMismatchError, match="'frozen'"):
        unified_safetensors(source, strategy, tmp_path / "merged", **more)
    with pytest.raises(LayoutMismatchError, match="'frozen'"):
        transform_checkpoints(source, tmp_path / "one", "net", strategy, None, **more)


def test_a_dictionary_compares_what_is_read(tmp_path: Path) -> None:
    held = lora(tmp_path, {**OUTSIDE, "odd": lambda rank: FROZEN[: rank + 1], "alike": FROZEN})
    with load(held.shards, held.strategy) as found:
        assert set(found) == {"w0.0", "frozen", "odd", "alike", "global_step"}
        assert found["alike"].shape == FROZEN.shape and not found.count.reads
        assert found["alike"][2:4].tobytes() == FROZEN[2:4].tobytes() and found["global_step"][0] == 7
        assert found["frozen"].shape == (2, 6)  # what a rank has
        for name in ("frozen", "odd"):
            with pytest.raises(LayoutMismatchError, match=f"'{name}' is not in .*cannot be read as one"):
                found[name][...]
        with pytest.raises(LayoutMismatchError, match="'(frozen|odd)'"):
            found.arrays()
        assert set(found.arrays(["alike", "w0.0"])) == {"alike", "w0.0"}
    with load(held.shards, held.strategy, names=["alike", "global_step"]) as found:
        assert found.arrays()["alike"].tobytes() == FROZEN.tobytes()


def test_training_scalars_are_scalars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = np.linspace(1, 0, 50, dtype=np.float32)
    outside = {**OUTSIDE, "alike": FROZEN, "learning_rate": table, "cursor": lambda rank: np.array(rank)}
    held = lora(tmp_path, outside)
    found = ms_ckpt_ext.training_scalars(held.shards, held.strategy)
    assert {name: value.tobytes() for name, value in found.items()} == {
        "global_step": STEP.tobytes(), "learning_rate": table.tobytes()
    }  # fmt: skip
    assert "'cursor' is contents" in caplog.text and "frozen" not in caplog.text
    alone = ms_ckpt_ext.training_scalars(held.shards)
    assert alone.keys() == {"global_step"} and caplog.text.count("'cursor'") == 2


def test_rules_take_what_the_strategy_does_not_list(tmp_path: Path) -> None:
    from ms_ckpt_ext.rules import QKV, Rename

    q, k, v = RNG.standard_normal((3, 4, 6), np.float32)
    frozen = {"0.q": q, "0.k": k, "0.v": v, "0.step": STEP, "1.q": HALF}
    held = lora(tmp_path, frozen)
    with pytest.raises(LayoutMismatchError, match="'1.q'.*no rule can take it"):
        fuse = [QKV(["{i}.q", "{i}.k", "{i}.v"], "{i}.qkv", 1)]
        ms_ckpt_ext.merge(held.shards, tmp_path / "out", strategy=held.strategy, rules=fuse)
    fuse = [QKV(["0.q", "0.k", "0.v"], "qkv", 1), Rename("{i}.step", "{i}.count")]
    ms_ckpt_ext.merge(
        held.shards, tmp_path / "out", strategy=held.strategy, rules=fuse, choice_func=lambda name: name != "1.q"
    )
    with load(tmp_path / "out") as found:
        assert found["qkv"][...].tobytes() == np.concatenate([q, k, v]).tobytes()
        assert set(found) == {"qkv", "w0.0", "0.step"}


def test_many_that_differ_are_told_shortly(tmp_path: Path) -> None:
    held = source(tmp_path / "src", listed(16), {"cursor": lambda rank: np.array(rank)})
    with pytest.raises(LayoutMismatchError, match="on rank 3 and 12 more that differ from these") as caught:
        unified_safetensors(held.shards, held.strategy, tmp_path / "out")
    assert len(str(caught.value)) < 1000
