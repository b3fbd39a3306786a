"""What jobs that write checkpoints have in common: options, the call, and the text of a report."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable

from ms_ckpt_ext.cli import options, words
from ms_ckpt_ext.cli.command import Answer, takes_path
from ms_ckpt_ext.formats.table import FORMATS, SAFETENSORS

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.files.dry_run import Preview
    from ms_ckpt_ext.engine.files.job import Report


def add_files(parser: argparse.ArgumentParser) -> None:
    """A file, or a tree of them, and where the results go."""
    takes_path(parser.add_argument("src", help="a file, or a directory with files however deep"))
    takes_path(parser.add_argument("dst", help="directory for the results; for a file also its new path"))


def add_file_name_regex(parser: argparse.ArgumentParser, example: str = "") -> None:
    """Which files of a tree."""
    parser.add_argument("--file-name-regex", metavar="REGEX", help=f"only files whose names match REGEX{example}")


def add_which(parser: argparse.ArgumentParser) -> None:
    """The format of the result, and which files of rank folders are the source."""
    parser.add_argument("--to", choices=FORMATS, default=SAFETENSORS.name, help="format (default safetensors)")
    options.add_suffix(parser)
    options.add_format(parser)


def which(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `add_which`."""
    return {"to": arguments.to, "file_suffix": arguments.file_suffix, "format": arguments.format}


def add_rewriting(parser: argparse.ArgumentParser) -> None:
    """Options of every job that reads tensors and writes them anew."""
    add_decryption(parser)
    add_encryption(parser)
    add_crc_check(parser)
    parser.add_argument("--crc", action="store_true", help="write a checksum into every file")
    add_common(parser)


def add_crc_check(parser: argparse.ArgumentParser) -> None:
    """Whether checksums are verified first."""
    parser.add_argument("--crc-check", action="store_true", help="verify checksums of the source before anything else")


def rewriting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `add_rewriting`."""
    checks = {"crc_check": arguments.crc_check, "crc": arguments.crc}
    return {**decryption(arguments), **encryption(arguments), **checks, **common(arguments)}


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every job."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be read and written, and stop")
    parser.add_argument(
        "--no-sync",
        action="store_true",
        help="do not wait until the result is on disk (nor does cp); a kill is still harmless, a power cut is not",
    )
    options.add_workers(parser)
    parser.add_argument(
        "--buffer",
        type=options.byte_size,
        default=64 << 20,
        metavar="SIZE",
        help="buffer memory of each thread, e.g. 16M (default 64M)",
    )


def add_decryption(parser: argparse.ArgumentParser) -> None:
    """A key to read with."""
    options.add_key(parser, "dec", "of the source (default: the variable MS_CKPT_EXT_DEC_KEY)")
    options.add_mode(parser, "sources")


def add_encryption(parser: argparse.ArgumentParser) -> None:
    """A key to write with."""
    options.add_key(parser, "enc", "to encrypt the result with (default: the variable MS_CKPT_EXT_ENC_KEY)")
    parser.add_argument(
        "--enc-mode", type=options.mode, choices=options.MODES, default="AES-GCM", help="how (default AES-GCM)"
    )


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of every job."""
    return {
        "max_process_num": arguments.workers,
        "buffer_bytes": arguments.buffer,
        "sync": not arguments.no_sync,
        "dry_run": arguments.dry_run,
    }


def decryption(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `add_decryption`."""
    return {"dec_key": options.key(arguments, "dec"), "dec_mode": arguments.dec_mode}


def encryption(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `add_encryption`."""
    return {"enc_key": options.key(arguments, "enc"), "enc_mode": arguments.enc_mode}


def answer(job: Callable[[], Report]) -> Answer:
    """Run a job, and say what it did or would do."""
    from ms_ckpt_ext.engine.files.dry_run import Preview

    begin = time.monotonic()
    report = job()
    if isinstance(report, Preview):
        return Answer({"dry_run": True, **_data(report), **_foreseen(report)}, _preview(report))
    return Answer({"dry_run": False, **_data(report)}, _done(report, time.monotonic() - begin))


def _data(report: Report) -> dict[str, Any]:
    return {
        "published": report.published,
        "missing": list(report.missing),
        "bytes_read": report.bytes_read,
        "reads": report.reads,
        "bytes_written": report.bytes_written,
        "files_written": list(report.files_written),
        "files_kept": list(report.files_kept),
    }


def _foreseen(report: Preview) -> dict[str, Any]:
    return {
        "target": report.target,
        "sources": dict(report.sources),
        "sizes": dict(report.sizes),
        "replaces": list(report.replaces),
        "free": report.free,
    }


def _done(report: Report, seconds: float) -> Iterator[str]:
    if not report.files_written:
        kept = words.count(len(report.files_kept), "file")
        yield (
            f"Nothing to do: the result is already complete ({kept})"
            if report.published
            else f"Nothing to do: {kept} kept"
        )
    else:
        yield _written(report, seconds)
    if not report.published:
        more = f" and {len(report.missing) - 1} more" if report.missing[1:] else ""
        yield (
            f"Not complete yet: {report.missing[0]!r}{more} of other shares "
            f"{'are' if more else 'is'} missing; run those into this directory, or put their files into it"
        )


def _written(report: Report, seconds: float) -> str:
    rate = words.size(report.bytes_written / max(seconds, 1e-9))
    kept = f", {words.count(len(report.files_kept), 'file')} kept from an earlier run" if report.files_kept else ""
    return (
        f"{words.count(len(report.files_written), 'file')} written, {words.size(report.bytes_written)} in "
        f"{seconds:.1f} s ({rate}/s); {words.size(report.bytes_read)} read in {words.count(report.reads, 'read')}{kept}"
    )


def _preview(report: Preview) -> Iterator[str]:
    yield words.style("Dry run: nothing was written", "bold")
    if report.published:
        yield f"{report.target} already holds this result, complete"
        return
    yield f"  read    {words.size(report.bytes_read)} in {words.count(report.reads, 'read')}"
    yield f"  write   {words.size(report.bytes_written)} to {report.target}"
    if report.free is not None:
        short = report.bytes_written > report.free
        free = f"{words.size(report.free)} there" + (": not enough" if short else "")
        yield f"  free    {words.style(free, 'red') if short else free}"
    if report.files_kept:
        yield f"  kept    {words.count(len(report.files_kept), 'file')} from an earlier run"
    if report.replaces:
        yield f"  remove  {words.count(len(report.replaces), 'file')} of an older result"
    yield ""
    yield from _files("from", report.sources)
    yield ""
    yield from _files("to", report.sizes)


def _files(head: str, sizes: Mapping[str, int]) -> Iterator[str]:
    rows = [[os.path.normpath(name), words.size(nbytes)] for name, nbytes in sorted(sizes.items())]
    return words.listed([head, "bytes"], rows, "lr", everything=False, hint="--json")
