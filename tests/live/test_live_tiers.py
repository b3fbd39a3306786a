"""Several servers on the emulated Ascend: bytes between them are those that the plan predicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.demand import Ways
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.load import estimate, profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.checkpoints import strategy_of
from tests.support.shards import Full, write

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
BUCKET = 1 << 20
SLOW = {
    "storage": {"bytes_per_second": 1e10, "shared": True},
    "link": {"bytes_per_second": 1e10},
    "between": {"bytes_per_second": 1e6},
    "latency": {"seconds": 1e-6},
}
NPU = {"CANNEMU_ASYNC": "1", "CANNEMU_SOC": "Ascend910_9392", "CANNEMU_STRICT_TYPES": "1"}


class Moved(NamedTuple):
    """What a rank's device counted in a load, less what ranks need to meet; and what the load says that it did."""

    link: int
    between: int
    communicators: int
    read: int
    received: int
    rounds: int


ROWS, COLUMNS, HALVES = ((0,), ()), ((), (0,)), ((), (1,))


@pytest.mark.parametrize(
    ("ranks", "size", "cuts", "groups"),
    [
        (4, 2, (COLUMNS, HALVES), 0),
        (4, 2, (ROWS, ROWS), 2),
        (8, 4, (ROWS, COLUMNS), 2),
        (8, 5, (ROWS, COLUMNS), 2),
        (16, 8, (ROWS, COLUMNS), 2),
    ],
    ids=["4 tiered", "4 in groups", "8", "8, a ring of 5 and 3", "16"],
)
def test_predicted_is_counted_by_tier(ranks: int, size: int, cuts: Sequence[Any], groups: int, tmp_path: Path) -> None:
    """Every server wants everything; all gather one matrix, groups that the job has another, and one is cut."""
    if groups:
        long_one("four ranks and no groups show the same")
    emulator_or_skip()
    rng = np.random.default_rng(0)
    rows = {"all": 512, "group": 2048, "cut": 512}
    full: Full = {name: ("F32", rng.standard_normal((count, 512), np.float32)) for name, count in rows.items()}
    trained = strategy_of(dict.fromkeys(full, Layout((ranks,), ((0,), ()))), tmp_path / "trained.ckpt")
    layouts = Layout((ranks,), ((), ())), *(Layout((ranks // 2, 2), cut) for cut in cuts)
    target = strategy_of(dict(zip(full, layouts)), tmp_path / "predicted.ckpt")
    write(trained, full, tmp_path / "source")
    write(target, full, tmp_path / "expected")
    (tmp_path / "slow.json").write_text(json.dumps({**SLOW, "ranks_per_host": size}))
    env = {**NPU, "CANNEMU_SERVERS": f"{size},{ranks - size}", "HCCL_BUFFSIZE": "16", "CANNEMU_HBM_MB": "1536"}
    env["CANNEMU_DEVICES"] = "16"  # of all servers
    worker = Path(__file__).with_name("tier_worker.py")
    result = run_msrun(
        worker,
        tmp_path,
        BUCKET,
        size,
        ranks=ranks,
        device="ascend",
        env=env,
        tmp_path=tmp_path,
        timeout=120 + 40 * ranks,
    )
    lines = [line for rank in range(ranks) for line in result.worker(rank).splitlines() if line.startswith("MOVED ")]
    counted = [Moved(**json.loads(line[6:])) for line in lines]

    hardware = profiles.profile(str(tmp_path / "slow.json")).hardware
    source = estimate.of_catalog(open_catalog(str(tmp_path / "source"), load_strategy(tmp_path / "trained.ckpt")))
    servers = tuple(rank // size for rank in range(ranks))
    known = frozenset(tuple(range(first, ranks, 2)) for first in (0, 1))
    ways = Ways(known=known, servers=servers)
    done = estimate.dry_run(source, target, LoadOptions(bucket_bytes=BUCKET), hardware, ways)
    tally = done.tally
    assert done.table.ways.tiered == (COLUMNS in cuts)
    assert sum(map(done.table.is_of_some, done.table.chunks.groups)) == groups, "the job's groups gather"
    assert len(counted) == ranks
    assert sum(each.link for each in counted) == tally.inside.sum() + tally.between.sum()
    crossed = [sum(each.between for each, at in zip(counted, servers) if at == server) for server in (0, 1)]
    assert crossed == tally.crossing.tolist()
    assert [each.read for each in counted] == tally.read.tolist()
    assert [each.received for each in counted] == tally.received.tolist()
    assert {each.rounds for each in counted} == {len(tally.rounds)}
    assert {each.communicators for each in counted} == {0}, "no communicator is made"
