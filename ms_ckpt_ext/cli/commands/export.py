"""`ms-ckpt export`: a training's weights for Hugging Face's libraries."""

from __future__ import annotations

import argparse

from ms_ckpt_ext.cli import jobs, options
from ms_ckpt_ext.cli.command import Answer, Command, takes_path


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("src", help="rank folders, a folder of MindFormers, a merged checkpoint, or a file"))
    takes_path(parser.add_argument("dst", help="directory for the model"), "directory")
    options.add_rules(parser, "the family that has the architecture of --config", "copied, with a tokenizer beside it")
    options.add_strategy(parser)
    options.add_adapter(parser, "that are written")
    dtype = "of the floats that are written (default: that of the training)"
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=dtype)
    options.add_exclude(parser)
    size = "size of a file at most, as transformers takes it: 5GB is 5 * 10**9 bytes, 5GiB 5 * 2**30 (default 5GB)"
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help=size)
    options.add_share(parser)
    options.add_equal_slices(parser)
    options.add_suffix(parser)
    options.add_format(parser)
    jobs.add_decryption(parser)
    jobs.add_crc_check(parser)
    jobs.add_common(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.huggingface.export import export

    return jobs.answer(
        lambda: export(
            arguments.src,
            arguments.dst,
            rules=arguments.rules,
            config=arguments.config,
            sizes=options.sizes(arguments),
            strategy=arguments.strategy,
            adapter=arguments.adapter,
            dtype=arguments.dtype,
            exclude=arguments.exclude,
            max_shard_size=arguments.max_shard_size,
            share=arguments.share,
            file_suffix=arguments.file_suffix,
            format=arguments.format,
            crc_check=arguments.crc_check,
            allow_equal_slices=arguments.allow_equal_slices,
            **jobs.decryption(arguments),
            **jobs.common(arguments),
        )
    )


COMMAND = Command(
    name="export",
    summary="write a training's weights as Hugging Face's libraries read them",
    description=(
        "Write the weights of a training as Hugging Face's libraries read them, straight from the slices, in memory\n"
        "that does not grow with the model. Optimizer states and training scalars are left out; a parameter that\n"
        "no rule names is an error. The result appears when it is complete; after an interruption the same command\n"
        "goes on where it stopped."
    ),
    examples=(
        (
            "ms-ckpt export checkpoint model --config Qwen3-8B --strategy strategy.ckpt",
            "by the model's folder of the hub",
        ),
        ("ms-ckpt export checkpoint model --config Qwen3-8B --strategy s.ckpt --dtype bfloat16", "rounded to bfloat16"),
        ("ms-ckpt export checkpoint model --config Qwen3-8B --strategy s.ckpt --adapter lora", "with an adapter added"),
        ("ms-ckpt export output/checkpoint/iteration_00001000 model --config Qwen3-8B", "a folder of MindFormers"),
        (
            "ms-ckpt export checkpoint model --rules deepseek-v3 --config config.json --set mla_qkv_concat=false "
            "--strategy s.ckpt",
            "a family by its name, in another arrangement of its weights",
        ),
        ("ms-ckpt export checkpoint model --rules own_rules.json --config config.json --strategy s.ckpt", "own rules"),
    ),
    configure=_configure,
    run=_run,
)
