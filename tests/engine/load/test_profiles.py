"""Hardware profiles, and the cost model that takes them."""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.cli import settings
from ms_ckpt_ext.core.exchange.cost import Hardware, Traffic, cooperates, cooperative_seconds, direct_seconds
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError

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
    assert cooperative_seconds(Traffic([100, 100], [0, 0], 3), SHARED) == 100 * 2 / 80 + 3
    assert cooperative_seconds(Traffic([100, 100], [10, 50], 2), SHARED) == 5 + 2  # the links are slower
    assert cooperates([1000] * 8, Traffic([100] * 8, [900] * 8, 1), SHARED._replace(link=900.0))
    assert not cooperates([1000] * 8, Traffic([1000] * 8, [0] * 8, 1), SHARED), "nothing to exchange"


def test_every_profile_tells_where_its_figures_come_from() -> None:
    known = ["atlas-300i-duo", "atlas-800t-a2", "atlas-800t-a2-local", "atlas-910a", "atlas-950", "atlas-a3", "cpu"]
    assert profiles.names() == known
    for name in profiles.names():
        found = profiles.profile(name)
        assert found.title and found.hardware.storage > 0
        figures = {"storage": found.hardware.storage, "link": found.hardware.link, "latency": found.hardware.latency}
        more = ("host", "between", "upload", "reader", "counts", "memory", "call")
        figures |= {
            key: getattr(found.hardware, key) for key in more if getattr(found.hardware, key) not in (0, math.inf)
        }
        assert found.origins.keys() == figures.keys()
        assert all(len(origin) > 20 for origin in found.origins.values())


PUBLISHED = ("http", "HCCL's", "DeepSpeed #")


def test_figures_are_measured_published_or_assumed() -> None:
    for name in profiles.names():
        for figure, origin in profiles.profile(name).origins.items():
            assert origin.startswith(("assumed: ", "measured: ")) or any(p in origin for p in PUBLISHED), (name, figure)


@pytest.mark.parametrize(
    ("product", "on_device", "name"),
    [
        ("ascend910b", True, "atlas-800t-a2"),
        ("ascend910b2c", True, "atlas-800t-a2"),
        ("ascend910_93", True, "atlas-a3"),
        ("ascend910_9392", True, "atlas-a3"),
        ("ascend910", True, "atlas-910a"),
        ("ascend910a", True, "atlas-910a"),
        ("ascend310p3", True, "atlas-300i-duo"),
        ("ascend950pr", True, "atlas-950"),
        ("ascend1000", True, "atlas-800t-a2"),
        ("", True, "atlas-800t-a2"),
        ("", False, "cpu"),
    ],
)
def test_the_product_says_which_machine_it_is(
    product: str, on_device: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(profiles.HARDWARE_VARIABLE, raising=False)
    assert profiles.chosen("", product, on_device).name == name
    monkeypatch.setenv(profiles.HARDWARE_VARIABLE, "atlas-800t-a2-local")
    assert profiles.chosen("", product, on_device).name == "atlas-800t-a2-local"
    assert profiles.chosen("cpu", product, on_device).name == "cpu", "an argument comes first"


def test_what_the_model_takes_into_account() -> None:
    """Uploads, senders, the way between servers, and a latency that grows with the ranks."""
    plain = Traffic([100, 100], [50, 50], 2)
    assert cooperative_seconds(plain, SHARED._replace(upload=10.0)) == 10 + 2
    assert direct_seconds([100, 300], SHARED._replace(upload=10.0)) == 30
    assert direct_seconds([100, 300], SHARED._replace(reader=10.0)) == 30
    assert cooperative_seconds(plain._replace(inside=[80, 0], between=[20, 0]), SHARED) == 10 + 2
    away = plain._replace(inside=[0, 0], between=[20, 0], crossing=[0, 20])
    assert cooperative_seconds(away, SHARED._replace(between=1.0)) == 20 + 2
    assert cooperative_seconds(plain._replace(calls=4), SHARED) == 5 + 4
    assert cooperative_seconds(plain, SHARED._replace(per_rank=0.5)) == 5 + 2 * 2.0
    assert cooperative_seconds(plain, SHARED._replace(counts=10.0)) == 5 + 2 * (1 + 10 * 4 / 10)


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
    with pytest.raises(UsageError, match="neither one of .*atlas-800t-a2, .* nor the path of a .json file"):
        profiles.profile("atlas-9000")


def test_every_load_takes_the_same_hardware() -> None:
    """One name for it: in calls, in MindFormers' YAML, in the launchers, and in what all ranks load with."""
    takes = [
        inspect.signature(taken).parameters
        for taken in (ms_ckpt_ext.load_distributed_checkpoint, ms_ckpt_ext.resume, LoadOptions, ms_ckpt_ext.plan)
    ]
    assert all("hardware" in parameters for parameters in takes)
    assert Options().hardware == "" and Options().bucket_bytes is None
    assert "hardware" in {setting.name for setting in settings.SETTINGS}


@pytest.mark.parametrize(
    ("hardware", "error", "message"),
    [
        ("atlas-9000", UsageError, "no hardware profile 'atlas-9000'"),
        (Path("nowhere.json"), UsageError, "no hardware profile 'nowhere.json'"),
        (5, ArgumentTypeError, "hardware must be a profile's name or path, got int 5"),
        (None, ArgumentTypeError, "hardware must be a profile's name or path, got NoneType None"),
    ],
)
def test_a_load_is_told_at_once(hardware: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LoadOptions(hardware=hardware)
    assert LoadOptions(hardware=Path("cpu")).hardware == "cpu"
