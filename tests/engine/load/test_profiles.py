"""Hardware profiles, and the cost model that takes them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from ms_ckpt_ext.core.exchange.cost import Hardware, cooperates, cooperative_seconds, direct_seconds
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.errors import UsageError

SHARED = Hardware(storage=100.0, shared=True, ranks_per_host=2, link=10.0, latency=1.0, host=80.0)


@pytest.mark.parametrize(
    ("wanted", "hardware", "seconds"),
    [
        ([100, 100, 100, 100], SHARED, 4.0),  # the storage is the limit
        ([400, 0, 0, 0], SHARED, 5.0),  # one host is
        ([100, 100, 100, 100], SHARED._replace(shared=False), 2.0),
        ([100, 100, 100], SHARED._replace(shared=False, ranks_per_host=3), 3.0),
        ([], SHARED, 0.0),
    ],
)
def test_direct_seconds(wanted: list[int], hardware: Hardware, seconds: float) -> None:
    assert direct_seconds(wanted, hardware) == seconds


def test_cooperative_seconds() -> None:
    assert cooperative_seconds([100, 100], [0, 0], 3, SHARED) == 100 * 2 / 80 + 3
    assert cooperative_seconds([100, 100], [10, 50], 2, SHARED) == 5 + 2  # the links are slower
    assert cooperates([1000] * 8, [100] * 8, [900] * 8, 1, SHARED._replace(link=900.0))
    assert not cooperates([1000] * 8, [1000] * 8, [0] * 8, 1, SHARED), "nothing to exchange"


def test_every_profile_tells_where_its_figures_come_from() -> None:
    assert profiles.names() == ["atlas-800t-a2", "atlas-800t-a2-local", "atlas-a3", "cpu"]
    for name in profiles.names():
        found = profiles.profile(name)
        assert found.title and found.hardware.storage > 0
        figures = {"storage", "link", "latency"} | ({"host"} if found.hardware.host != math.inf else set())
        assert set(found.origins) == figures
        assert all(len(origin) > 20 for origin in found.origins.values())


def test_configs_are_the_profiles() -> None:
    configs = Path(__file__).resolve().parents[3] / "configs" / "hardware"
    assert os.path.realpath(configs) == os.path.realpath(profiles.HARDWARE_FOLDER)


def test_a_profile_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(figures()))
    assert profiles.profile(str(path)).hardware == Hardware(1e9, True, 4, 2e9, 0.001)
    assert profiles.profile(str(path)).name == "mine"


def figures() -> dict:
    return {
        "ranks_per_host": 4,
        "storage": {"bytes_per_second": 1e9, "shared": True},
        "link": {"bytes_per_second": 2e9},
        "latency": {"seconds": 0.001},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"link": {"bytes_per_second": 0}}, r"link\.bytes_per_second must be a number above 0, got 0"),
        ({"link": {}}, r"link\.bytes_per_second must be a number above 0, got None"),
        ({"ranks_per_host": "8"}, r"ranks_per_host must be a number above 0, got '8'"),
        ({"latency": 3}, r"latency\.seconds must be a number above 0, got None"),
    ],
)
def test_what_is_wrong_is_told(change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**figures(), **change}))
    with pytest.raises(UsageError, match=message):
        profiles.profile(str(tmp_path / "x.json"))


def test_no_such_profile(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        profiles.profile(str(tmp_path / "x.json"))
    with pytest.raises(UsageError, match="neither one of atlas-800t-a2, .* nor the path of a .json file"):
        profiles.profile("atlas-9000")
