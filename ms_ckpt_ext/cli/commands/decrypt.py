"""`ms-ckpt decrypt`: encrypted checkpoint files into the bytes that were encrypted."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs
from ms_ckpt_ext.cli.command import Answer, Command


def _configure(parser: argparse.ArgumentParser) -> None:
    jobs.add_files(parser)
    jobs.add_file_name_regex(parser)
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
        "wrong key or an altered file is exit code 6, one that does not fit the checksum inside it exit code 3."
    ),
    examples=(
        ("ms-ckpt decrypt sealed merged --dec-key-file k.bin", "a tree"),
        ("ms-ckpt decrypt net.ckpt plain --dec-key-env NET_KEY --dec-mode AES-CBC", "refuse a file in another mode"),
    ),
    configure=_configure,
    run=_run,
)
