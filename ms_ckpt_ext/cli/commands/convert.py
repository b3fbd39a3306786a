"""`ms-ckpt convert`: from one format into the other."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs, options
from ms_ckpt_ext.cli.command import Answer, Command
from ms_ckpt_ext.formats.table import FORMATS


def _configure(parser: argparse.ArgumentParser) -> None:
    jobs.add_files(parser)
    parser.add_argument("--to", choices=FORMATS, help="format (default: by the suffix of dst, else as it is)")
    options.add_name_map(parser, '{"name in the source": "name in the result"}')
    jobs.add_file_name_regex(parser, ", e.g. '_0-'")
    jobs.add_rewriting(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.convert import convert

    return jobs.answer(
        lambda: convert(
            arguments.src,
            arguments.dst,
            to=arguments.to,
            name_map=options.name_map(arguments),
            file_name_regex=arguments.file_name_regex,
            **jobs.rewriting(arguments),
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
