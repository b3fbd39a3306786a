"""`ms-ckpt reshard`: slices for another strategy."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs, options
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", help="rank folders, a merged checkpoint, or a file"))
    takes_path(parser.add_argument("dst", help="directory for the result: rank_N/net.safetensors"), "directory")
    options.add_strategy(parser)
    options.add_strategy(parser, "--to-strategy", "of the job that will load it (default: one device)")
    parser.add_argument("--rank", type=int, metavar="N", help="write this rank's folder only")
    options.add_name_map(parser, '{"name in the result": "name in the source"}')
    options.add_rules(parser, "names stay", "by default the one in SRC")
    options.add_adapter(parser, "of SRC, which have Hugging Face's names")
    options.add_equal_slices(parser)
    jobs.add_which(parser)
    jobs.add_rewriting(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.jobs import reshard

    return jobs.answer(
        lambda: reshard(
            arguments.src,
            arguments.dst,
            strategy=arguments.strategy,
            to_strategy=arguments.to_strategy,
            rank=arguments.rank,
            name_map=options.name_map(arguments),
            rules=options.rules(arguments),
            adapter=arguments.adapter,
            allow_equal_slices=arguments.allow_equal_slices,
            **jobs.which(arguments),
            **jobs.rewriting(arguments),
        )
    )


COMMAND = Command(
    name="reshard",
    summary="cut a checkpoint anew for another strategy",
    description=(
        "Cut a checkpoint anew for another strategy, straight from its slices, without a merge in between. The result\n"
        "appears when it is complete; after an interruption the same command goes on where it stopped."
    ),
    examples=(
        (
            "ms-ckpt reshard checkpoint checkpoint_4p --strategy strategy_8p.ckpt --to-strategy strategy_4p.ckpt",
            "8 ranks to 4",
        ),
        ("ms-ckpt reshard merged checkpoint_4p --to-strategy strategy_4p.ckpt --to ckpt", "a merged one, as .ckpt"),
        (
            "ms-ckpt reshard Qwen3-8B checkpoint --rules qwen3 --to-strategy strategy.ckpt",
            "a model of the hub, for training with MindFormers",
        ),
        ("ms-ckpt reshard checkpoint out --strategy a.ckpt --to-strategy b.ckpt --rank 0", "one rank of it"),
    ),
    configure=_configure,
    run=_run,
)
