"""What ranks tell each other, when one of them is malicious: errors that name it; answers where it is honest."""

from __future__ import annotations

import json
import zlib
from functools import cache
from typing import Any

import pytest

from ms_ckpt_ext.errors import CheckpointError, TransportError
from ms_ckpt_ext.transport.agree import NATURAL, Maybe, numbered, pack, parsed, share_numbers, share_texts, share_values
from ms_ckpt_ext.transport.hub.frames import LENGTH
from ms_ckpt_ext.transport.rendezvous.cells import gather_messages
from ms_ckpt_ext.transport.rendezvous.meeting import site_told
from tests.hostile.ranks import JOBS, Scripted, read
from tests.support.damage import memory_limit, time_limit

BOMB = zlib.compress(bytes(64 << 20), 9)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (int, 7, [True, 1.5, "7", None]),
        (NATURAL, (1 << 64) - 1, [-1, 1 << 64, 10**4000, False, "7"]),
        (float, 1, ["1", None, True]),
        (bool, False, [0, None]),
        ([str], ["a", ""], [["a", 1], "ab", {"a": "b"}, [["a"]]]),
        ((str, [NATURAL]), ["a", [1, 2]], [["a"], ["a", [1], 2], ["a", [-1]], [1, [1]], "ab", {}]),
        ({str: [bool]}, {"a": [], "b": [True]}, [{"a": True}, [], [["a", []]]]),
        ({"a": str, "b": Maybe(str)}, {"a": "x", "b": None}, [{"a": "x"}, {"a": None, "b": "x"}, {"a": "", "c": ""}]),
        (Maybe((str,)), None, [["a", "b"], 0, ""]),
        ({str: {int, str}}, {"a": 1, "b": "c"}, [{"a": True}, {"a": None}]),
        (object, [{"any": None}], []),
    ],
)
def test_forms(form: Any, good: Any, bad: list[Any]) -> None:
    assert parsed(json.dumps(good).encode(), form) == good
    assert parsed(json.dumps([good, good]).encode(), [form]) == [good, good]
    for value in bad:
        for told, whole in ((value, form), ([good, value], [form])):
            with pytest.raises(ValueError, match=r"."):
                parsed(json.dumps(told).encode(), whole)


@pytest.mark.parametrize(
    "said", [b"", b"no zlib", BOMB, zlib.compress(b"[" * 100_000), zlib.compress(b"\xff"), pack("w")]
)
def test_a_value_that_is_none_is_said_to_be_of_its_rank(said: bytes) -> None:
    with (
        time_limit(),
        memory_limit(160 << 20),
        pytest.raises(TransportError, match=r"rank 1 told what is not .*version"),
    ):
        share_values(Scripted([{"hex": said.hex()}]), [1], [int])


@pytest.mark.parametrize("said", ["", "-1", "1e3", "٣", "1" * 5000, " 1", "None"])
def test_numbers_that_are_none(said: str) -> None:
    with time_limit(), pytest.raises(TransportError, match="rank 1 told what is not understood") as caught:
        share_numbers(Scripted([{"text": said}]), 7)
    assert len(str(caught.value)) < 400


def test_what_is_honest_comes_as_it_was_told() -> None:
    assert share_numbers(Scripted([{"text": "8"}]), 7) == [7, 8]
    assert share_texts(Scripted([{"text": "é"}]), "host") == ["host", "é"]
    assert share_values(Scripted([{"json": [2, 3]}]), [1], [int], sum) == [1, 5]
    assert numbered([[(1, "b")], [(0, "a")]], 2) == ["a", "b"]


def test_what_was_asked_for_and_not_told() -> None:
    for told in ([[(0, "a")]], [[(0, "a"), (2, "c")]], [[(0, "a"), (1, "b"), (2, "c")]]):
        with pytest.raises(TransportError, match="where 2 were asked for"):
            numbered(told, 2)
    with pytest.raises(TransportError, match="UnicodeDecodeError"):
        share_texts(Scripted([{"hex": "ff"}]), "host")


@cache
def honest(name: str) -> bytes:
    return JOBS[name].seeds()[0]


def outcome(name: str, *changes: tuple[int, Any]) -> str:
    """What becomes of a job whose rank 1 is honest but for some of what it tells: an error's words, "" without one."""
    script = json.loads(honest(name))
    for at, said in changes:
        assert at < len(script)
        script[at] = said
    try:
        JOBS[name].read(json.dumps(script).encode())
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def place_of(name: str, words: str) -> int:
    """Where in the script of an honest rank 1 some words stand."""
    (at,) = [n for n, said in enumerate(json.loads(honest(name))) if words in json.dumps(said)]
    return at


def changed(name: str, at: int, *where: Any, to: Any) -> tuple[int, Any]:
    """An entry of the script with a value inside of it changed."""
    said = json.loads(honest(name))[at]
    inner = said["json"]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = to
    return at, said


@pytest.mark.parametrize("name", sorted(JOBS.keys() - {"rank-agree"}))
def test_an_honest_rank(name: str) -> None:
    assert outcome(name) == ""


def test_replicas_of_which_nothing_is_told() -> None:
    at = place_of("rank-load", '"F32", "')
    assert "rank 1 told nothing of number" in outcome("rank-load", (at, {"json": []}))


def test_a_file_of_which_no_table_is_told() -> None:
    at = place_of("rank-load", '"tables"')
    told = outcome("rank-load", changed("rank-load", at, "tables", to=[]))
    assert "ranks told of 1 files where 2 were listed" in told


@pytest.mark.parametrize("name", ["a/b/c", "../x", "/etc/passwd", "", "a/../b"])
def test_a_checkpoint_that_is_seen_where_none_can_be(name: str) -> None:
    at = place_of("rank-resume", 'rank_0/net-1_3.safetensors", 1')
    told = outcome("rank-resume", changed("rank-resume", at, 0, 1, 0, 0, to=name))
    assert told.startswith("TransportError: rank 1 told") and "no name of a file" in told


def test_a_transfer_of_what_nobody_has() -> None:
    at = place_of("rank-transfer", '"w", "w"')
    assert "rank 1 wants 'x' for 'w', which no rank holds" in outcome(
        "rank-transfer", changed("rank-transfer", at, 1, 0, 1, to="x")
    )


@pytest.mark.parametrize(
    "box", [[[2, 0], [(1 << 63) - 1, 4]], [[2, 0], [9, 4]], [[2], [5]], [[3, 0], [3, 4]], [[2, 0, 0], [5, 4, 1]]]
)
def test_a_transfer_of_a_box_that_is_none(box: Any) -> None:
    at = place_of("rank-transfer", '"w", "w"')
    with time_limit(), memory_limit(64 << 20):
        told = outcome("rank-transfer", changed("rank-transfer", at, 1, 0, 3, to=box))
    assert told.startswith("TransportError: rank 1 ") and ("no box of shape [8, 4]" in told or "not understood" in told)


def test_what_one_rank_tells_is_not_taken_for_what_another_has() -> None:
    """It says that it has the same, and tells something else."""
    at = place_of("rank-transfer", '"w", "w"')
    told = outcome("rank-transfer", (at - 1, None))
    assert told.startswith("TransportError: rank 1 told") and "the lowest rank of those that have the same" in told


@pytest.mark.parametrize(
    ("to", "says"),
    [([], "told nothing of number 0"), ([[0, ["F32", ["aa"]]]], "1 digests"), ([[0, ["X32", []]]], "KeyError: 'X32'")],
)
def test_digests_that_are_none(to: Any, says: str) -> None:
    at = place_of("rank-transfer", '"F32", ["')
    assert says in outcome("rank-transfer", (at, {"json": to}))


@pytest.mark.parametrize("nbytes", [1 << 40, (1 << 64) - 1])
def test_a_payload_longer_than_any(nbytes: int) -> None:
    """Nothing of that size is made to receive it."""
    note = {"hex": (bytes(16) + LENGTH.pack(nbytes)).hex()}
    with memory_limit(1 << 20), pytest.raises(TransportError, match=f"rank 1 told.*{nbytes} bytes, where"):
        read(JOBS["rank-gather"].make(), json.dumps([None, note]).encode())


def test_a_message_longer_than_any_before_there_is_a_hub() -> None:
    """Nobody waits for millions of cells."""
    calls = []

    def cells(mine: bytes) -> list[bytes]:
        calls.append(mine)
        return [mine, b"\xff" * 120]

    with pytest.raises(TransportError, match="rank 1 told.*4294967295 bytes, where 65536"):
        gather_messages(cells, b"7 host")
    assert len(calls) == 1
    assert site_told(b"7 host") == ("7", "host")


@pytest.mark.parametrize("message", [b"", b"host", b"\xff \xff"])
def test_a_rank_that_is_nowhere(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        site_told(message)
