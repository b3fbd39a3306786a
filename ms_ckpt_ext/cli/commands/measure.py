"""`ms-ckpt measure SRC DST`: how fast this machine is, as a hardware profile for plans and loads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from ms_ckpt_ext.cli import words
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", metavar="SRC", help="directory of large files on the storage to measure"))
    takes_path(parser.add_argument("dst", metavar="DST", help="profile to write, a .json file"))
    parser.add_argument(
        "--seconds", type=float, default=6.0, metavar="N", help="how long all steps take together (default 6)"
    )
    parser.add_argument(
        "--device", choices=("Ascend", "CPU"), default=None, help="device target of the job (default: MindSpore's)"
    )


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.measure import measure

    found = measure(arguments.src, arguments.dst, seconds=arguments.seconds, device_target=arguments.device)
    return Answer(found, _lines(found, arguments.dst))


def _lines(found: dict[str, Any], path: str) -> Iterator[str]:
    yield words.style(found["title"], "bold")
    rows = [(name, _told(figure), figure["from"]) for name, figure in found.items() if isinstance(figure, dict)]
    yield from words.table(("figure", "value", "from"), rows, "lrl")
    yield f"profile: {path}"


def _told(figure: dict[str, Any]) -> str:
    if "seconds" in figure:
        return f"{figure['seconds'] * 1e6:.0f} us"
    if "bytes" in figure:
        return words.size(figure["bytes"])
    return f"{words.size(figure['bytes_per_second'])}/s"


COMMAND = Command(
    name="measure",
    summary="how fast this machine reads, uploads and exchanges, as a profile",
    description=(
        "Measure for some seconds how fast the ranks of a job read, upload and exchange, and write a hardware profile\n"
        "for `ms-ckpt plan --hardware`, the argument `hardware` of a load, or MS_CKPT_EXT_HARDWARE.\n\n"
        "Run it under msrun with as many ranks as the job; alone it measures what one process reads:\n"
        "    msrun --worker_num=8 --local_worker_num=8 --join=True python -m ms_ckpt_ext measure ckpt/ a2.json"
    ),
    examples=(
        ("ms-ckpt measure ckpt/ disk.json", "one process: what it reads"),
        ("ms-ckpt plan ckpt/ serve.ckpt --src-strategy train.ckpt --hardware a2.json", "plan with what was measured"),
    ),
    configure=_configure,
    run=_run,
)
