"""What no strategy lists, loaded into Cells: from any kind of files, from few of them, and how little is read."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext import convert, encrypt, load_distributed_checkpoint
from ms_ckpt_ext.bridge.together import SharedSource as Together
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.unlisted import dealt
from ms_ckpt_ext.errors import CheckpointError, CoverageError, LayoutMismatchError, PeerError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.cells import HERE, POISON, cell, fill, load, threads
from tests.support.live_outside import FROZEN, MODES, NAMES, OUTSIDE, TARGET, assert_own, recorded, together, wanting
from tests.support.outside import Content, listed, slices, source, whole

__all__ = ["threads"]
pytestmark = pytest.mark.usefixtures("threads")


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
