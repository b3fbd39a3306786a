"""`ms-ckpt decrypt`: encrypted checkpoint files into the bytes that were encrypted."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", help="a file, or a directory with files however deep"))
    takes_path(parser.add_argument("dst", help="directory for the results; for a file also its new path"))
    regex = "only files whose name this is found in"
    parser.add_argument("--file-name-regex", metavar="REGEX", help=regex)
    jobs.add_decryption(parser)
    jobs.add_common(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.convert import decrypt

    return jobs.answer(
        lambda: decrypt(
            arguments.src,
            arguments.dst,
            file_name_regex=arguments.file_name_regex,
            **jobs.decryption(arguments),
            **jobs.common(arguments),
        )
    )


COMMAND = Command(
    name="decrypt",
    summary="decrypt checkpoint files",
    description=(
        "Decrypt a checkpoint file, or a tree of them. Nothing appears in the target unless all of it was right: a\n"
        "wrong key or an altered file is exit code 6."
    ),
    examples=(
        ("ms-ckpt decrypt sealed merged --dec-key-file k.bin", "a tree"),
        ("ms-ckpt decrypt net.ckpt plain --dec-key-env NET_KEY --dec-mode AES-CBC", "in a mode that is no secret"),
    ),
    configure=_configure,
    run=_run,
)
