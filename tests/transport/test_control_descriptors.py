"""A hub in a process that may open few files."""

from __future__ import annotations

import subprocess
import sys

from tests.support.hub_lines import HANG, TOKEN


class TestDescriptors:
    """In a process of its own, for its limits cannot be raised again."""

    def run(self, code: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-c", FEW_FILES + code], capture_output=True, text=True, timeout=HANG, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def test_the_limit_is_raised_where_that_is_allowed(self) -> None:
        assert self.run("limit(64, 4096); meet(100)") == "100 met\n"

    def test_where_it_is_not_the_job_ends_before_it_begins(self) -> None:
        said = self.run("limit(64, 64); meet(100)")
        assert "100 ranks connect to this process, which may not open more than 64 files" in said
        assert "raise the hard limit where the job is started (ulimit -Hn)" in said

    def test_a_hub_that_can_open_no_more_goes_on_and_lets_in_who_waits_once_it_can(self) -> None:
        assert self.run("limit(200, 200); meet(20, full=True)") == "19 are there\n20 met\n"


FEW_FILES = f"""
import os, resource, socket, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ms_ckpt_ext.errors import TransportError
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.server import Hub
from ms_ckpt_ext.transport.rendezvous.greeting import Guest
from ms_ckpt_ext.transport.rendezvous.search import arrive

def limit(soft, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

def fill():
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return taken

def meet(size, full=False):
    server = socket.create_server(("127.0.0.1", 0), backlog=256)
    port = server.getsockname()[1]
    try:
        hub = Hub(size, 30.0, server, {TOKEN!r})
    except TransportError as error:
        return print(error)
    def come(rank):
        connection = socket.create_connection(("127.0.0.1", port), 30)
        line = Line(rank, size, 30.0)
        line.attach(arrive(connection, Guest({TOKEN!r}, rank, size)))
        return line
    lines = [come(rank) for rank in range(size - full)]
    if full:
        last = socket.socket()
        taken = fill()
        last.connect(("127.0.0.1", port))  # the kernel takes it, the hub cannot
        time.sleep(0.5)
        print(size - 1, "are there", flush=True)
        for each in taken:
            os.close(each)
        line = Line(size - 1, size, 30.0)
        line.attach(arrive(last, Guest({TOKEN!r}, size - 1, size)))
        lines.append(line)
    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(lambda line: line.share(b""), lines))
    assert answers == [[b""] * size] * size
    print(size, "met")
"""
