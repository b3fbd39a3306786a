"""`ms-ckpt measure`: steps that all ranks make alike, and a profile that plans take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import plan
from ms_ckpt_ext.api.measure import measure
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.load.measure import Measured, measure_machine, profile_of
from ms_ckpt_ext.errors import DiscoveryError, PeerError, StorageError, UsageError
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.command_line import as_json, fine, run
from tests.support.counting import counted

STEP = 4 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one too small to be read."""
    (tmp_path / "src").mkdir()
    for name, nbytes in (("a", 3 * STEP), ("b", STEP), ("small", 10)):
        (tmp_path / "src" / name).write_bytes(b"x" * nbytes)
    return tmp_path / "src"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_on_servers(size: int, folder: Path, tmp_path: Path) -> None:
    def work(transport: LocalTransport) -> tuple[Measured, int]:
        counts = counted(transport)
        return measure_machine(transport, str(folder), f"server {transport.rank // size}", 0.1), counts.sent

    ran = LocalWorld(4).run(work)
    found = ran[0][0]
    assert {one._replace() for one, _ in ran} == {found}, "all ranks come to the same figures"
    assert (found.ranks, found.hosts, found.shared) == (4, 4 // size, True)
    assert min(found.reader, found.host, found.storage, found.latency) > 0
    assert (found.link > 0, found.between > 0) == (size > 1, size < 4)
    assert (found.upload, found.memory, found.call) == (0, 0, 0), "there is no device"
    assert len({sent for _, sent in ran}) == 1
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile_of(found, "today")))
    hardware = profiles.profile(str(path)).hardware
    assert (hardware.ranks_per_host, hardware.latency, hardware.reader) == (size, found.latency, found.reader)
    assert (hardware.between, hardware.shared) == (found.between, size < 4)
    assert all(told.startswith("measured: 4 ranks") for told in profiles.profile(str(path)).origins.values())


def test_alone_and_as_a_command(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    found = measure(folder, path, seconds=0.1)
    assert json.loads(path.read_text()) == found
    assert found["link"]["from"].startswith("assumed: ")
    assert as_json("measure", folder, path, "--seconds", "0.1").keys() == found.keys()
    out = fine("measure", folder, path, "--seconds", "0.1")
    assert f"profile: {path}" in out and "reader" in out
    report = plan(None, None, shapes={"w": {"dtype": "F32", "shape": [4, 4]}}, hardware=[str(path)])
    assert report.predictions[0].profile == "mine"


def test_what_does_not_fit_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match="no file of 4 MiB or more in"):
        measure(tmp_path / "src" / "none", tmp_path / "x.json")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (({"seconds": 0}, "above 0"), ({"dst": "x.txt"}, "a .json file"))
    for arguments, message in wrong:
        with pytest.raises(UsageError, match=message):
            measure(**{"src": folder, "dst": tmp_path / "x.json", **arguments})
    with pytest.raises(StorageError, match="cannot write hardware profile"):
        measure(folder, tmp_path / "no" / "where.json", seconds=0.1)
    assert run("measure", folder, "x.txt").code == 2


def test_one_rank_that_sees_nothing_is_told_to_all(folder: Path, tmp_path: Path) -> None:
    world = LocalWorld(2)

    def work(transport: LocalTransport) -> Measured:
        return measure_machine(transport, str(folder if transport.rank else tmp_path / "none"), "one", 0.1)

    with pytest.raises((DiscoveryError, PeerError)):  # whichever thread is first to tell
        world.run(work)
    assert isinstance(world.errors[0], DiscoveryError)
    assert isinstance(world.errors[1], PeerError)
