"""What no strategy lists, through every job on files: each rank's own, whole, or an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext import (
    CheckpointError,
    load,
    load_distributed_checkpoint,
    transform_checkpoint_by_rank,
    transform_checkpoints,
    unified_safetensors,
)
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import save_strategy
from tests.support.checkpoints import read_file, tree
from tests.support.outside import Source, listed, slices, source

RNG = np.random.default_rng(1)
FROZEN = RNG.standard_normal((8, 6), np.float32)
HALF = slices(Layout((4,), ((0,), ())), FROZEN, 4)
STEP = np.array([7], np.int32)
OUTSIDE = {"frozen": HALF, "global_step": STEP}


def lora(root: Path, outside: Any = None, stages: int = 1) -> Source:
    """Four ranks (per stage) with a frozen parameter cut by rows that the strategy does not list."""
    return source(root / "src", listed(4, stages), OUTSIDE if outside is None else outside)


def save(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    load_distributed_checkpoint(
        None, None, wanted, source.strategy, format="safetensors", unified_safetensors_dir=source.shards,
        dst_safetensors_dir=target, **more,
    )  # fmt: skip
    return target


def transform(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    transform_checkpoints(source.shards, target, "net", source.strategy, wanted, 1, "safetensors", **more)
    for folder in target.glob("rank_*"):
        (file,) = folder.glob("*.safetensors")
        file.rename(folder / "net.safetensors")
    return target


def by_rank(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    files = {rank: source.file(rank) for rank in source.held}
    for rank in range(load_strategy(str(wanted)).world):
        path = target / f"rank_{rank}/net.safetensors"
        transform_checkpoint_by_rank(rank, files, path, source.strategy, wanted, **more)
    return target


def reshard(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    ms_ckpt_ext.reshard(source.shards, target, strategy=source.strategy, to_strategy=wanted, **more)
    return target


def reshard_by_rank(source: Source, target: Path, wanted: Path, **more: Any) -> Path:
    from ms_ckpt_ext.formats.strategies.file import load_strategy

    for rank in range(load_strategy(str(wanted)).world):
        ms_ckpt_ext.reshard(source.shards, target, strategy=source.strategy, to_strategy=wanted, rank=rank, **more)
    return target


Recut = Callable[..., Path]
RECUTS = [save, transform, by_rank, reshard, reshard_by_rank]
recuts = pytest.mark.parametrize("recut", RECUTS, ids=[recut.__name__ for recut in RECUTS])


def held_by(target: Path, rank: int) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read_file(target / f"rank_{rank}/net.safetensors").items()}


def strategy_file(strategy: Strategy, path: Path) -> Path:
    save_strategy(strategy, path)
    return path


def merges(source: Source, target: Path) -> list[Callable[..., Any]]:
    return [
        lambda **more: unified_safetensors(source.shards, source.strategy, target, **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, naming="huggingface", **more),
        lambda **more: ms_ckpt_ext.merge(source.shards, target, strategy=source.strategy, to="ckpt", **more),
        lambda **more: unified_safetensors(source.shards, source.strategy, target, split_dst_file=(1, 2), **more),
        lambda **more: unified_safetensors(source.shards, source.strategy, target, split_dst_file=(2, 2), **more),
    ]


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


LAYOUT = ((4,), (0, -1))
FORMS = {
    "short": lambda _: {"frozen": LAYOUT},
    "nested": lambda _: {"frozen": ([2, 2], [[1, 0], [-1]])},
    "of a network": lambda _: {"frozen": ([4], [0, -1], [2, 6], 0, True, "", [8, 6])},
    "another file": lambda root: strategy_file(
        Strategy.from_items([LayoutItem("frozen", 0, Layout((4,), ((0,), ())))], "it"), root / "second.ckpt"
    ),
    "json": lambda root: strategy_file(
        Strategy.from_items([LayoutItem("frozen", 0, Layout((4,), ((0,), ())))], "it"), root / "second.json"
    ),
}


@pytest.mark.parametrize("form", FORMS)
@recuts
def test_what_is_supplied_is_cut_exactly(recut: Recut, form: str, tmp_path: Path) -> None:
    held = lora(tmp_path)
    supplied = held._replace(strategy=[held.strategy, FORMS[form](tmp_path)])  # type: ignore[arg-type]
    wanted: Any = [strategy_file(listed(2), tmp_path / "dst.ckpt"), {"frozen": ((2,), (-1, 0))}]
    if "by_rank" in recut.__name__:
        for rank in range(2):
            one = tmp_path / "out" / f"rank_{rank}/net.safetensors"
            files = {r: held.file(r) for r in range(4)}
            transform_checkpoint_by_rank(rank, files, one, supplied.strategy, wanted)
    else:
        recut(supplied, tmp_path / "out", wanted)
    for rank in range(2):
        assert held_by(tmp_path / "out", rank)["frozen"] == FROZEN[:, 3 * rank : 3 * rank + 3].tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_supplied_is_merged_and_read_whole(form: str, tmp_path: Path) -> None:
    held = lora(tmp_path)
    both = [held.strategy, FORMS[form](tmp_path)]
    supplied = held._replace(strategy=both)  # type: ignore[arg-type]
    for number, merge in enumerate(merges(supplied, tmp_path / "out")[:4]):
        merge()
        with load(tmp_path / "out") as found:
            assert found["frozen"][...].tobytes() == FROZEN.tobytes(), number
        if number:
            assert ms_ckpt_ext.verify(held.shards, tmp_path / "out", strategy=both).ok
    with load(held.shards, both) as found:
        assert found["frozen"][3:7].tobytes() == FROZEN[3:7].tobytes()
    assert "frozen" not in ms_ckpt_ext.training_scalars(held.shards, both)


def test_messages_and_repeated_options_supply_too(tmp_path: Path) -> None:
    from ms_ckpt_ext.cli.main import main

    held = lora(tmp_path)
    second = FORMS["another file"](tmp_path)
    target = tmp_path / "out"
    code = main(["merge", str(held.shards), str(target), "--strategy", str(held.strategy), "--strategy", str(second)])
    assert code == 0
    with load(target) as found:
        assert found["frozen"][...].tobytes() == FROZEN.tobytes()


def test_what_is_supplied_may_not_contradict(tmp_path: Path) -> None:
    held = lora(tmp_path)
    for more, told in (
        ({"w0.0": ((4,), (-1, 0))}, r"'w0.0' \(pipeline stage 0\).*src.ckpt.*src_strategy_file\[1\]"),
        ({"frozen": ((8,), (0, -1))}, "'frozen'.*of 8 devices"),
        ({"frozen": 3}, r"src_strategy_file\[1\]: value of 'frozen' must be"),
        (None, r"src_strategy_file\[1\] must be a path or a dict"),
    ):
        with pytest.raises(CheckpointError, match=told):
            unified_safetensors(held.shards, [held.strategy, more], tmp_path / "out")
    with pytest.raises(CheckpointError, match="empty list"):
        unified_safetensors(held.shards, [], tmp_path / "out")


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


def one_of(root: Path, frozen: Any) -> tuple[Source, dict[int, Path], Path]:
    """All that is listed is whole, so one file has it; of a large tensor that is not listed one file tells nothing."""
    whole = Strategy.from_items([LayoutItem("w0.0", 0, Layout((2, 2), ((), ())))], "it")
    table = np.linspace(0, 1, 9, dtype=np.float32)
    held = source(root / "src", whole, {"frozen": frozen, "global_step": STEP, "learning_rate": table})
    copies = {rank: root / f"copy_of_{'abcd'[rank]}.safetensors" for rank in range(4)}
    for rank, path in copies.items():
        path.write_bytes(held.file(rank).read_bytes())
    return held, copies, strategy_file(listed(2), root / "dst.ckpt")


LARGE = RNG.standard_normal((4096, 6), np.float32)


@pytest.mark.parametrize(
    ("given", "more"),
    [([0], "ranks 1, 2"), ([0, 1], "rank 2"), ([0, 2], "rank 1"), ([1, 3], "ranks 0, 2"), ([0, 1, 2], "")],
)
def test_too_few_files_to_tell(given: list[int], more: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, copies, wanted = one_of(tmp_path, LARGE)
    arguments: Any = {rank: copies[rank] for rank in given}, tmp_path / "net.safetensors", held.strategy, wanted
    if more:
        told = f"'frozen'.*too few ranks' files.*give the file of {more} as well"
        with pytest.raises(LayoutMismatchError, match=told):
            transform_checkpoint_by_rank(0, *arguments)
        transform_checkpoint_by_rank(0, *arguments, choice_func=lambda name: name != "frozen")
        assert "'learning_rate'" in caplog.text and "taken for all" in caplog.text
    else:
        transform_checkpoint_by_rank(0, *arguments)
        assert read_file(tmp_path / "net.safetensors")["frozen"].data == LARGE.tobytes()
    assert read_file(tmp_path / "net.safetensors")["global_step"].data == STEP.tobytes()
    assert "global_step" not in caplog.text


@pytest.mark.parametrize("given", [[0], [0, 1], [3]])
def test_files_beside_tell(given: list[int], tmp_path: Path) -> None:
    """Files of other ranks lie where the names of the given ones say: they are compared, and nothing else."""
    held, _, wanted = one_of(tmp_path, LARGE)
    arguments: Any = {r: held.file(r) for r in given}, tmp_path / "net.safetensors", held.strategy, wanted
    transform_checkpoint_by_rank(0, *arguments)
    assert read_file(tmp_path / "net.safetensors")["frozen"].data == LARGE.tobytes()
    for cut in (((1,), ()), ((0,), ())):  # along an axis on which the given ones are alike, or differ
        held, _, wanted = one_of(tmp_path / str(cut), slices(Layout((2, 2), cut), LARGE, 4))
        arguments = {r: held.file(r) for r in given}, tmp_path / "cut.safetensors", held.strategy, wanted
        with pytest.raises(LayoutMismatchError, match="'frozen' is not in .*files differ"):
            transform_checkpoint_by_rank(0, *arguments)
    held.file(2).write_bytes(b"no checkpoint")
    with pytest.raises(LayoutMismatchError, match="'frozen'"):
        transform_checkpoint_by_rank(0, *arguments)


def test_a_lone_folder_of_several_ranks(tmp_path: Path) -> None:
    import shutil

    held, _, wanted = one_of(tmp_path, LARGE)
    for rank in (1, 2, 3):
        shutil.rmtree(held.shards / f"rank_{rank}")
    for job in (
        lambda: unified_safetensors(held.shards, held.strategy, tmp_path / "out"),
        lambda: transform(held, tmp_path / "out", wanted),
        lambda: reshard(held, tmp_path / "out", wanted),
    ):
        with pytest.raises(LayoutMismatchError, match="'frozen'.*ranks 1, 2 as well"):
            job()
    unified_safetensors(held.shards, held.strategy, tmp_path / "out", choice_func=lambda name: name != "frozen")
    both: Any = [held.strategy, {"frozen": ((4,), (-1, -1))}]
    unified_safetensors(held.shards, both, tmp_path / "out")
    with load(tmp_path / "out") as found:
        assert found["frozen"][...].tobytes() == LARGE.tobytes()


def test_many_that_differ_are_told_shortly(tmp_path: Path) -> None:
    held = source(tmp_path / "src", listed(16), {"cursor": lambda rank: np.array(rank)})
    with pytest.raises(LayoutMismatchError, match="on rank 3 and 12 more that differ from these") as caught:
        unified_safetensors(held.shards, held.strategy, tmp_path / "out")
    assert len(str(caught.value)) < 1000
