"""Connections to a hub that are none of its ranks: they do no harm, and hear why they are turned away."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from ms_ckpt_ext.transport.hub.limits import ControlLimits
from ms_ckpt_ext.transport.rendezvous.greeting import Guest, Unwelcome
from ms_ckpt_ext.transport.rendezvous.search import arrive
from tests.support.hub_lines import HANG, TOKEN, Took, all_share, job, took

__all__ = ["took"]


def test_connections_that_say_nothing_do_no_harm_and_are_closed(took: Took) -> None:
    limits = ControlLimits(greeting_seconds=0.5, strangers=2000)
    with job(3, HANG, limits, absent=[2]) as found, contextlib.ExitStack() as opened:
        strangers = [
            opened.enter_context(socket.create_connection(("127.0.0.1", found.port), HANG)) for _ in range(1000)
        ]
        found.lines[2].attach(arrive(socket.create_connection(("127.0.0.1", found.port), HANG), Guest(TOKEN, 2, 3)))
        began = time.monotonic()
        assert all_share(found.lines, b"fine") == [[b"fine"] * 3] * 3
        took("seconds of a share meanwhile", time.monotonic() - began)
        for stranger in strangers:
            while stranger.recv(100):  # what the hub says by itself
                pass
        took("seconds until they are closed", time.monotonic() - began)
        assert all_share(found.lines) == [[b""] * 3] * 3


def test_more_strangers_than_there_is_room_for_put_out_each_other() -> None:
    with job(2, HANG, ControlLimits(greeting_seconds=HANG, strangers=10), absent=[1]) as found:
        with contextlib.ExitStack() as opened:
            strangers = [
                opened.enter_context(socket.create_connection(("127.0.0.1", found.port), HANG)) for _ in range(50)
            ]
            for stranger in strangers[:30]:
                while stranger.recv(100):
                    pass
            connection = socket.create_connection(("127.0.0.1", found.port), HANG)
            found.lines[1].attach(arrive(connection, Guest(TOKEN, 1, 2)))
            assert all_share(found.lines, b"fine") == [[b"fine"] * 2] * 2


@pytest.mark.parametrize("length", [1, 4, 59])
def test_half_a_greeting_is_not_waited_for(length: int, took: Took) -> None:
    with job(2, HANG, ControlLimits(greeting_seconds=0.3)) as found:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", found.port), HANG) as stranger:
            guest, received = Guest(TOKEN, 1, 2), bytearray()
            reply = b""
            while not reply:
                received += stranger.recv(100)
                reply = guest.hear(received)
            stranger.sendall(reply[:length])
            assert all_share(found.lines, b"fine") == [[b"fine"] * 2] * 2
            assert stranger.recv(100) == b""
        took("seconds until it is closed", time.monotonic() - began)


@pytest.mark.parametrize(
    ("token", "rank", "size", "why"),
    [
        ("of another job", 1, 2, "without a word"),
        (TOKEN, 1, 3, "of a job of another size"),
        (TOKEN, 2, 2, "its number is none of the job's"),
        (TOKEN, 1, 2, "another process with its number is there already"),
    ],
    ids=["wrong token", "other size", "no such rank", "there already"],
)
def test_who_does_not_belong_is_told_at_once(token: str, rank: int, size: int, why: str) -> None:
    with job(2, HANG, ControlLimits()) as found:
        with pytest.raises(Unwelcome, match=why):
            found.connect(rank, token, size)
        assert all_share(found.lines, b"fine") == [[b"fine"] * 2] * 2
