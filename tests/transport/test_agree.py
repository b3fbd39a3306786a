"""Agreement and status, over threads."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from ms_ckpt_ext.errors import DisagreementError, PeerError, StorageError
from ms_ckpt_ext.transport.agree import agree, common_groups, share_status, start_status
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld


def outcomes(size: int, fn: Callable[[LocalTransport], Any]) -> list[Any]:
    """What `fn` returned or raised on every rank; afterwards all ranks must still be in step."""

    def work(t: LocalTransport) -> Any:
        try:
            result: Any = fn(t)
        except Exception as error:
            result = error
        assert t.share(b"in step") == [b"in step"] * size
        return result

    return LocalWorld(size).run(work)


@pytest.mark.parametrize("size", [1, 4])
def test_same_facts_agree(size: int) -> None:
    assert outcomes(size, lambda t: agree(t, {"plan": b"\0\1", "version": "2.10"})) == [None] * size
    assert outcomes(size, lambda t: agree(t, {})) == [None] * size


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", "a", "b", "a", "c"], "'fact' on ranks 2, 4 is not what it is on ranks 0, 1, 3"),
        (["b", "a", "a", "a", "a"], "'fact' on rank 0 is not what it is on ranks 1, 2, 3, 4"),
        (["a", "b", "a", "b", "c"], "'fact' on ranks 1, 3, 4 is not what it is on ranks 0, 2"),
        (["a", None, "a", "a", "a"], "'fact' on rank 1 is not what it is on ranks 0, 2, 3, 4"),
    ],
    ids=["minority", "rank 0", "tie goes to the lowest rank", "absent"],
)
def test_a_different_fact_is_named_on_every_rank(values: list[str], expected: str) -> None:
    def facts(rank: int) -> dict[str, str]:
        return {"other": "same", **({"fact": values[rank]} if values[rank] is not None else {})}

    for error in outcomes(5, lambda t: agree(t, facts(t.rank))):
        assert isinstance(error, DisagreementError)
        assert expected in str(error) and "'other'" not in str(error)


def test_several_facts_are_named() -> None:
    error = outcomes(3, lambda t: agree(t, {"plan": str(t.rank == 1), "step": str(t.rank == 2)}))[0]
    assert "'plan' on rank 1" in str(error) and "'step' on rank 2" in str(error)


def test_text_and_bytes_of_the_same_value_are_the_same() -> None:
    assert outcomes(2, lambda t: agree(t, {"x": "é" if t.rank else "é".encode()})) == [None, None]


@pytest.mark.parametrize("size", [1, 4])
def test_no_failure_passes(size: int) -> None:
    assert outcomes(size, share_status) == [None] * size


def test_a_failure_is_the_ranks_own_there_and_a_peer_error_elsewhere() -> None:
    mine = {1: OSError("disk on fire"), 2: ValueError("bad shape")}
    got = outcomes(4, lambda t: share_status(t, mine.get(t.rank)))
    assert got[1] is mine[1] and got[2] is mine[2]
    for error in (got[0], got[3]):
        assert isinstance(error, PeerError) and error.rank == 1
        assert "OSError: disk on fire" in str(error) and "rank 2 failed too" in str(error)


def test_an_error_without_a_message_is_still_a_failure() -> None:
    got = outcomes(2, lambda t: share_status(t, BufferError() if t.rank else None))
    assert isinstance(got[0], PeerError) and "BufferError" in str(got[0])


@pytest.mark.parametrize(
    ("refused", "kind"),
    [(MemoryError(), MemoryError), (RuntimeError("can't start new thread"), MemoryError), (OSError(5, "x"), OSError)],
    ids=["memory", "a thread", "a read"],
)
def test_what_the_system_refuses_a_rank_has_a_name(refused: BaseException, kind: type[Exception]) -> None:
    got = outcomes(2, lambda t: share_status(t, refused if t.rank else None))
    reason = "Input/output error" if kind is OSError else "Cannot allocate memory"
    assert isinstance(got[1], StorageError) and isinstance(got[1], kind) and got[1].__cause__ is refused
    assert f"cannot do the part of rank 1: {reason}; " in str(got[1])
    assert isinstance(got[0], PeerError) and str(got[1]) in str(got[0])


def test_a_huge_message_is_cut() -> None:
    got = outcomes(2, lambda t: share_status(t, ValueError("x" * 10**6) if t.rank else None))
    assert len(str(got[0])) < 5000


def test_a_group_is_common_when_all_of_its_members_have_it() -> None:
    """Rank 3 lacks the last: who uses it would wait for rank 3 for ever."""
    known = {0: [(0, 2), (0, 1, 3)], 1: [(1, 3), (0, 1, 3)], 2: [(0, 2)], 3: [(1, 3)]}

    def common(transport: LocalTransport) -> frozenset[tuple[int, ...]]:
        transport.traits = transport.traits._replace(known_groups=tuple(known[transport.rank]))
        return common_groups(transport)

    assert outcomes(4, common) == [frozenset({(0, 2), (1, 3)})] * 4
    assert outcomes(2, common_groups) == [frozenset()] * 2


def test_a_status_in_two_steps() -> None:
    """Told, then heard after other work; who failed raises its own error, the others its message."""
    broken = ValueError("no disk")

    def step(transport: LocalTransport) -> None:
        verdict = start_status(transport, broken if transport.rank == 1 else None)
        buffer = transport.allocate(16)
        transport.start_broadcast(buffer, 16, 0).wait()
        verdict()

    found = outcomes(3, step)
    assert found[1] is broken
    assert all(isinstance(found[rank], PeerError) and "no disk" in str(found[rank]) for rank in (0, 2))
