"""Encryption and decryption against `openssl speed` of the same cipher, in turns.

`openssl speed` encrypts 16 KiB in a core's first cache over and over on one thread: a bound that nothing which touches
memory reaches. Ours reads a file in the page cache and encrypts it as a job does, a chunk of 1 MiB or a block of 4 MiB
at a time, and throws the result away; or reads an encrypted file and decrypts it, headers, tags and all, into a buffer
as a job does: 1 MiB at a time, and of MindSpore's AES-GCM blocks whole blocks, streamed. On one thread, and on as many
as there are cores, as jobs do. Beside it what reading alone gives, the file's bytes copied out of the page cache and
no more: the cipher comes on top of that. The `cryptography` wheel brings an OpenSSL of its own, so a ratio above 1 is
possible. Wall times; the best round of each counts, for whatever else the machine does only slows it down.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches.measure import have_at_hand

PIECE = 1 << 20
CIPHERS = {
    "aes-128-gcm": (16, ("chunked", "AES-GCM")),
    "aes-256-gcm": (32, ("chunked", "AES-GCM")),
    "aes-128-cbc": (16, ("AES-CBC",)),
    "aes-256-cbc": (32, ("AES-CBC",)),
    "sm4-cbc": (16, ("SM4-CBC",)),
}
SLOW = "SM4-CBC"  # 0.13 GB/s: an eighth of the bytes is enough


def crypto(arguments: Namespace) -> list[dict[str, Any]]:
    """Encryption and decryption against `openssl speed`."""
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        for cipher, (length, containers) in CIPHERS.items():
            if arguments.only not in (None, cipher):
                continue
            for container in containers:
                size = round(arguments.size * (1 << 30)) // (8 if container == SLOW else 1)
                results += one_cipher(Path(work), cipher, length, container, size, arguments.rounds)
    return results


def _figure(value: float) -> float:
    """Two significant digits: a slow machine's figure is small, and not none."""
    return float(f"{value:.2g}")


def one_cipher(work: Path, cipher: str, length: int, container: str, size: int, rounds: int) -> list[dict[str, Any]]:
    plain, sealed, key = work / "plain", work / "sealed", os.urandom(length)
    with plain.open("wb") as file:
        noise = os.urandom(min(size, 8 << 20))
        file.write(b"\n")  # as a .ckpt begins, by which CBC tells a wrong key
        while file.tell() < size:
            file.write(noise[: size - file.tell()])
    with sealed.open("wb") as file:
        write_encrypted(plain, file, key, container)
    cores = len(os.sched_getaffinity(0))
    turns: dict[tuple[str, int], Callable[[], None]] = {
        ("encrypt", 1): lambda: encrypt(plain, key, container, 1),
        ("encrypt", cores): lambda: encrypt(plain, key, container, cores),
        ("decrypt", 1): lambda: decrypt(sealed, key, 1),
        ("decrypt", cores): lambda: decrypt(sealed, key, cores),
        ("read", 1): lambda: read(sealed, 1),
        ("read", cores): lambda: read(sealed, cores),
    }
    ours: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    theirs: dict[str, list[float]] = {"encrypt": [], "decrypt": []}
    for number in range(rounds + 1):
        for direction, speeds in theirs.items():
            speeds.append(openssl_speed(cipher, direction))
        for turn, call in turns.items():
            have_at_hand(4 * size)
            begin = time.perf_counter()
            call()
            if number:
                ours[turn].append(size / (time.perf_counter() - begin))
    plain.unlink()
    sealed.unlink()
    return [
        {"container": container, "cipher": cipher, "direction": direction, "threads": threads}
        | {"GB/s": _figure(max(speeds) / 1e9)}
        | {"read alone GB/s": _figure(max(ours["read", threads]) / 1e9)}
        | {"openssl speed GB/s": _figure(max(theirs[direction]) / 1e9)}
        | {"of openssl": _figure(max(speeds) / max(theirs[direction]))}
        for (direction, threads), speeds in ours.items()
        if direction in theirs
    ]


def encrypt(plain: Path, key: bytes, container: str, threads: int) -> None:
    import numpy as np

    from ms_ckpt_ext.engine.files.encrypted_sink import Seal
    from ms_ckpt_ext.formats.crypto import Key
    from ms_ckpt_ext.storage.reader import PlainReader

    with PlainReader(str(plain)) as reader:
        seal = Seal(Key(key), container)
        units, unit = seal.units("net.ckpt", reader.size), seal.unit_bytes("net.ckpt")

        def run(first: int) -> None:
            source, target = (memoryview(np.empty(nbytes, np.uint8)) for nbytes in (unit, units.stored(0)))
            for index in range(first, units.count, threads):
                low, high = units.span(index)
                reader.read_into(low, source[: high - low])
                units.seal(index, source[: high - low], target)

        on_threads(run, threads)


def on_threads(run: Callable[[int], None], threads: int) -> None:
    others = [threading.Thread(target=run, args=(number,)) for number in range(1, threads)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()


def write_encrypted(plain: Path, sink: Any, key: bytes, container: str) -> None:
    """As MindSpore cuts blocks."""
    from ms_ckpt_ext.formats.crypto import CHUNKED, BlockSealer, Sealer

    size = plain.stat().st_size
    units = Sealer(key, size) if container == CHUNKED else BlockSealer(key, container, size)
    target = memoryview(bytearray(units.stored(0)))
    sink.write(units.header)
    with plain.open("rb") as file:
        for index in range(units.count):
            low, high = units.span(index)
            length = units.seal(index, memoryview(file.read(high - low)), target)
            sink.write(target[:length])


def decrypt(sealed: Path, key: bytes, threads: int) -> None:
    from ms_ckpt_ext.formats.crypto import decrypting_reader
    from ms_ckpt_ext.formats.registry import CACHE_BYTES
    from ms_ckpt_ext.storage.reader import PlainReader

    with decrypting_reader(PlainReader(str(sealed)), key, cache_bytes=CACHE_BYTES) as reader:
        read_all(reader, threads)


def read(path: Path, threads: int) -> None:
    from ms_ckpt_ext.storage.reader import PlainReader

    with PlainReader(str(path)) as reader:
        read_all(reader, threads)


def read_all(reader: Any, threads: int) -> None:
    """Every byte, a piece at a time; of an encrypted file with large blocks a block, streamed."""
    import numpy as np

    large = getattr(reader, "large", False)
    share = max(PIECE, getattr(reader, "unit", 0))  # plain readers have none

    def run(first: int) -> None:
        buffer = memoryview(np.empty(PIECE, np.uint8))
        for at in range(first * share, reader.size, threads * share):
            length = min(share, reader.size - at)
            if large:
                reader.stream(at, length, lambda _at, _piece: None)
            else:
                reader.read_into(at, buffer[:length])

    on_threads(run, threads)


def openssl_speed(cipher: str, direction: str) -> float:
    """Bytes per second."""
    decrypting = ["-decrypt"] if direction == "decrypt" else []
    command = ["openssl", "speed", "-elapsed", "-seconds", "1", "-bytes", "16384", *decrypting, "-evp", cipher]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(told.split()[-1].rstrip("k")) * 1000
