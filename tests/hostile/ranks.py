"""What ranks tell each other, when one is malicious: jobs of rank 0 in a world of two, whose rank 1 is a script.

A script is what rank 1 tells, one entry for each time that all ranks share something: `{"json": value}` for what is
packed, `{"text": words}`, `{"hex": bytes}`, or null for whatever rank 0 tells itself. Those that mutation begins with
are recorded from honest ranks. In bulk exchanges rank 1 sends zeros.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import cache
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.engine.load.measure import measure_machine
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.resume.newest import ResumeRequest, choose_checkpoint
from ms_ckpt_ext.engine.transfer.compared import TakenSlice, compare_with_source
from ms_ckpt_ext.transport.agree import agree, common_groups, decode_all, pack, share_status, understanding
from ms_ckpt_ext.transport.base import Bytes, Done, Handle, Ranks, TransportTraits, inflated
from ms_ckpt_ext.transport.gather import gather
from ms_ckpt_ext.transport.hub.frames import note_of
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from ms_ckpt_ext.transport.rendezvous.addresses import Address, Invitation
from ms_ckpt_ext.transport.rendezvous.cells import gather_messages
from ms_ckpt_ext.transport.rendezvous.meeting import site_told
from tests.hostile.seeds import folder
from tests.support import mindformers_folder, transfers
from tests.support.checkpoints import Stored, cut, strategy_of
from tests.support.loads import Load
from tests.support.saved import save

Job = Callable[[Any], Any]
"""What rank 0 does with its transport."""
_OPTIONS = LoadOptions(bucket_bytes=1 << 20)


class Scripted(LocalTransport):
    """Rank 0 of two, whose rank 1 tells what a script says."""

    def __init__(self, script: Sequence[Any], traits: Optional[TransportTraits] = None) -> None:
        super().__init__(LocalWorld(2), 0)
        self._script = iter(script)
        self.traits = traits or LocalTransport.traits  # type: ignore[misc]

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """As rank 1 has it."""
        said = next(self._script, None)
        return lambda: [payload, payload if said is None else _as_bytes(said)]

    def start_all_gather(self, send: Bytes, nbytes: int, recv: Bytes, group: Ranks = ()) -> Handle:
        """What rank 1 gives comes out of the script as well, zeros when it is silent."""
        assert send.nbytes >= nbytes and recv.nbytes >= 2 * nbytes
        said = _as_bytes(next(self._script, None))[:nbytes].ljust(nbytes, b"\0")
        recv[: 2 * nbytes] = np.frombuffer(send[:nbytes].tobytes() + said, np.uint8)
        return Done()

    def start_broadcast(self, buffer: Bytes, nbytes: int, root: int, group: Ranks = ()) -> Handle:
        """Zeros."""
        assert buffer.nbytes >= nbytes
        buffer[: nbytes if root else 0] = 0
        return Done()

    def start_all_to_all(
        self, send: Bytes, send_counts: Sequence[int], recv: Bytes, recv_counts: Sequence[int]
    ) -> Handle:
        """Zeros."""
        assert send.nbytes >= sum(send_counts) and recv.nbytes >= sum(recv_counts)
        recv[: sum(recv_counts)] = 0
        return Done()


def _as_bytes(said: Any) -> bytes:
    kind, value = next(iter(said.items())) if isinstance(said, dict) and said else ("hex", "")
    if kind == "json":
        return pack(value)
    text = value if isinstance(value, str) else repr(value)
    if kind == "text":
        return text.encode("utf-8", "surrogatepass")
    try:
        return bytes.fromhex(text)
    except ValueError:
        return text.encode("utf-8", "surrogatepass")


class _Recorded(LocalTransport):
    """An honest rank, which notes what rank 1 tells."""

    script: list[Any]

    def start_share(self, payload: bytes) -> Callable[[], list[bytes]]:
        """As it is."""
        answers = super().start_share(payload)

        def wait() -> list[bytes]:
            found = answers()
            told = _as_words(found[1])
            self.script.append(None if found[1] == payload and "json" not in told else told)
            return found

        return wait


def _as_words(told: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return {"json": json.loads(inflated(told, 1 << 20))}
    with contextlib.suppress(ValueError):
        return {"text": told.decode()}
    return {"hex": told.hex()}


def honest(job: Job) -> bytes:
    """The script of a rank 1 that does the same job."""
    script: list[Any] = []
    world = LocalWorld(2, timeout=20.0)

    def rank(transport: LocalTransport) -> None:
        if transport.rank == 0:
            transport = _Recorded(world, 0)
            transport.script = script
        job(transport)

    world.run(rank)
    return json.dumps(script).encode()


def read(job: Job, data: bytes, traits: Optional[TransportTraits] = None) -> None:
    """Do a job with a rank 1 that tells what `data` says: a script, or else the same bytes every time."""
    try:
        script = json.loads(data)
    except (ValueError, RecursionError):
        script = [{"hex": data.hex()}] * 50
    job(Scripted(script if isinstance(script, list) else [script] * 50, traits))


# Jobs


def _load() -> Job:
    root = folder() / "loaded"
    full = {name: np.arange(64, dtype=np.float32).reshape(8, 8) + n for n, name in enumerate(("w", "v"))}
    layouts = [dict.fromkeys(full, Layout((2,), axes)) for axes in (((0,), ()), ((), (0,)))]
    trained, target = (strategy_of(held, root.parent / f"loaded_{n}.ckpt") for n, held in enumerate(layouts))
    cut(trained, full, root)
    return Load(root, trained, target).rank


def _resume() -> Job:
    root = folder() / "resumed/saves"
    root.mkdir(parents=True)
    save(root, 3)
    return lambda transport: choose_checkpoint(
        transport, ResumeRequest(str(root), f"host {transport.rank}", digests=True)
    )


def _iteration() -> Job:
    root = folder() / "iterations"
    mindformers_folder.saved(root)
    return lambda transport: choose_checkpoint(transport, ResumeRequest(str(root), f"host {transport.rank}"))


def _transfer() -> Job:
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)
    stored = Stored("F32", (4, 4), whole[:4].tobytes())
    source = {0: {"w": (stored, Layout((2,), ((0,), ())))}, 1: {"w": (stored, Box((8, 4), (4, 0), (4, 4)))}}
    target = {1: {"w": (Stored("F32", (3, 4), bytes(48)), Box((8, 4), (2, 0), (3, 4)))}, 0: source[0]}

    def job(transport: Any) -> None:
        moved = transfers.one_rank(
            transport,
            source,
            target,
            (),
            1,
            lambda rank: f"host {rank}",
            None,
            _OPTIONS,
        )
        compare_with_source(
            transport,
            moved.prepared.demands,
            lambda number: TakenSlice("F32", np.frombuffer(moved.contents["w"], np.uint8)),
            lambda name, dtype: np.frombuffer(stored.data, np.uint8),
        )

    return job


def _measure() -> Job:
    place = folder() / "measured"
    place.mkdir()
    (place / "a").write_bytes(bytes(1 << 22))
    return lambda transport: measure_machine(transport, str(place), f"host {transport.rank}", 0.0)


def _agree() -> Job:
    def job(transport: Any) -> None:
        agree(transport, {"a": "1"})
        common_groups(transport)
        share_status(transport)

    return job


def _gather() -> Job:
    """Of payloads that go over the backend."""
    return lambda transport: gather(transport, b"what rank 0 tells", lambda buffer: buffer)


def _meet() -> Job:
    """What ranks tell each other before there is a hub, in cells that a collective of the backend gathers."""

    def job(transport: Any) -> None:
        def cells(mine: bytes) -> list[bytes]:
            return [mine, *transport.share(mine)[1:]]

        decode_all(gather_messages(cells, b"4026531840 node1"), site_told)
        with understanding(0):
            Invitation.decode(gather_messages(cells, Invitation((Address("10.0.0.1", 8118),), "0f" * 16).encode())[1])

    return job


class RankJob(NamedTuple):
    """A job of ranks.

    Attributes:
        make: makes it when it is asked for, as it may want files.
        traits: what its transport can do.
        scripts: what rank 1 may tell; that of an honest one where there are none.
    """

    make: Callable[[], Job]
    traits: TransportTraits = LocalTransport.traits
    scripts: tuple[Any, ...] = ()

    def read(self, data: bytes) -> None:
        """Do it with what a rank 1 tells."""
        read(_made(self.make), data, self.traits)

    def seeds(self) -> list[bytes]:
        """What rank 1 may tell."""
        return [json.dumps(script).encode() for script in self.scripts] or [honest(_made(self.make))]


def _hex(told: bytes) -> Any:
    return {"hex": told.hex()}


_made = cache(lambda make: make())
_KNOWN = TransportTraits(known_groups=((0, 1), (0,)))
_AGREED = [{"text": "other"}, {"text": json.dumps({"a": "b", "c": "d"})}, {"json": [["d"], [[0, 1], [1]]]}, _hex(b"!")]
_LONG = b"what rank 1 tells, and more"
_GATHERED = [None, _hex(note_of(_LONG)), None, _hex(_LONG), None]
_MET = [_hex(len(told).to_bytes(4, "little") + told) for told in (b"402 node2", b"0f 10.0.0.1:8118")]

JOBS = {
    "rank-agree": RankJob(_agree, _KNOWN, (_AGREED, [None, *_AGREED[2:]])),
    "rank-load": RankJob(_load),
    "rank-resume": RankJob(_resume),
    "rank-iteration": RankJob(_iteration),
    "rank-transfer": RankJob(_transfer),
    "rank-measure": RankJob(_measure),
    "rank-gather": RankJob(_gather, scripts=(_GATHERED,)),
    "rank-meeting": RankJob(_meet, scripts=(_MET,)),
}
"""By the name of their row in `parsers`."""
