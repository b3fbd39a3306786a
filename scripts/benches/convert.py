"""Conversion of one large `.ckpt` to safetensors and back, against `cp` of the result; memory of it and of one slice.

The checkpoint has 24 layers of F32 and BF16 matrices and a checksum. Memory is the resident set of the whole process
tree, the interpreter and imports included, page cache not.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from benches.measure import against_cp, measure, python, row, take_turns

LAYERS = 24
WIDTH = 1024


def convert(arguments: Namespace) -> list[dict[str, Any]]:
    """Conversion of one file both ways, and reading one rank's slices of it."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        root = Path(work)
        source = make_ckpt(root / "source" / "net.ckpt", round(arguments.size * (1 << 30)))
        results = one_way(root, source, "ckpt_to_safetensors", "safetensors", arguments)
        made = root / "made" / "net.safetensors"
        results += one_way(root, made, "safetensors_to_ckpt", "ckpt", arguments)
        results += sealed(root, source, arguments)
        return results + slices(source, arguments)


def make_ckpt(path: Path, size: int) -> Path:
    """Weights of about `size` bytes: per layer a BF16 and an F32 matrix of as many rows."""
    import numpy as np

    from ms_ckpt_ext.core.geometry.array import DTYPES
    from ms_ckpt_ext.formats import ckpt, ckpt_writer
    from ms_ckpt_ext.formats.index import TensorSpec

    rows = max(8, size // (LAYERS * WIDTH * 6) // 8 * 8)
    specs = [TensorSpec("global_step", DTYPES["I32"], (1,)), TensorSpec("learning_rate", DTYPES["F32"], ())]
    for layer in range(LAYERS):
        specs.append(TensorSpec(f"layers.{layer}.attention.weight", DTYPES["F32"], (rows, WIDTH)))
        specs.append(TensorSpec(f"layers.{layer}.mlp.weight", DTYPES["BF16"], (rows, WIDTH)))
    laid = ckpt_writer.layout(specs, crc=True)
    noise = np.random.default_rng(0).bytes(8 << 20)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        for entry in laid.tensors.values():
            for offset, length in entry.extents:
                file.seek(offset)
                while file.tell() < offset + length:
                    file.write(noise[: offset + length - file.tell()])
        for offset, literal in laid.literals:
            file.seek(offset)
            file.write(literal)
    crc, stop = 0, laid.size - ckpt.CRC_TAIL
    with path.open("r+b") as file:
        for at in range(0, stop, 8 << 20):
            crc = zlib.crc32(file.read(min(8 << 20, stop - at)), crc)
        file.write(ckpt_writer.crc_tail(crc))
    return path


def one_way(root: Path, source: Path, function: str, suffix: str, arguments: Namespace) -> list[dict[str, Any]]:
    out, copy, made = root / "out", root / "copy", root / "made" / f"net.{suffix}"

    def ours(sync: bool) -> str:
        where = f"{str(source)!r}, {str(out)!r}"
        return f"from ms_ckpt_ext import convert as f; f({where}, to={suffix!r}, sync={sync})"

    measure(python(ours(False)))
    made.parent.mkdir(exist_ok=True)
    (out / made.name).rename(made)
    commands = against_cp(ours, made, copy)
    if arguments.stock:
        commands["stock MindSpore"] = python(f"import mindspore; mindspore.{function}({str(source)!r}, {str(out)!r})")

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        copy.unlink(missing_ok=True)

    turns = take_turns(commands, clean, arguments.rounds, once=["stock MindSpore"], memory=2 * made.stat().st_size)
    return [row(function, made.stat().st_size, name, turns) for name in commands]


def sealed(root: Path, source: Path, arguments: Namespace) -> list[dict[str, Any]]:
    """Encrypting the file and decrypting it again, AES-256-GCM in MindSpore's blocks, all cores."""
    out, copy, made = root / "out", root / "copy", root / "sealed"
    key = "bytes(range(32))"
    there = python(f"from ms_ckpt_ext import encrypt as f; f({str(source)!r}, {str(out)!r}, enc_key={key})")
    measure(there)
    out.rename(made)
    back = python(f"from ms_ckpt_ext import decrypt as f; f({str(made)!r}, {str(out)!r}, dec_key={key})")

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)
        copy.unlink(missing_ok=True)

    turns = take_turns(
        {"encrypt": there, "decrypt": back, "cp": ["cp", str(source), str(copy)]}, clean, arguments.rounds
    )
    return [row("AES-256-GCM", source.stat().st_size, name, turns) for name in turns]


def slices(source: Path, arguments: Namespace) -> list[dict[str, Any]]:
    """One of eight ranks' rows of every matrix; `cp` of as many bytes stands for the disk."""
    part = source.with_name("part")
    ours = (
        f"from ms_ckpt_ext import load; held = load({str(source)!r}); "
        "total = sum(t[: t.shape[0] // 8].nbytes for t in held.values() if len(t.shape) == 2)"
    )
    stock = (
        f"import mindspore; held = mindspore.load_checkpoint({str(source)!r}); "
        "total = sum(t[: t.shape[0] // 8].asnumpy().nbytes for t in held.values() if len(t.shape) == 2)"
    )
    size = source.stat().st_size // 8
    with source.open("rb") as whole, part.open("wb") as file:
        while file.tell() < size:
            file.write(whole.read(min(1 << 20, size - file.tell())))
    copy = source.with_name("copy")
    commands = {"ms_ckpt_ext": python(ours), "cp": ["cp", str(part), str(copy)]}
    if arguments.stock:
        commands["stock MindSpore"] = python(stock)
    turns = take_turns(commands, lambda: copy.unlink(missing_ok=True), arguments.rounds)
    return [row("one of eight ranks' slices", size, name, turns) for name in commands]
