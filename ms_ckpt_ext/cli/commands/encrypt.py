"""`ms-ckpt encrypt`: checkpoint files as they are, encrypted."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs
from ms_ckpt_ext.cli.command import Answer, Command


def _configure(parser: argparse.ArgumentParser) -> None:
    jobs.add_files(parser)
    jobs.add_file_name_regex(parser)
    jobs.add_encryption(parser)
    jobs.add_common(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.convert import encrypt

    return jobs.answer(
        lambda: encrypt(
            arguments.src,
            arguments.dst,
            file_name_regex=arguments.file_name_regex,
            **jobs.encryption(arguments),
            **jobs.common(arguments),
        )
    )


COMMAND = Command(
    name="encrypt",
    summary="encrypt checkpoint files",
    description=(
        "Encrypt a checkpoint file, or a tree of them; decrypt gives back the same bytes. A key has 16, 24 or 32\n"
        "bytes: raw, or as text hex:… or base64:…, in a file or in an environment variable, never on the command line."
    ),
    examples=(
        ("head -c 32 /dev/urandom > k.bin && ms-ckpt encrypt merged sealed --enc-key-file k.bin", "with a new key"),
        ("ms-ckpt encrypt net.ckpt sealed --enc-key-env NET_KEY --enc-mode AES-GCM", "as MindSpore reads it"),
    ),
    configure=_configure,
    run=_run,
)
