"""`ms-ckpt merge`: slices into whole parameters."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs, options
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", help="rank folders; or a merged checkpoint, whose parts are cut anew"))
    takes_path(parser.add_argument("dst", help="directory for the result"), "directory")
    options.add_strategy(parser)
    options.add_filter(parser)
    options.add_equal_slices(parser)
    naming = "names of files and index (default mindspore)"
    parser.add_argument("--naming", choices=("mindspore", "huggingface"), default="mindspore", help=naming)
    size = "size of a part to aim for; with Hugging Face's names a limit (default 3G)"
    parser.add_argument("--part-size", type=options.byte_size, default=3 << 30, metavar="SIZE", help=size)
    options.add_share(parser)
    options.add_rules(parser, "names stay", "by default the one in SRC")
    options.add_adapter(parser, "of SRC, which have Hugging Face's names")
    jobs.add_which(parser)
    jobs.add_rewriting(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.jobs import merge

    return jobs.answer(
        lambda: merge(
            arguments.src,
            arguments.dst,
            strategy=arguments.strategy,
            match=arguments.match,
            exclude=arguments.exclude,
            rules=options.rules(arguments),
            adapter=arguments.adapter,
            naming=arguments.naming,
            part_bytes=arguments.part_size,
            share=arguments.share,
            allow_equal_slices=arguments.allow_equal_slices,
            **jobs.which(arguments),
            **jobs.rewriting(arguments),
        )
    )


COMMAND = Command(
    name="merge",
    summary="put the slices of all ranks together",
    description=(
        "Put the slices of a sharded checkpoint together, in memory that does not grow with the model. The result\n"
        "appears when it is complete; after an interruption the same command goes on where it stopped."
    ),
    examples=(
        ("ms-ckpt merge checkpoint merged --strategy strategy.ckpt", "rank folders into whole parameters"),
        ("ms-ckpt merge checkpoint merged --strategy strategy.ckpt --dry-run", "what would be read and written"),
        (
            "ms-ckpt merge checkpoint hf --strategy s.ckpt --naming huggingface --part-size 5G --exclude 'adam_*'",
            "weights only, in the files that Hugging Face's libraries look for",
        ),
        ("ms-ckpt merge checkpoint merged --strategy s.ckpt --share 1/4", "on the first of four hosts"),
        ("srun ms-ckpt merge checkpoint merged --strategy s.ckpt --share auto", "on all nodes of a SLURM job"),
    ),
    configure=_configure,
    run=_run,
)
