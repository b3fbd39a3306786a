"""`integrated_save=True` puts whole parameters into every rank's file: every job detects it at almost no cost."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext as mx
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.integrity.soundness import Health
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.engine.unlisted import whole_slices
from ms_ckpt_ext.engine.unlisted.dealt import Together
from ms_ckpt_ext.engine.unlisted.whole_slices import PROBE_BYTES, Alone, Gathered, Probe, find_gathered, refuse_gathered
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.checkpoints import cut, read_merged, strategy_of
from tests.support.command_line import as_json, run

Arrays = Mapping[str, np.ndarray]
ROWS = Layout((2,), ((0,), ()))
SHARDED = Layout((2, 2), ((0,), ()), 1, -1)
"""Two ways over axis 0, each slice in two shards."""


def values(rows: int = 8, names: str = "wv") -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(n).random((rows, 4), np.float32) for n, name in enumerate(names)}


def gathered(root: Path, layout: Layout = ROWS, full: Optional[Arrays] = None) -> Path:
    """`shards/` whose files hold everything whole, and `s.ckpt`, which says that it is cut."""
    full = values() if full is None else full
    strategy = strategy_of(dict.fromkeys(full, layout), root / "s.ckpt")
    step = {"global_step": np.array([5], np.int32)}
    for rank in range(strategy.world):
        (root / f"shards/rank_{rank}").mkdir(parents=True)
        save_file({**full, **step}, root / f"shards/rank_{rank}/net.safetensors", {"format": "ms"})
    return root


def catalog_in(root: Path) -> Catalog:
    return open_catalog(str(root / "shards"), load_strategy(root / "s.ckpt"))


def look_into(root: Path) -> tuple[Optional[Gathered], Alone]:
    catalog = catalog_in(root)
    look = Alone(catalog)
    return find_gathered(catalog, catalog.tensors, look), look


JOBS: dict[str, Callable[..., Any]] = {
    "unified_safetensors": lambda root, **m: mx.unified_safetensors(root / "shards", root / "s.ckpt", root / "o", **m),
    "merge": lambda root, **m: mx.merge(root / "shards", root / "o", strategy=root / "s.ckpt", **m),
    "reshard": lambda root, **m: mx.reshard(root / "shards", root / "o", strategy=root / "s.ckpt", **m),
    "transform_checkpoints": lambda root, **m: mx.transform_checkpoints(
        root / "shards", root / "o", "net", root / "s.ckpt", root / "s.ckpt", output_format="safetensors", **m
    ),
    "transform_checkpoint_by_rank": lambda root, **m: mx.transform_checkpoint_by_rank(
        0, {r: root / f"shards/rank_{r}/net.safetensors" for r in (0, 1)}, root / "o/x.safetensors", root / "s.ckpt",
        **m
    ),
    "load_distributed_checkpoint": lambda root, **m: mx.load_distributed_checkpoint(
        None, None, None, root / "s.ckpt", format="safetensors", unified_safetensors_dir=root / "shards",
        dst_safetensors_dir=root / "o", **m
    ),
    "load": lambda root, **m: mx.load(root / "shards", root / "s.ckpt", **m),
}  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_refused_by_every_job_unless_it_is_meant(job: str, tmp_path: Path) -> None:
    root = gathered(tmp_path)
    with pytest.raises(LayoutMismatchError, match=r"'v', 'w'.*rank_0/net.*rank_1/net.*integrated_save=False.*allow_eq"):
        JOBS[job](root)
    assert not (tmp_path / "o").exists()
    JOBS[job](root, allow_equal_slices=True)


def test_what_is_meant_is_done(tmp_path: Path) -> None:
    root = gathered(tmp_path)
    mx.unified_safetensors(root / "shards", root / "s.ckpt", root / "o", allow_equal_slices=True)
    merged, _ = read_merged(root / "o")
    assert merged["w"].data == 2 * values()["w"].tobytes()


def test_the_remedies_that_are_told_work(tmp_path: Path) -> None:
    root = gathered(tmp_path)
    with pytest.raises(LayoutMismatchError) as told:
        JOBS["merge"](root)
    path = re.findall(r"rank's file, such as '([^']*)'", str(told.value))[0]
    assert mx.load(path)["w"][...].tobytes() == values()["w"].tobytes()
    mx.merge(path, root / "one")
    assert read_merged(root / "one")[0]["w"].data == values()["w"].tobytes()


def test_an_ordinary_checkpoint_costs_the_beginnings_of_two_slices(tmp_path: Path) -> None:
    full = values(4096)
    for layout in (ROWS, SHARDED):
        root = tmp_path / str(layout.devices)
        root.mkdir()
        cut(strategy_of(dict.fromkeys(full, layout), root / "s.ckpt"), full, root / "shards")
        found, look = look_into(root)
        assert found is None
        assert (look.count.reads, look.count.nbytes) == (2, 2 * PROBE_BYTES)


def test_slices_that_differ_late_are_slices(tmp_path: Path) -> None:
    """Of the smaller parameter everything is equal; of the other all but the last element."""
    full = values(2000)
    root = gathered(tmp_path, full=full)
    full["w"][-1, -1] += 1
    save_file(full, root / "shards/rank_1/net.safetensors", {"format": "ms"})
    assert look_into(root)[0] is None
    mx.merge(root / "shards", root / "o", strategy=root / "s.ckpt")


@pytest.mark.parametrize("other", [np.zeros((8, 4), np.float32), np.ones((8, 4), np.float16), np.full((8, 4), True)])
def test_constants_prove_nothing(other: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fresh optimizer is all zeros: if a weight shows real slices there is no warning, otherwise there is one."""
    full = {"moment": other}
    alone = gathered(tmp_path / "alone", full=full)
    assert (found := look_into(alone)[0]) is not None and found.constant
    mx.merge(alone / "shards", alone / "o", strategy=alone / "s.ckpt")
    assert [message for message in caplog.messages if "'moment'" in message and "one value throughout" in message]
    weighed = {**full, **values(names="w")}
    proved = gathered(tmp_path / "proved", full=weighed)
    with pytest.raises(LayoutMismatchError, match="'w', 'moment'"):
        JOBS["merge"](proved)
    caplog.clear()
    (tmp_path / "fine").mkdir()
    cut(strategy_of(dict.fromkeys(weighed, ROWS), tmp_path / "fine/s.ckpt"), weighed, tmp_path / "fine/shards")
    JOBS["merge"](tmp_path / "fine")
    assert caplog.messages == []


def test_gathered_optimizer_shards(tmp_path: Path) -> None:
    """`optimizer_weight_shard_aggregated_save`: the two ways of tensor parallelism differ, their shards do not."""
    full = values(16)
    strategy = strategy_of(dict.fromkeys(full, SHARDED), tmp_path / "s.ckpt")
    unsharded = {name: Layout((2, 2), ((0,), ())) for name in full}
    cut(Strategy({n: {0: layout} for n, layout in unsharded.items()}, 4, 1), full, tmp_path / "shards")
    assert strategy.world == 4
    with pytest.raises(LayoutMismatchError, match=r"optimizer shard of the 2 parameters.*'v', 'w'.*no optimizer shard"):
        JOBS["merge"](tmp_path)
    strategy_of(unsharded, tmp_path / "s.ckpt")
    JOBS["merge"](tmp_path)
    assert read_merged(tmp_path / "o")[0]["w"].data == full["w"].tobytes()


def test_everything_gathered_with_optimizer_shards(tmp_path: Path) -> None:
    found, _ = look_into(gathered(tmp_path, SHARDED))
    assert found is not None and not found.shards and not found.constant


def enlarge(path: Path, small: Arrays) -> None:
    """A file whose `t` is a little too large to be compared whole: it begins with a number, and is a hole."""
    rows = (whole_slices.WHOLE_BYTES // 2 - small["s"].nbytes) // 16 + 1
    header = {"s": ("F32", [4096, 4], small["s"].nbytes), "t": ("F32", [rows, 4], 16 * rows)}
    at, told = 0, {}
    for name, (dtype, shape, nbytes) in header.items():
        told[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(told).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + small["s"].tobytes() + b"x")
        file.truncate(8 + len(text) + at)


def test_what_is_too_large_to_compare_whole_is_sampled(tmp_path: Path) -> None:
    small = values(4096, "s")
    root = gathered(tmp_path, full={**small, "t": np.zeros((1, 4), np.float32)})
    for path in root.glob("shards/*/net.safetensors"):
        enlarge(path, small)
    found, look = look_into(root)
    assert found is not None and found.names == ("s", "t")
    assert look.count.nbytes == 4 * PROBE_BYTES + 2 * small["s"].nbytes + 2 * 8 * PROBE_BYTES
    path = root / "shards/rank_1/net.safetensors"
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert look_into(root)[0] is None


def test_with_one_file_nothing_can_be_told(tmp_path: Path) -> None:
    root = gathered(tmp_path)
    files = {1: root / "shards/rank_1/net.safetensors"}
    mx.transform_checkpoint_by_rank(1, files, root / "o/x.safetensors", root / "s.ckpt", root / "s.ckpt")


def test_ranks_share_the_look_and_the_refusal(tmp_path: Path) -> None:
    root = gathered(tmp_path, full=values(4096))
    catalog = catalog_in(root)
    read: dict[int, int] = {}

    def rank(transport: LocalTransport) -> None:
        look = Together(transport, catalog, {0: frozenset((0,)), 1: frozenset((1, 2))})
        try:
            refuse_gathered(catalog, look)
        finally:
            read[transport.rank] = look.count.nbytes

    world = LocalWorld(3, timeout=20.0)
    with pytest.raises(LayoutMismatchError):
        world.run(rank)
    assert len({str(error) for error in world.errors.values()}) == 1 and len(world.errors) == 3
    once = 2 * PROBE_BYTES + 2 * values(4096)["w"].nbytes
    assert read[0] == once == read[1] + read[2] and min(read[1], read[2]) > once // 3


def test_the_same_look_is_taken_whatever_is_found(tmp_path: Path) -> None:
    """Collective: the probes depend on answers that all ranks share, and on nothing else."""
    root = gathered(tmp_path)
    catalog = catalog_in(root)
    asked: list[list[Probe]] = [[], []]
    for told in asked:
        alone = Alone(catalog)
        find_gathered(catalog, catalog.tensors, lambda probes: told.extend(probes) or alone(probes))  # noqa: B023
    assert asked[0] == asked[1]


def test_verify_calls_it_a_fault(tmp_path: Path) -> None:
    root = gathered(tmp_path)
    found = mx.verify(root / "shards", strategy=root / "s.ckpt")
    assert isinstance(found, Health) and not found.ok
    assert found.gathered is not None and found.gathered.names == ("v", "w")
    meant = mx.verify(root / "shards", strategy=root / "s.ckpt", allow_equal_slices=True)
    assert meant.ok
    words = ("verify", root / "shards", "--strategy", root / "s.ckpt")
    ran = run(*words)
    assert ran.code == 1 and "integrated_save=True" in ran.out and "'v', 'w'" in ran.out
    assert as_json(*words, code=1)["gathered"]["names"] == ["v", "w"]
    assert run(*words, "--allow-equal-slices").code == 0


@pytest.mark.parametrize("command", ["merge", "reshard"])
def test_the_command_line_takes_what_is_meant(command: str, tmp_path: Path) -> None:
    root = gathered(tmp_path)
    words = (command, root / "shards", root / "o", "--strategy", root / "s.ckpt")
    ran = run(*words)
    assert ran.code == 3 and "--allow-equal-slices" in ran.err
    assert run(*words, "--allow-equal-slices").code == 0
