"""`ms-ckpt convert`: from one format into the other."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs, options
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", help="a file, or a directory with files however deep"))
    takes_path(parser.add_argument("dst", help="directory for the results; for a file also its new path"))
    parser.add_argument("--to", choices=jobs.FORMATS, help="format (default: by the suffix of dst, else as it is)")
    options.add_name_map(parser, '{"name in the source": "name in the result"}')
    regex = "only files whose name this is found in, e.g. '_0-'"
    parser.add_argument("--file-name-regex", metavar="REGEX", help=regex)
    jobs.add_decryption(parser)
    jobs.add_encryption(parser)
    jobs.add_checksums(parser)
    jobs.add_common(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.convert import convert

    return jobs.answer(
        lambda: convert(
            arguments.src,
            arguments.dst,
            to=arguments.to,
            name_map=options.name_map(arguments),
            file_name_regex=arguments.file_name_regex,
            crc_check=arguments.crc_check,
            crc=arguments.crc,
            **jobs.decryption(arguments),
            **jobs.encryption(arguments),
            **jobs.common(arguments),
        )
    )


COMMAND = Command(
    name="convert",
    summary="convert .ckpt to safetensors, and back",
    description=(
        "Convert a checkpoint file, or a tree of them, from one format into the other: .ckpt or safetensors, plain or\n"
        "encrypted, with checksums or without. Every file becomes one file; slices stay slices."
    ),
    examples=(
        ("ms-ckpt convert checkpoint converted --to safetensors", "every .ckpt below a directory"),
        ("ms-ckpt convert model.safetensors model.ckpt --crc", "one file, with a checksum"),
        ("ms-ckpt convert old new --to ckpt --dec-key-file old.key --enc-key-file new.key", "with another key, too"),
    ),
    configure=_configure,
    run=_run,
)
