"""Which transport is chosen; for MCCL and HCCL, in jobs that have them, see test_job_transports.py."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ms_ckpt_ext.errors import PeerError, TransportError, UsageError
from ms_ckpt_ext.transport import gate, select
from ms_ckpt_ext.transport.control import FIRST_MEETING
from ms_ckpt_ext.transport.local import LocalTransport
from ms_ckpt_ext.transport.select import TRANSPORT_VARIABLE, naming_absent, select_transport


def test_a_process_on_its_own_is_local() -> None:
    for target in (None, "CPU", "Ascend"):
        t = select_transport(target)
        assert isinstance(t, LocalTransport) and t.size == 1


@pytest.mark.parametrize("name", ["mccl", "hccl"])
def test_a_backend_needs_a_job(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportError, match="msrun"):
        select_transport(override=name)
    monkeypatch.setenv(TRANSPORT_VARIABLE, name)
    with pytest.raises(TransportError, match=name):
        select_transport()
    assert isinstance(select_transport(override="local"), LocalTransport)  # the argument goes before the environment


def test_unknown_names_are_refused_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="override='mpi': choose one of local, mccl, hccl"):
        select_transport(override="mpi")
    monkeypatch.setenv(TRANSPORT_VARIABLE, "nccl")
    with pytest.raises(UsageError, match=f"{TRANSPORT_VARIABLE}='nccl'"):
        select_transport()


def test_a_group_needs_hccl() -> None:
    with pytest.raises(UsageError, match="group='stage_1' needs the hccl transport"):
        select_transport(group="stage_1")


@pytest.mark.parametrize("told", ["", "a container"])
def test_ranks_of_a_host_meet_where_its_name_tells_who_they_are(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore counts the ranks of a host name; where several hosts have it, that is told by a variable."""
    communication = SimpleNamespace(
        get_rank=lambda: 3,
        get_local_rank=lambda: 1,
        get_local_rank_size=lambda: 2,
        get_group_size=lambda: 4,
        is_initialized=lambda: True,
    )
    mint = SimpleNamespace(distributed=communication)
    monkeypatch.setitem(sys.modules, "mindspore", SimpleNamespace(communication=communication, mint=mint))
    monkeypatch.setitem(sys.modules, "ms_ckpt_ext.transport.mccl", SimpleNamespace(Mccl=lambda timeout: timeout))
    monkeypatch.setenv(select.HOST_VARIABLE, told)
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    monkeypatch.setenv("MS_SCHED_PORT", f"of {os.getpid() % 10000}")
    if told:
        assert select_transport(override="mccl", timeout=5.0) == 5.0  # though nobody else comes
        return
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(gate.meet, 0, 2, 20.0, False, number=2)
        assert select_transport(override="mccl", timeout=20.0) == 20.0
        assert other.result() == [2, 3]


@pytest.mark.parametrize(
    ("here", "named"),
    [
        ([0, 1], "Of this host ranks 0, 1 have come; look at the logs of the others: ranks 2, 3"),
        ([], ""),
        ([0, 1, 2, 3], ""),
    ],
)
def test_who_of_other_hosts_may_be_missing_is_named(here: list[int], named: str) -> None:
    told = f"rank 0 waited 1 s in {FIRST_MEETING}"
    with pytest.raises(TransportError) as caught, naming_absent(here, 4):
        raise TransportError(told)
    assert str(caught.value) == (f"{told}. {named}" if named else told)


@pytest.mark.parametrize("error", [PeerError("rank 3 is gone", 3), TransportError("no way leads there")])
def test_another_error_of_the_first_meeting_stays_as_it_is(error: TransportError) -> None:
    with pytest.raises(TransportError) as caught, naming_absent([0, 1], 4):
        raise error
    assert caught.value is error
