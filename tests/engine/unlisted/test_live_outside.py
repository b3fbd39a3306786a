"""What no strategy lists, loaded into Cells: each rank its own or an error by name, in every mode."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, encrypt, load_distributed_checkpoint
from ms_ckpt_ext.bridge.together import SharedSource as Together
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import Manifest, write_manifest
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.unlisted import dealt
from ms_ckpt_ext.errors import CheckpointError, CoverageError, LayoutMismatchError, PeerError
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.cells import HERE, POISON, Filled, cell, fill, load, threads
from tests.support.outside import Content, Source, listed, slices, source, whole

__all__ = ["threads"]
pytestmark = pytest.mark.usefixtures("threads")
FROZEN = np.arange(48, dtype=np.float32).reshape(8, 6)
MODES = {
    "alone": ("alone", "none"),
    "direct": ("direct", "replicas"),
    "cooperative": ("cooperative", "none"),
    "replicas": ("cooperative", "replicas"),
    "full": ("cooperative", "full"),
    "auto": ("auto", "none"),
}


def together(src: Source) -> Together:
    strategy = load_strategy(str(src.strategy))
    return Together(partial(list_checkpoint, str(src.shards), strategy), strategy)


def recorded(src: Source) -> Source:
    files = {f"rank_{rank}/net.safetensors": src.file(rank) for rank in src.held}
    write_manifest(str(src.shards), Manifest({n: digest_file(read_index(str(p))) for n, p in files.items()}))
    return src


def assert_own(filled: list[Filled], src: Source, names: tuple[str, ...]) -> None:
    for rank, got in enumerate(filled):
        assert got.error is None, got.error
        for name in names:
            assert got.held[name].tobytes() == src.held[rank][name].tobytes(), f"{name} of rank {rank}"


def wanting(src: Source, names: tuple[str, ...], target: Strategy) -> Any:
    """By rank, what a network of the same job has."""

    def wanted(rank: int) -> Mapping[str, Any]:
        held = {name: src.held[rank][name] for name in names if name in src.held[rank]}
        for name in target.names_of(rank):
            layout = target.layout(name, rank)
            assert layout is not None
            held[name] = whole(name)[layout.region(rank % target.devices_per_stage, whole(name).shape).slices]
        return held

    return wanted


OUTSIDE: dict[str, Content] = {
    "frozen": slices(Layout((2, 2), ((0,), ())), FROZEN, 4),
    "columns": slices(Layout((2, 2), ((), (0,))), FROZEN.astype(np.float16), 4),
    "generator": lambda rank: np.arange(625, dtype=np.uint32) + rank,
    "cursor": lambda rank: np.array(rank + 5, np.int64),
    "ragged": lambda rank: np.full((rank + 1, 3), rank, np.float32),
    "mask": lambda rank: np.arange(5) % 2 == rank % 2,
    "none": lambda rank: np.zeros((0, rank + 1), np.float32),
    "global_step": np.array([7], np.int32),
    "shared": np.random.default_rng(0).random((300, 70)).astype(np.float32),
}
NAMES = tuple(OUTSIDE)
TARGET = listed(4, matrices=[(2, 2)])


@pytest.mark.parametrize("mode", MODES)
def test_each_rank_takes_its_own(mode: str, tmp_path: Path) -> None:
    """All kinds at once: cut, of other shapes, scalars, booleans, without elements, and alike."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    got = fill(together(src), TARGET, wanting(src, NAMES, TARGET), 4, *MODES[mode])
    assert_own(got, src, NAMES)
    assert all(filled.missing == [] and filled.unused == [] for filled in got)
    for rank, filled in enumerate(got):
        box = TARGET.layouts["w0.0"][0].region(rank, whole("w0.0").shape)
        assert filled.held["w0.0"].tobytes() == whole("w0.0")[box.slices].tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [listed(2), listed(4, matrices=[(4, 1)]), None])
def test_other_ranks_are_told_why_not(mode: str, target: Any, tmp_path: Path) -> None:
    """Fewer ranks, as many with other slices, one device: an error by name on all of them, and nothing is changed."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    ranks = target.world if target else 1
    full = wanting(src, ("frozen",), target) if target else lambda _: {"w0.0": whole("w0.0"), "frozen": FROZEN}
    got = fill(together(src), target, full, ranks, *MODES[mode])
    for filled in got:
        assert isinstance(filled.error, CheckpointError)
        assert "'frozen'" in str(filled.error) and "ranks" in str(filled.error)
        assert all((array == POISON).all() for array in filled.held.values())
    assert any(isinstance(f.error, LayoutMismatchError) and "only_trainable_params" in str(f.error) for f in got)


@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_wants_is_no_obstacle(mode: str, tmp_path: Path) -> None:
    """A network without it takes the rest, on any number of ranks; alike is taken by all, cut where it is listed."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    layouts = {**listed(2).layouts, "shared": {0: Layout((2,), ((0,), ()))}}
    target = listed(2)._replace(layouts=layouts)
    shared = src.held[0]["shared"]

    def wanted(rank: int) -> Mapping[str, Any]:
        mine = shared[150 * rank : 150 * rank + 150]
        return {"shared": mine, "global_step": src.held[0]["global_step"], "w0.0": whole("w0.0")[24 * rank :][:24]}

    got = fill(together(src), target, wanted, 2, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert all(filled.held[name].tobytes() == array.tobytes() for name, array in wanted(rank).items())
        assert sorted(filled.unused) == sorted(set(OUTSIDE) - {"shared", "global_step"})


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_of_another_shape_hears_of_the_cause(mode: str, tmp_path: Path) -> None:
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    got = fill(together(src), TARGET, lambda rank: {"frozen": np.zeros((3, 6), np.float32)}, 4, *MODES[mode])
    told = [str(filled.error) for filled in got if isinstance(filled.error, LayoutMismatchError)]
    assert told and all("'frozen' has shape [3, 6]" in text and "does not list it" in text for text in told)


@pytest.mark.parametrize("mode", MODES)
def test_the_targets_layouts_list_it(mode: str, tmp_path: Path) -> None:
    """As layouts of a network do: a Parameter that is not sliced yet takes the slice, too."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    target = TARGET._replace(layouts={**TARGET.layouts, "frozen": {0: Layout((2, 2), ((0,), ()))}})
    got = fill(together(src), target, lambda rank: {"frozen": FROZEN if rank else FROZEN[:4]}, 4, *MODES[mode])
    assert_own(got, src, ("frozen",))


@pytest.mark.parametrize("mode", MODES)
def test_the_source_lists_it_when_it_is_told(mode: str, tmp_path: Path) -> None:
    """With its layout given it is a parameter like any other: cut for any job, and the copies are read once."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    full = load_strategy(str(src.strategy))
    full = full._replace(layouts={**full.layouts, "frozen": {0: Layout((2, 2), ((0,), ()))}})
    asked = together(src)._replace(strategy=full)
    target = listed(2)._replace(layouts={**listed(2).layouts, "frozen": {0: Layout((2,), ((), (0,)))}})
    got = fill(asked, target, lambda rank: {"frozen": FROZEN[:, 3 * rank :][:, :3]}, 2, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["frozen"].tobytes() == np.ascontiguousarray(FROZEN[:, 3 * rank :][:, :3]).tobytes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("same", [True, False])
def test_the_target_lists_less_than_the_source(mode: str, same: bool, tmp_path: Path) -> None:
    """A target of trainable parameters only: the frozen one is the slice it was, or whole where it is wanted whole."""
    full = Strategy.from_items(
        [LayoutItem(name, 0, Layout((2,), ((0,), ()))) for name in ("w0.0", "w0.1")]
        + [LayoutItem("norm", 0, Layout((2,), ((), ())))],
        "s",
    )
    src = recorded(source(tmp_path / "src", full, {}))
    target = listed(2) if same else listed(1)
    mine = (lambda rank: whole("w0.1")[24 * rank :][:24]) if same else (lambda rank: whole("w0.1"))
    got = fill(together(src), target, lambda r: {"w0.1": mine(r), "norm": whole("norm")}, target.world, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["w0.1"].tobytes() == mine(rank).tobytes()
        assert filled.held["norm"].tobytes() == whole("norm").tobytes()
    half = fill(together(src), listed(1), lambda rank: {"w0.1": whole("w0.1")[:24]}, 1, *MODES[mode])[0].error
    assert isinstance(half, LayoutMismatchError) and "'w0.1'" in str(half) and "predict_strategy does not" in str(half)


@pytest.mark.parametrize("mode", MODES)
def test_stages_have_their_own(mode: str, tmp_path: Path) -> None:
    """Frozen in the second stage only; a Parameter of the first stage that goes by its name gets nothing."""
    two = listed(2, stages=2)
    src = recorded(source(tmp_path / "src", two, {"x": [None, None, FROZEN[:4], FROZEN[4:]]}))  # type: ignore[list-item]
    got = fill(together(src), two, wanting(src, ("x",), two), 4, *MODES[mode])
    for rank in (2, 3):
        assert got[rank].error is None and got[rank].held["x"].tobytes() == src.held[rank]["x"].tobytes()
    got = fill(together(src), two, lambda rank: {"x": FROZEN[:4]}, 4, *MODES[mode])
    for rank, filled in enumerate(got):
        assert filled.error is None
        assert filled.missing == (["x"] if rank < 2 else [])
        assert (filled.held["x"] == (POISON if rank < 2 else src.held[rank]["x"])).all()


@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_one_stage_each(mode: str, tmp_path: Path) -> None:
    """As networks of a job with pipeline stages give them: every rank knows its own stage."""
    two = listed(2, stages=2)
    src = recorded(source(tmp_path / "src", two, {"x": lambda rank: FROZEN + rank}))

    def of_stage(rank: int) -> Strategy:
        stage = rank // 2
        return two._replace(layouts={n: s for n, s in two.layouts.items() if stage in s}, stages=stage + 1)

    got = fill(together(src), of_stage, wanting(src, ("x",), two), 4, *MODES[mode])
    assert_own(got, src, ("x",))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "alone"])
def test_hosts_with_disks_of_their_own(mode: str, tmp_path: Path) -> None:
    """Nobody sees all files: those who see one compare it, and the rest hear."""
    src = recorded(source(tmp_path / "src", TARGET, OUTSIDE))
    strategy = load_strategy(str(src.strategy))

    def look_of(host: int) -> Any:
        listing = list_checkpoint(str(src.shards), strategy)
        return listing._replace(files={k: p for k, p in listing.files.items() if int(k) // 2 == host})

    seen = Together(lambda: look_of(HERE.transport.rank // 2), strategy)
    how = MODES[mode] if mode != "direct" else ("auto", "replicas")
    got = fill(seen, TARGET, wanting(src, NAMES, TARGET), 4, *how, host=lambda rank: f"host{rank // 2}")
    assert_own(got, src, NAMES)


def test_a_rank_whose_own_file_is_gone(tmp_path: Path) -> None:
    src = source(tmp_path / "src", TARGET, OUTSIDE)
    src.file(3).unlink()
    src.file(3).parent.rmdir()
    got = fill(together(src), TARGET, wanting(src, ("frozen",), TARGET), 4)
    assert all(isinstance(filled.error, (CoverageError, PeerError)) for filled in got)
    assert any("'frozen'" in str(filled.error) and "rank 3" in str(filled.error) for filled in got)


KINDS: dict[str, dict[str, Any]] = {
    "ckpt": {"to": "ckpt"},
    "ckpt, AES-CBC": {"to": "ckpt", "enc_key": b"0123456789ABCDEF", "enc_mode": "AES-CBC"},
    "safetensors, encrypted": {"to": "safetensors", "enc_key": b"0123456789ABCDEF"},
}


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize("kind", KINDS)
def test_formats_and_encryption(kind: str, mode: str, tmp_path: Path) -> None:
    """By the function that users call; `return_param_dict` gives the same."""
    held: dict[str, Content] = {name: OUTSIDE[name] for name in NAMES if name not in ("none", "ragged")}
    src = source(tmp_path / "src", TARGET, held)
    how = KINDS[kind]
    if how["to"] == "ckpt":
        convert(src.shards, tmp_path / "made", **how)
    else:
        encrypt(src.shards, tmp_path / "made", enc_key=how["enc_key"])
    arguments = {
        "format": how["to"], "unified_safetensors_dir": tmp_path / "made", "train_strategy_filename": src.strategy,
        "predict_strategy": src.strategy, "dec_key": how.get("enc_key"), "dec_mode": how.get("enc_mode", "AES-GCM"),
    }  # fmt: skip
    wanted = wanting(src, tuple(held), TARGET)
    verify = "none" if mode == "direct" else "replicas"
    assert_own(load(wanted, 4, mode=mode, verify=verify, **arguments), src, tuple(held))
    if mode == "direct":
        for rank in range(4):
            HERE.transport = type("Rank", (), {"rank": rank, "size": 4})
            told = load_distributed_checkpoint(cell({}), return_param_dict=True, **arguments)
            for name in held:
                assert told[name].asnumpy().tobytes() == np.ascontiguousarray(src.held[rank][name]).tobytes()
    other = {**arguments, "predict_strategy": listed(2)}
    got = load(lambda rank: {"frozen": np.zeros((4, 6), np.float32)}, 2, mode=mode, **other)
    assert all(isinstance(filled.error, LayoutMismatchError) and "'frozen'" in str(filled.error) for filled in got)


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize(
    "supplied",
    [
        {"frozen": ((2, 2), (0, -1))},
        {"frozen": Layout((2, 2), ((0,), ()))},
        Strategy.from_items([LayoutItem("frozen", 0, Layout((2, 2), ((0,), ())))], "more"),
    ],
)
def test_layouts_that_are_supplied(mode: str, supplied: Any, tmp_path: Path) -> None:
    """Beside the strategy file, on either side: then it is cut as anything else is."""
    src = source(tmp_path / "src", TARGET, {"frozen": OUTSIDE["frozen"]})
    arguments = {
        "unified_safetensors_dir": src.shards, "train_strategy_filename": [src.strategy, supplied], "mode": mode,
        "predict_strategy": [listed(2), {"frozen": ((2,), (-1, 0))}],
    }  # fmt: skip
    got = load(lambda rank: {"frozen": FROZEN[:, 3 * rank :][:, :3]}, 2, **arguments)
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["frozen"].tobytes() == np.ascontiguousarray(FROZEN[:, 3 * rank :][:, :3]).tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_names_that_begin_like_accumulated_gradients(mode: str, tmp_path: Path) -> None:
    """`accu_grads.w` is MindSpore's and ignored; a similar name is a parameter, listed or not."""
    layouts = {"accu_gradsX.v": {0: Layout((2,), ((0,), ()))}, "accu_grads.w0.0": {0: Layout((2,), ((0,), ()))}}
    target = listed(2)._replace(layouts={**listed(2).layouts, **layouts})
    held: dict[str, Content] = {
        "accu_gradsX.w": lambda rank: np.full(4, rank, np.float32),
        "accu_grads_scale": np.full(3, 5, np.float32),
        "accu_grads.other": lambda rank: np.zeros(2, np.float32),
    }
    src = recorded(source(tmp_path / "src", target, held))

    def wanted(rank: int) -> Mapping[str, Any]:
        mine = {n: src.held[rank][n] for n in ("accu_gradsX.w", "accu_grads_scale")}
        return {**mine, "accu_gradsX.v": whole("accu_gradsX.v")[24 * rank :][:24], "accu_grads.w0.0": FROZEN}

    for rank, filled in enumerate(fill(together(src), target, wanted, 2, *MODES[mode])):
        assert filled.error is None, filled.error
        expected = {**wanted(rank), "accu_grads.w0.0": np.full((8, 6), POISON, np.float32)}
        assert all(filled.held[name].tobytes() == array.tobytes() for name, array in expected.items())
        assert filled.missing == []


@pytest.mark.parametrize("ranks", [4, 16])
def test_what_the_comparison_reads_does_not_grow_with_the_ranks(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of what is cut; of what is alike besides one copy for every device axis and one more; all ranks together,
    which share it. Buffers are of a MiB at most. Of a scalar all copies, by the rank that opens the file."""
    grid = (2, ranks // 2)
    big = np.random.default_rng(0).random((ranks, 150_000)).astype(np.float32)
    strategy = listed(ranks, matrices=[grid])
    held: dict[str, Content] = {
        "cut": slices(Layout(grid, ((1, 0), ())), big, ranks),
        "alike": big[:1],
        "global_step": np.array([7], np.int32),
    }
    src = source(tmp_path / "src", strategy, held)
    looks: list[Any] = []
    sizes: list[int] = []

    class Counted(dealt.Together):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            looks.append(self)

    real = mmap.mmap

    def area(descriptor: int, nbytes: int, **more: Any) -> Any:
        sizes.append(nbytes)
        return real(descriptor, nbytes, **more)

    monkeypatch.setattr(dealt, "Together", Counted)
    monkeypatch.setattr(mmap, "mmap", area)
    names = ("cut", "alike", "global_step")
    got = fill(together(src), strategy, wanting(src, names, strategy), ranks)
    assert_own(got, src, names)
    n, samples = 150_000 * 4, 16 * 4096
    heads, scalars = whole("w0.0").nbytes, 4 * ranks  # two slices, which are smaller than 4 KiB
    read = [look.count.nbytes for look in looks]
    standing = {4: 3, 16: 3 + 2}[ranks]
    assert sum(read) == heads + scalars + 2 * standing * samples + 3 * n
    assert max(read) <= sum(read) // 2 and max(sizes) <= 1 << 20
    assert sum(look.count.reads for look in looks) < 2 + ranks + 2 * standing * 16 + 3 * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", [listed(2), listed(2)._replace(layouts={"w0.0": {0: Layout((2,), ((), (0,)))}})])
def test_files_that_are_not_there(mode: str, target: Strategy, tmp_path: Path) -> None:
    """One of two ranks' files: the rank that it is of takes what it holds, and no other rank is given that."""
    src = source(tmp_path / "src", listed(2), {"frozen": slices(Layout((2,), ((0,), ())), FROZEN, 2)})
    src.file(1).unlink()
    src.file(1).parent.rmdir()
    got = fill(together(src), target, lambda rank: {"frozen": src.held[rank]["frozen"]}, 2, *MODES[mode])
    same = target == listed(2)
    alone = mode == "alone" and same
    for rank, filled in enumerate(got):
        if alone and rank == 0:
            assert filled.error is None and filled.held["frozen"].tobytes() == src.held[0]["frozen"].tobytes()
        else:
            assert isinstance(filled.error, CheckpointError) and (filled.held["frozen"] == POISON).all()
    assert any("'frozen'" in str(f.error) and "give the file of rank 1 as well" in str(f.error) for f in got)


def test_one_rank_is_told_by_its_shapes(tmp_path: Path) -> None:
    """A job of one rank that finds the file of one of two: what is whole there is whole, and half does not fit."""
    held: dict[str, Content] = {"frozen": slices(Layout((2,), ((0,), ())), FROZEN, 2), "whole": FROZEN}
    src = source(tmp_path / "src", listed(2), held)
    src.file(1).unlink()
    src.file(1).parent.rmdir()
    (got,) = fill(together(src), None, lambda rank: {"whole": FROZEN}, 1, "alone")
    assert got.error is None and got.held["whole"].tobytes() == FROZEN.tobytes()
    (got,) = fill(together(src), None, lambda rank: {"frozen": FROZEN}, 1, "alone")
    assert isinstance(got.error, LayoutMismatchError) and "'frozen' has shape [8, 6]" in str(got.error)


@pytest.mark.parametrize("mode", MODES)
def test_slices_that_are_equal_by_chance(mode: str, tmp_path: Path) -> None:
    """Zeros on all ranks, which the network's layouts cut: each has its slice already, or a whole that is cut."""
    half, full = np.zeros((4, 6), np.float32), np.arange(48, dtype=np.float32).reshape(8, 6)
    src = recorded(source(tmp_path / "src", listed(2), {"zeros": half, "whole": full}))
    layouts = {name: {0: Layout((2,), ((0,), ()))} for name in ("zeros", "whole")}
    target = listed(2)._replace(layouts={**listed(2).layouts, **layouts})
    got = fill(together(src), target, lambda r: {"zeros": half, "whole": full[4 * r :][:4]}, 2, *MODES[mode], cut=True)
    for rank, filled in enumerate(got):
        assert filled.error is None, filled.error
        assert filled.held["zeros"].tobytes() == half.tobytes()
        assert filled.held["whole"].tobytes() == full[4 * rank :][:4].tobytes()


@pytest.mark.parametrize("mode", MODES)
def test_whole_parameters_in_every_file_are_refused(mode: str, tmp_path: Path) -> None:
    """`integrated_save=True`: before anything changes, on all ranks; `allow_equal_slices` takes them as they are."""
    src = recorded(source(tmp_path / "src", listed(2), {}))
    for rank in range(2):
        save_file({"w0.0": whole("w0.0")}, src.file(rank), {"format": "ms"})
    wanted = lambda rank: {"w0.0": whole("w0.0")}  # noqa: E731
    how, verify = MODES[mode]
    arguments = {
        "unified_safetensors_dir": src.shards, "train_strategy_filename": src.strategy, "verify": "none",
        "predict_strategy": src.strategy, "mode": "direct" if how == "alone" else how,
    }  # fmt: skip
    for filled in load(wanted, 2, **arguments):
        assert isinstance(filled.error, LayoutMismatchError) and "integrated_save=False" in str(filled.error)
        assert "'w0.0'" in str(filled.error) and (filled.held["w0.0"] == POISON).all()
    for filled in load(wanted, 2, **arguments, allow_equal_slices=True):
        assert filled.error is None and filled.held["w0.0"].tobytes() == whole("w0.0").tobytes()
    assert verify in ("none", "replicas", "full")
