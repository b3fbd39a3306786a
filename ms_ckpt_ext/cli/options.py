"""Options that several commands have, and how they become arguments of the API."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ms_ckpt_ext.cli.command import takes_path


def add_strategy(parser: ArgumentParser, flag: str = "--strategy", whose: str = "of the job that saved it") -> None:
    """A strategy file or directory."""
    takes_path(
        parser.add_argument(
            flag, metavar="FILE", help=f"strategy {whose}: a file, or a directory with one per pipeline stage"
        )
    )


def add_suffix(parser: ArgumentParser, flag: str = "--file-suffix") -> None:
    """Which file of a rank folder."""
    parser.add_argument(flag, metavar="S", help="which file of each rank folder, e.g. 3_1200 (default: the newest)")


def add_format(parser: ArgumentParser) -> None:
    """Which of two formats that lie side by side."""
    parser.add_argument("--format", choices=("safetensors", "ckpt"), help="which files, where both formats are there")


def add_filter(parser: ArgumentParser) -> None:
    """Globs of parameter names."""
    parser.add_argument(
        "--match", action="append", default=[], metavar="GLOB", help="only parameters like this, e.g. 'layers.0.*'"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no parameters like this, e.g. 'adam_*'"
    )


def add_workers(parser: ArgumentParser) -> None:
    """How many threads."""
    parser.add_argument("--workers", type=int, default=64, metavar="N", help="most threads (default: one per core)")


def add_key(parser: ArgumentParser, verb: str = "dec", whose: str = "of encrypted files", suffix: str = "") -> None:
    """Where a key comes from; never the key itself, which the process list would show."""
    keys = parser.add_mutually_exclusive_group()
    takes_path(keys.add_argument(f"--{verb}-key-file{suffix}", metavar="FILE", help=f"file with the key {whose}"))
    keys.add_argument(f"--{verb}-key-env{suffix}", metavar="NAME", help="environment variable with that key")


def key(arguments: Namespace, verb: str = "dec", suffix: str = "") -> Any:
    """The key that `add_key` asked for; None when none was named. Raises UsageError or StorageError."""
    file = getattr(arguments, f"{verb}_key_file{suffix}")
    env = getattr(arguments, f"{verb}_key_env{suffix}")
    if file is None and env is None:
        return None
    from ms_ckpt_ext.formats.crypto import load_key

    return load_key(file=file, env=env)
