"""Several servers on the emulated Ascend: bytes between them are those that the plan predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.demand import Ways
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.load import estimate, profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.checkpoints import strategy_of
from tests.support.shards import Full, write

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
BUCKET, SIZE = 1 << 20, 2
SLOW = {
    "ranks_per_host": SIZE,
    "storage": {"bytes_per_second": 1e10, "shared": True},
    "link": {"bytes_per_second": 1e10},
    "between": {"bytes_per_second": 1e6},
    "latency": {"seconds": 1e-6},
}


def test_predicted_is_counted_by_tier(tmp_path: Path) -> None:
    """Four ranks on two servers; every server wants everything twice, and one matrix is cut."""
    emulator_or_skip()
    rng = np.random.default_rng(0)
    full: Full = {f"w{n}": ("F32", rng.standard_normal((512, 512), np.float32)) for n in range(3)}
    trained = strategy_of(dict.fromkeys(full, Layout((4,), ((0,), ()))), tmp_path / "trained.ckpt")
    cuts = (Layout((4,), ((), ())), Layout((2, 2), ((), (0,))), Layout((2, 2), ((1,), ())))
    target = strategy_of(dict(zip(full, cuts)), tmp_path / "predicted.ckpt")
    write(trained, full, tmp_path / "source")
    write(target, full, tmp_path / "expected")
    (tmp_path / "slow.json").write_text(json.dumps(SLOW))
    env = {
        "CANNEMU_ASYNC": "1",
        "CANNEMU_SERVERS": str(SIZE),
        "CANNEMU_SOC": "Ascend910_9392",
        "CANNEMU_STRICT_TYPES": "1",
    }
    worker = Path(__file__).with_name("tier_worker.py")
    result = run_msrun(worker, tmp_path, BUCKET, SIZE, ranks=4, device="ascend", env=env, tmp_path=tmp_path)
    lines = [line for rank in range(4) for line in result.worker(rank).splitlines() if line.startswith("MOVED ")]
    counted = np.array([json.loads(line[6:]) for line in lines])

    hardware = profiles.profile(str(tmp_path / "slow.json")).hardware
    source = estimate.of_catalog(open_catalog(str(tmp_path / "source"), load_strategy(tmp_path / "trained.ckpt")))
    ways = Ways(groups=True, servers=(0, 0, 1, 1))
    done = estimate.dry_run(source, target, LoadOptions(bucket_bytes=BUCKET), hardware, ways)
    tally = done.tally
    assert done.table.ways.tiered
    assert counted.shape == (4, 2)
    assert counted[:, 0].sum() == tally.inside.sum() + tally.between.sum()
    assert [counted[:2, 1].sum(), counted[2:, 1].sum()] == tally.crossing.tolist()
