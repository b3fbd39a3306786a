"""Options that several commands have, and how they become arguments of the API."""

from __future__ import annotations

from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from typing import Any, Union

from ms_ckpt_ext.cli.command import takes_path
from ms_ckpt_ext.formats.table import FORMATS


def add_strategy(parser: ArgumentParser, flag: str = "--strategy", whose: str = "of the job that saved it") -> None:
    """A strategy file or directory, or several that are put together."""
    help_ = (
        f"strategy {whose}: a file, or a directory with one per pipeline stage; may be repeated: "
        "each adds what those before it lack"
    )
    takes_path(parser.add_argument(flag, metavar="FILE", action=Gather, help=help_))


class Gather(Action):
    """An option that may be repeated: its value, or the list of them."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: Any = None) -> None:
        """Add a value to those that were given."""
        before = getattr(namespace, self.dest)
        held = before if isinstance(before, list) else [] if before is None else [before]
        setattr(namespace, self.dest, [*held, values] if held else values)


def add_suffix(parser: ArgumentParser, flag: str = "--file-suffix") -> None:
    """Which file of a rank folder."""
    parser.add_argument(flag, metavar="S", help="which file of each rank folder, e.g. 3_1200 (default: the newest)")


def add_format(parser: ArgumentParser) -> None:
    """Which of two formats that lie side by side."""
    parser.add_argument("--format", choices=FORMATS, help="which format to read, where both are present")


def add_filter(parser: ArgumentParser) -> None:
    """Globs of parameter names."""
    parser.add_argument(
        "--match", action="append", default=[], metavar="GLOB", help="only parameters that match, e.g. 'layers.0.*'"
    )
    add_exclude(parser)


def add_exclude(parser: ArgumentParser) -> None:
    """Globs of what is left out."""
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no parameters that match, e.g. 'adam_*'"
    )


def add_share(parser: ArgumentParser) -> None:
    """Which share of a job this is."""
    help_ = "write share I of N, so that several hosts can share the work; auto: as msrun, mpirun or srun numbers them"
    parser.add_argument("--share", type=share, default=(1, 1), metavar="I/N", help=help_)


def add_rules(parser: ArgumentParser, default: str, config: str) -> None:
    """Weight rules of a family or a file; `default` and `config` complete their help texts."""
    rules = f"a family of models (llama, qwen2, qwen3, qwen3-moe, deepseek-v3), or a rule file (default: {default})"
    takes_path(parser.add_argument("--rules", metavar="FAMILY", help=rules))
    folder = f"Hugging Face's config.json, or a folder with one, for numbers of heads and layers; {config}"
    takes_path(parser.add_argument("--config", metavar="PATH", help=folder))
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        type=setting,
        help="a key of config.json or a switch of the rule file, e.g. use_interleaved_weight_layout_mlp=false",
    )


def add_adapter(parser: ArgumentParser, whose: str) -> None:
    """A folder with a LoRA adapter."""
    help_ = f"folder with a LoRA adapter, as PEFT saves it: its products are added to the weights {whose}"
    takes_path(parser.add_argument("--adapter", metavar="FOLDER", help=help_), "directory")


def setting(text: str) -> tuple[str, Any]:
    """A key and its value on the command line.

    >>> setting("num_experts=8"), setting("mla_qkv_concat=false"), setting("q_lora_rank=null")
    (('num_experts', 8), ('mla_qkv_concat', False), ('q_lora_rank', None))
    """
    key, equals, value = text.partition("=")
    words = {"true": True, "false": False, "null": None}
    if not key or not equals or not (value in words or value.isdecimal()):
        raise ArgumentTypeError(f"{text!r} is no KEY=VALUE with a whole number, true, false or null as value")
    return key, words[value] if value in words else int(value)


def sizes(arguments: Namespace) -> dict[str, Any]:
    """What `--set` gave, of `add_rules`."""
    return dict(arguments.set)


def rules(arguments: Namespace) -> Any:
    """The rules that `add_rules` asked for, for a checkpoint from Hugging Face. Raises as `load_rules`."""
    if arguments.rules is None:
        return ()
    import os

    from ms_ckpt_ext.api.huggingface.families import load_rules

    beside = os.path.join(arguments.src, "config.json")
    config = arguments.config or (beside if os.path.isfile(beside) else None)
    return load_rules(arguments.rules, config, sizes(arguments))


def add_equal_slices(parser: ArgumentParser) -> None:
    """Whether slices that are all equal are intended."""
    help_ = (
        "equal slices are intended: do not take them for whole parameters that integrated_save=True put into every file"
    )
    parser.add_argument("--allow-equal-slices", action="store_true", help=help_)


def add_workers(parser: ArgumentParser) -> None:
    """How many threads."""
    parser.add_argument(
        "--workers", type=positive, default=64, metavar="N", help="most threads (default: one per core)"
    )


def add_key(parser: ArgumentParser, verb: str = "dec", whose: str = "of encrypted files", suffix: str = "") -> None:
    """Where a key comes from; never the key itself, which the process list would show."""
    keys = parser.add_mutually_exclusive_group()
    takes_path(keys.add_argument(f"--{verb}-key-file{suffix}", metavar="FILE", help=f"file with the key {whose}"))
    keys.add_argument(f"--{verb}-key-env{suffix}", metavar="NAME", help="environment variable with that key")


MODES = ("AES-GCM", "AES-CBC", "SM4-CBC", "chunked")


def add_mode(parser: ArgumentParser, whose: str = "files", suffix: str = "") -> None:
    """How encrypted files must be encrypted."""
    help_ = f"refuse {whose} that are encrypted in another way" if not suffix else f"the same for {whose[3:]}"
    parser.add_argument(f"--dec-mode{suffix}", type=mode, choices=MODES, help=help_)


def mode(text: str) -> str:
    """A mode on the command line; an unknown one is not repeated in the message, because it may be a key.

    >>> mode("AES-GCM")
    'AES-GCM'
    """
    if text not in MODES:
        raise ArgumentTypeError(f"no such mode; choose one of {', '.join(MODES)}")
    return text


def add_name_map(parser: ArgumentParser, form: str) -> None:
    """A JSON file with names."""
    takes_path(parser.add_argument("--name-map", metavar="FILE", help=f"JSON {form}"))


def name_map(arguments: Namespace) -> Any:
    """The contents of the file that `add_name_map` asked for. Raises FormatError or StorageError."""
    if arguments.name_map is None:
        return None
    from ms_ckpt_ext.storage.reader import read_json

    return read_json(arguments.name_map, "the name map")


def positive(text: str) -> int:
    """A number of at least 1 on the command line.

    >>> positive("8")
    8
    """
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def byte_size(text: str) -> int:
    """A size on the command line, in bytes.

    >>> byte_size("64M"), byte_size("3GiB"), byte_size("512")
    (67108864, 3221225472, 512)
    """
    plain = text.upper().removesuffix("IB").removesuffix("B")
    number, unit = (plain[:-1], plain[-1]) if plain[-1:] in _SIZES and plain else (plain, "")
    if not number.isdigit():
        raise ArgumentTypeError(f"{text!r} is no size: give bytes, or a whole number with K, M or G, e.g. 1536M")
    return int(number) * _SIZES.get(unit, 1)


_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def share(text: str) -> Union[tuple[int, int], str]:
    """A share of the work on the command line.

    >>> share("1/4"), share("auto")
    ((1, 4), 'auto')
    """
    if text == "auto":
        return text
    mine, _, all_ = text.partition("/")
    if not (mine.isdigit() and all_.isdigit() and 1 <= int(mine) <= int(all_)):
        raise ArgumentTypeError(f"{text!r} is no share: give I/N with 1 <= I <= N, e.g. 1/4, or auto")
    return int(mine), int(all_)


def key(arguments: Namespace, verb: str = "dec", suffix: str = "") -> Any:
    """The key that `add_key` asked for; None when none was named. Raises UsageError or StorageError."""
    file = getattr(arguments, f"{verb}_key_file{suffix}")
    env = getattr(arguments, f"{verb}_key_env{suffix}")
    if file is None and env is None:
        return None
    from ms_ckpt_ext.formats.crypto import load_key

    return load_key(file=file, env=env)
