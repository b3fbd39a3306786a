"""The control plane with thousands of ranks: what a status, an agreement, a survey cost the process that hears all."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import selectors
import socket
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Callable, NamedTuple

LISTED_TENSORS = 312
TOKEN = "0" * 32
HOST_RANKS = 8
Payload = Callable[[int, int], bytes]
"""(rank, size) -> what it shares."""


class Cost(NamedTuple):
    """Of one operation, for some of the clients.

    Attributes:
        began, ended: when.
        cpu: processor time that it took, in seconds.
        moved: bytes sent to the hub and received from it.
        gathered: whether payloads were gathered.
    """

    began: float
    ended: float
    cpu: float
    moved: int
    gathered: int


def control(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Clients of a hub, in few processes: wall and processor time, and the hub's bytes; what goes over the backend."""
    return [row for size in arguments.ranks for row in _of_size(size, arguments.rounds)]


def operations() -> dict[str, list[Payload]]:
    """What ranks share in each, in the words of the package itself.

    One rank in eight is the first of its host; hosts share their storage, and there is a file for every rank.
    """
    from ms_ckpt_ext.transport.agree import pack

    def nothing(rank: int, size: int) -> bytes:
        return b""

    def digest(rank: int, size: int) -> bytes:
        return b"0123456789abcdef0123456789abcdef"

    def one_speaks(rank: int, size: int) -> bytes:
        return b"x" * 1000 if rank == 1 else b""

    def host(rank: int, size: int) -> bytes:
        return b"node-%05d.cluster.example\0%032x" % (rank // HOST_RANKS, (rank // HOST_RANKS + 1) * 7919**8)

    def listing(rank: int, size: int) -> bytes:
        return _listing(size) if rank % HOST_RANKS == 0 else pack({"files": {}})

    def table(rank: int, size: int) -> bytes:
        return pack({"tables": [_table(rank)], "said": None})

    return {
        "status": [nothing],
        "agree": [digest],
        "share": [one_speaks],
        "survey": [host, listing, nothing, table],
    }


_listings: dict[int, bytes] = {}


def _listing(size: int) -> bytes:
    from ms_ckpt_ext.transport.agree import pack

    if size not in _listings:
        files = {
            str(r): (
                f"/shared/run/checkpoint/rank_{r}/net-7_500.safetensors",
                (6_442_450_944, 10**18 + r**3, 10**18 + r**3 + r, r * 7919),
            )
            for r in range(size)
        }
        _listings[size] = pack({"files": files, "sharded": True, "names": None, "folder": None, "problem": ""})
    return _listings[size]


def _table(rank: int) -> list[Any]:
    """A file's table of contents, as a survey tells it: tensors of a stage, their extents in the file."""
    tensors, at = [], 40_000 + rank
    for n in range(LISTED_TENSORS):
        shape = [8192 // 8, 28672 // (1 + n % 3)]
        nbytes = 2 * shape[0] * shape[1]
        name = f"adam_m.model.layers.{rank % 16 * 5 + n // 40}.feed_forward.w{n % 40}.weight"
        tensors.append([name, "BF16", shape, [[at, nbytes]]])
        at += nbytes
    path = f"/shared/run/checkpoint/rank_{rank}/net-7_500.safetensors"
    return [str(rank), [path, at, 10**18 + rank, tensors, {"format": "ms"}, "safetensors"]]


def _of_size(size: int, rounds: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("fork")
    ours, hubs = context.Pipe()
    hub = context.Process(target=_hub, args=(hubs, size), daemon=True)
    hub.start()
    port = ours.recv()
    parts = max(1, min(2, (os.cpu_count() or 1) - 1))
    lines, children = [], []
    for part in range(parts):
        line, theirs = context.Pipe()
        ranks = range(part * size // parts, (part + 1) * size // parts)
        children.append(context.Process(target=_clients, args=(theirs, port, ranks, size), daemon=True))
        children[-1].start()
        lines.append(line)
    for line in lines:
        assert line.recv() == "connected"
    rows = [_row(name, size, rounds, ours, lines, steps) for name, steps in operations().items()]
    for line in [*lines, ours]:
        line.send(None)
    for child in [*children, hub]:
        child.join(10)
    return rows


def _row(
    name: str, size: int, rounds: int, hub: Connection, lines: Sequence[Connection], steps: Sequence[Payload]
) -> dict[str, Any]:
    walls, cpus, hub_cpus, moved, gathered = [], [], [], 0, 0
    for _ in range(rounds):
        before = _asked(hub)
        for line in lines:
            line.send(name)
        costs = [line.recv() for line in lines]
        after = _asked(hub)
        walls.append(max(cost.ended for cost in costs) - min(cost.began for cost in costs))
        cpus.append(sum(cost.cpu for cost in costs))
        hub_cpus.append(after - before)
        moved, gathered = sum(cost.moved for cost in costs), costs[0].gathered
    backend = 2 * _gathered_bytes(steps, size) if gathered else 0
    return {
        "ranks": size,
        "what": name,
        "wall ms": round(statistics.median(walls) * 1e3, 1),
        "least": round(min(walls) * 1e3, 1),
        "hub's CPU ms": round(statistics.median(hub_cpus) * 1e3, 1),
        "all clients' CPU ms": round(statistics.median(cpus) * 1e3, 1),
        "hub's kB": round(moved / 1e3, 3),
        "over the backend, MB a process": round(backend / 1e6, 1),
    }


def _asked(hub: Connection) -> float:
    """Processor time of the hub so far, in seconds."""
    hub.send("?")
    answer: float = hub.recv()
    return answer


def _gathered_bytes(steps: Sequence[Payload], size: int) -> int:
    """What a process receives of the shares that are too much for a hub, as `gather` moves them."""
    from ms_ckpt_ext.transport.gather import front_width
    from ms_ckpt_ext.transport.hub.frames import NOTE_BYTES
    from ms_ckpt_ext.transport.hub.limits import DEFAULT

    total = 0
    for payload in steps:
        lengths, known = [], set()
        for rank in range(size):
            told = payload(rank, size)
            lengths.append(0 if told in known else len(told))
            known.add(told)
        if sum(lengths) > DEFAULT.answer_bytes(size):
            width = front_width(lengths)
            total += size * NOTE_BYTES + size * width + sum(max(0, length - width) for length in lengths)
    return total


def _hub(pipe: Connection, size: int) -> None:
    from ms_ckpt_ext.transport.hub.limits import DEFAULT
    from ms_ckpt_ext.transport.hub.server import Hub

    server = socket.create_server(("127.0.0.1", 0), backlog=4096)
    # Clients that prepare the tables of thousands of ranks answer nothing meanwhile.
    limits = DEFAULT._replace(stopped_seconds=3600.0, vanished_seconds=3600.0)
    hub = Hub(size, 600.0, server, TOKEN, limits=limits)
    pipe.send(server.getsockname()[1])
    while pipe.recv() is not None:
        pipe.send(time.process_time())
    hub.stop()
    hub.join(5)


def _clients(pipe: Connection, port: int, ranks: Sequence[int], size: int) -> None:
    from ms_ckpt_ext.transport.hub.descriptors import make_room
    from ms_ckpt_ext.transport.rendezvous.greeting import Guest
    from ms_ckpt_ext.transport.rendezvous.search import arrive

    make_room(len(ranks), 0)
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            connection = socket.create_connection(("127.0.0.1", port), 60)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            clients[rank] = arrive(connection, Guest(TOKEN, rank, size)).connection
            selector.register(connection, selectors.EVENT_READ, rank)
        pipe.send("connected")
        known = operations()
        for name in iter(pipe.recv, None):
            pipe.send(_operate(selector, clients, known[name], size))


def _operate(
    selector: selectors.BaseSelector, clients: dict[int, socket.socket], steps: Sequence[Payload], size: int
) -> Cost:
    """Every client through every share. What they tell is made ready before the clock starts."""
    from ms_ckpt_ext.transport.hub.frames import GIVE, NOTED, TELL, frame, note_of
    from ms_ckpt_ext.transport.hub.limits import DEFAULT

    most = DEFAULT.told_bytes(size)
    told, full = [], []
    for payload in steps:
        payloads = {rank: payload(rank, size) for rank in clients}
        told.append(
            {r: frame(TELL, r, p) if len(p) <= most else frame(NOTED, r, note_of(p)) for r, p in payloads.items()}
        )
        full.append({r: frame(GIVE, r, p) for r, p in payloads.items()} if size * len(steps) < 1 << 20 else {})
    cpu, began, moved, gathered = time.process_time(), time.monotonic(), 0, 0
    for first, asked in zip(told, full):
        for rank, connection in clients.items():
            connection.sendall(first[rank])
        answered, gathers = _answered(selector, clients, asked)
        moved += sum(map(len, first.values())) + answered
        gathered += gathers
    return Cost(began, time.monotonic(), time.process_time() - cpu, moved, gathered)


def _answered(
    selector: selectors.BaseSelector, clients: dict[int, socket.socket], asked: dict[int, bytes]
) -> tuple[int, int]:
    """Wait until every client has its answer: bytes that went to and fro meanwhile, and whether it is to gather."""
    from ms_ckpt_ext.transport.hub.frames import ASK, GATHER, take_frames

    waiting, partly, moved, gathered = len(clients), {}, 0, 0
    while waiting:
        for key, _ in selector.select(60):
            rank = key.data
            received = partly.pop(rank, None) or bytearray()
            came = clients[rank].recv(1 << 16)
            received += came
            moved += len(came)
            for said in take_frames(received):
                if said.kind == ASK:
                    clients[rank].sendall(asked[rank])
                    moved += len(asked[rank])
                else:
                    waiting -= 1
                    gathered = int(said.kind == GATHER)
            if received:
                partly[rank] = received
    return moved, gathered
