"""The parsers of outside data, a row for each: what reads, what it may raise, and the files that mutation begins with.

A parser that wants a path gets a file of its own, in a folder that goes when the process ends.
"""

from __future__ import annotations

import contextlib
import io
import socket
from functools import cache
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.api.diff import diff_strategy
from ms_ckpt_ext.cli import main, settings
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.engine.huggingface.adapter import read_adapter
from ms_ckpt_ext.engine.huggingface.companions import adapted
from ms_ckpt_ext.engine.huggingface.families import RULES_FOLDER, family_for, read_family
from ms_ckpt_ext.engine.huggingface.sizes import Config, read_config
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, load_manifest, opened
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.engine.resume import records
from ms_ckpt_ext.formats import ckpt, safetensors
from ms_ckpt_ext.formats.crypto import Key, decrypting_reader, load_key
from ms_ckpt_ext.formats.discovery import mindformers, torch_slices
from ms_ckpt_ext.formats.discovery.whole_models import unified_files
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.formats.strategies.groups import restore_ranks
from ms_ckpt_ext.formats.strategies.merging import merge_strategy_files
from ms_ckpt_ext.formats.table import kind_of, pointer_fault
from ms_ckpt_ext.formats.wire import encode_bytes, encode_number
from ms_ckpt_ext.storage import claims, publishing
from ms_ckpt_ext.storage.locks import HiddenFolder
from ms_ckpt_ext.transport.control import pack_cell, unpack_cell
from ms_ckpt_ext.transport.hub.frames import Malformed, decode_answer, encode_answer, frame, take_frames
from ms_ckpt_ext.transport.hub.line import Line
from ms_ckpt_ext.transport.hub.reduction import Reduction
from ms_ckpt_ext.transport.rendezvous.cells import CELL_BYTES, CELL_ROOM
from ms_ckpt_ext.transport.rendezvous.greeting import Door, Guest, Unwelcome
from ms_ckpt_ext.transport.rendezvous.search import Arrival
from tests.hostile import seeds
from tests.hostile.mutations import Mutator, header_values, json_values, wire_fields
from tests.hostile.ranks import JOBS
from tests.hostile.seeds import KEY, folder, texts
from tests.support.memory import MemoryReader


class Parser(NamedTuple):
    """A parser of outside data.

    Attributes:
        read: what is tried.
        seeds: makes the files that mutation begins with.
        mutator: what knows their form; None where they have none but bytes.
        errors: what it may raise beside the package's errors.
    """

    read: Callable[[bytes], Any]
    seeds: Callable[[], list[bytes]]
    mutator: Optional[Mutator] = None
    errors: tuple[type[Exception], ...] = ()


def as_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of a path as one of bytes."""

    def from_bytes(data: bytes) -> Any:
        path = folder() / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return read(path)

    return from_bytes


# Tensors


def tensors(index: Any, source: Any) -> None:
    """Read everything that a table of contents lists, and sum it, as jobs do."""
    from ms_ckpt_ext.formats.checksum import verify_stored

    module = ckpt if "crc_offset" in index.metadata else safetensors
    for entry in index.tensors.values():
        for extent in entry.extents:
            source.read_into(extent.offset, memoryview(bytearray(extent.length)))
    with contextlib.suppress(safetensors.FormatError):
        verify_stored(source, module.stored_checksum(index))
    torch_slices.refuse_slices([index])


def read_safetensors(data: bytes) -> None:
    source = MemoryReader(data, "model.safetensors")
    tensors(safetensors.read_index(source), source)


def read_ckpt(data: bytes) -> None:
    source = MemoryReader(data)
    tensors(ckpt.read_index(source), source)


def read_encrypted(data: bytes) -> None:
    with decrypting_reader(MemoryReader(data), KEY) as source:
        tensors(ckpt.read_index(source), source)


# Strategies


def use(strategy: Strategy) -> None:
    """What jobs ask of a strategy."""
    strategy.check_complete()
    for stages in strategy.layouts.values():
        for layout in stages.values():
            assert len(layout.cells) == layout.devices
            assert layout.parts is not None and layout.holders


def of_strategy(path: Path) -> None:
    use(load_strategy(path))


def merge(path: Path) -> None:
    try:
        merge_strategy_files(path.parent, path.parent / "out/merged")
    finally:
        path.unlink()


# Folders


def of_map(path: Path) -> None:
    for name in ("part0.safetensors", "part1.safetensors"):
        if not (path.parent / name).exists():
            (path.parent / name).write_bytes(seeds.a_safetensors())
    unified_files(str(path.parent))


def of_common(path: Path) -> None:
    mindformers.read_common(str(path.parent))
    mindformers.complaint(str(path.parent))


def of_kind(path: Path) -> None:
    kind_of(str(path))
    pointer_fault(str(path), path.read_bytes()[:8])


# Notes


def of_manifest(path: Path) -> None:
    found = load_manifest(str(path.parent))
    assert found is not None
    readable, _ = opened(found, Key(KEY))
    check_digests(str(path.parent), readable)


def of_record(path: Path) -> None:
    for record in records.read_records(str(path.parents[2]), path.parent.name):
        assert 0 <= record.rank < record.world


def of_published(path: Path) -> None:
    found = publishing.read_published(path.parent)
    for name, entry in found.files.items():
        found.is_as_published(name, entry.state)


def of_claims(path: Path) -> None:
    claims._claims(HiddenFolder(path.parents[1]))


# Hugging Face


def documents(of: Path) -> list[bytes]:
    """What comes with the package."""
    return [path.read_bytes() for path in sorted(of.glob("*.json"))]


def of_rules(path: Path) -> None:
    family = read_family(str(path), Config(seeds.CONFIG, "config.json"), {})
    family.missing(())
    with contextlib.suppress(safetensors.UsageError):
        assert family.back is not None


def of_config(path: Path) -> None:
    config = read_config(str(path), needed=True)
    adapted({"config.json": path.read_bytes()}, ["w"], "F32")
    with contextlib.suppress(safetensors.UsageError):
        family_for(config)
    for name in ("qwen3", "deepseek-v3"):
        with contextlib.suppress(safetensors.UsageError):
            read_family(name, config).missing(())


def of_adapter(path: Path) -> None:
    weights = path.with_name("adapter_model.safetensors")
    if not weights.exists():
        weights.write_bytes(seeds.an_adapter())
    adapter = read_adapter(str(path.parent))
    adapter.rules()
    adapter.require(["a.q_proj.weight"])


# Options and settings


def of_ini(path: Path) -> None:
    settings.complete(settings.read_settings(str(path)).values, {})


def of_words(data: bytes) -> None:
    """A command line, a word a line, parsed and not run."""
    words = data.decode("utf-8", "surrogateescape").split("\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            _command_line().parse_args(words)


@cache
def _command_line() -> Any:
    return main.parser()


def of_shapes(path: Path) -> None:
    strategy = Strategy.from_items([LayoutItem("a.w", 0, Layout((2, 4), ((0,), ())))], "a seed")
    diff_strategy(strategy, strategy, shapes=str(path))


def of_key(path: Path) -> None:
    assert load_key(file=str(path)) is not None


# What ranks tell each other


def of_hub(data: bytes) -> None:
    """What a hub makes of the bytes of a rank that was let in."""
    said = take_frames(bytearray(data), 1 << 12)
    share = Reduction(3, 1 << 12)
    for number, message in enumerate(said):
        share.take(number % 3, message)


def of_answer(data: bytes) -> None:
    """What a rank makes of a hub's answer."""
    for said in take_frames(bytearray(data)):
        decode_answer(said.body)


def of_greeting(data: bytes) -> None:
    for each in (Door("token", 0, 4).ask, Guest("token", 0, 4).hear):
        with contextlib.suppress(Unwelcome):
            each(bytearray(data))  # type: ignore[operator]


def of_line(data: bytes) -> None:
    """What a rank makes of all that a hub may send, until it leaves."""
    near, far = socket.socketpair()
    line = Line(0, 2, 5.0)
    with far:
        line.attach(Arrival(near, 1, data))
        far.shutdown(socket.SHUT_WR)
        try:
            line.share(b"mine")
        finally:
            line.close()


def of_cell(data: bytes) -> None:
    assert len(unpack_cell(np.frombuffer(data.ljust(CELL_BYTES, b"\0")[:CELL_BYTES], np.uint8))) <= CELL_ROOM


PARSERS: dict[str, Parser] = {
    "safetensors": Parser(read_safetensors, lambda: [seeds.a_safetensors()], header_values),
    "ckpt": Parser(read_ckpt, lambda: [seeds.a_ckpt()], wire_fields),
    "encrypted": Parser(read_encrypted, seeds.encrypted),
    "strategy": Parser(as_file("s.ckpt", of_strategy), lambda: seeds.strategies("ckpt"), wire_fields),
    "strategy-json": Parser(as_file("s.json", of_strategy), lambda: seeds.strategies("json"), json_values),
    "merged-strategy": Parser(as_file("stages/1.json", merge), lambda: seeds.strategies("json")[:1], json_values),
    "groups": Parser(
        as_file("groups.pb", lambda path: restore_ranks(str(path))),
        lambda: [encode_bytes(2, encode_number(1, 0) + encode_number(1, 4))],
        wire_fields,
    ),
    "metadata": Parser(
        as_file("metadata.json", lambda path: mindformers.read_cuts(str(path))), seeds.metadata, json_values
    ),
    "common": Parser(as_file("mf/common.json", of_common), texts(seeds.COMMON), json_values),
    "tracker": Parser(
        as_file("mf/latest_checkpointed_iteration.txt", lambda path: mindformers.find_folder(str(path.parent))),
        lambda: [b"10\n"],
    ),
    "map": Parser(as_file("merged/param_name_map.json", of_map), texts(seeds.MAP), json_values),
    "index": Parser(as_file("hf/model.safetensors.index.json", of_map), texts(seeds.MAP), json_values),
    "manifest": Parser(as_file(f"notes/{MANIFEST_NAME}", of_manifest), seeds.manifests, json_values),
    "records": Parser(as_file("saves/ms_ckpt_ext/net-1_3/rank_1.json", of_record), texts(seeds.RECORDS), json_values),
    "published": Parser(as_file(f"out/{publishing.RECORD}", of_published), texts(seeds.PUBLISHED), json_values),
    "journal": Parser(
        as_file("out/.ms_ckpt_ext/j.journal", publishing.read_journal), texts(seeds.JOURNAL), json_values
    ),
    "claims": Parser(as_file("out/.ms_ckpt_ext/claims", of_claims), texts(seeds.CLAIM), json_values),
    "rules": Parser(as_file("rules.json", of_rules), lambda: documents(RULES_FOLDER), json_values),
    "config": Parser(as_file("hf/config.json", of_config), texts(seeds.CONFIG), json_values),
    "adapter": Parser(as_file("lora/adapter_config.json", of_adapter), texts(seeds.ADAPTER), json_values),
    "profile": Parser(
        as_file("machine.json", lambda path: profiles.profile(str(path))),
        lambda: documents(profiles.HARDWARE_FOLDER),
        json_values,
    ),
    "shapes": Parser(as_file("shapes.json", of_shapes), texts(seeds.SHAPES), json_values),
    "ini": Parser(as_file("job.ini", of_ini), lambda: [seeds.INI]),
    "words": Parser(of_words, lambda: [*seeds.WORDS]),
    "key": Parser(
        as_file("key", of_key), lambda: [KEY, b"hex:" + KEY.hex().encode(), b"base64:MDEyMzQ1Njc4OUFCQ0RFRg=="]
    ),
    "kind": Parser(as_file("a.ckpt", of_kind), lambda: [*seeds.HEADS]),
    "hub": Parser(
        of_hub,
        lambda: [frame(b"tell", 0, b"x") + frame(b"tell", 1, b"y") + frame(b"note", 2, bytes(24))],
        errors=(Malformed,),
    ),
    "answer": Parser(
        of_answer, lambda: [frame(b"all.", 0, encode_answer([b"", b"no"], [0, 1, 0]))], errors=(Malformed,)
    ),
    "greeting": Parser(of_greeting, lambda: [Door("token", 0, 4).hail]),
    "line": Parser(
        of_line,
        lambda: [frame(b"all.", 0, encode_answer([b"", b"no"], [0, 1])) + frame(b"ping") + frame(b"gone", 1, b"x")],
    ),
    "cell": Parser(of_cell, lambda: [pack_cell(b"what").tobytes()]),
    **{name: Parser(job.read, job.seeds, json_values) for name, job in JOBS.items()},
}
