"""From a command line to an exit code: parse, run, print, and turn every error into words.

Starting must be quick: nothing but argparse and the small modules here is imported before a command is known, and a
command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Optional

from ms_ckpt_ext import errors
from ms_ckpt_ext._version import __version__
from ms_ckpt_ext.cli.command import Answer, Command, Exit

PROG = "ms-ckpt"
COMMANDS = (
    "inspect",
    "plan",
    "diff_strategy",
    "merge",
    "reshard",
    "convert",
    "encrypt",
    "decrypt",
    "verify",
    "completion",
)
"""Modules of this package, in the order of `--help`; `_` stands for `-`."""

_DESCRIPTION = """\
Look at MindSpore checkpoints, compare them, merge them, and cut them for another number of devices.

Works on login nodes: neither MindSpore nor an NPU is needed. Nothing appears in a target before it is complete, and a
job that was interrupted goes on when the same command is run again."""

# The first that fits counts, so what is special comes first.
_CODES = (
    (errors.UsageError, Exit.USAGE),
    (errors.MissingDependencyError, Exit.DEPENDENCY),
    (errors.DecryptionError, Exit.KEY),
    (errors.StorageError, Exit.STORAGE),
    (errors.CheckpointError, Exit.BAD_INPUT),
)


def commands() -> list[Command]:
    """Every subcommand."""
    return [importlib.import_module(f"{__package__}.{name}").COMMAND for name in COMMANDS]


def parser() -> argparse.ArgumentParser:
    """The whole command line. A parsed one has `command`, a `Command`."""
    top = argparse.ArgumentParser(
        prog=PROG, description=_DESCRIPTION, epilog=_exit_codes(), formatter_class=_Formatter, allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    below = top.add_subparsers(metavar="COMMAND", title="commands", required=True)
    for command in commands():
        made = below.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=_examples(command),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        command.configure(made)
        made.set_defaults(command=command, json=False)
        if command.json:
            made.add_argument("--json", action="store_true", help="print one JSON document, for machines")
        made.add_argument("--verbose", action="store_true", help="tell on standard error what is done; show tracebacks")
    return top


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as they stand, room beside long options, and commands as a list without a head of its own."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def _exit_codes() -> str:
    return "exit codes:\n" + "\n".join(f"  {code.value:<4} {code.meaning}" for code in Exit)


def _examples(command: Command) -> str:
    lines = [line for typed, told in command.examples for line in (f"  # {told}", f"  {typed}", "")]
    return "\n".join(["examples:", *lines]).rstrip()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command line and return its exit code."""
    try:
        code = _main(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.PIPE
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted; run the same command again to go on", file=sys.stderr)
        return Exit.INTERRUPTED
    return code


def _main(argv: list[str]) -> int:
    if not argv:
        parser().print_help(sys.stderr)
        return Exit.USAGE
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as asked:  # --help, --version, or a usage error that argparse has printed
        return int(asked.code or 0)
    command: Command = arguments.command
    logging.basicConfig(
        format=f"{PROG} {command.name}: %(message)s", level=logging.INFO if arguments.verbose else logging.WARNING
    )
    try:
        return _print(command.run(arguments), arguments.json)
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - everything becomes words and an exit code
        return _failed(error, command, arguments)


def _print(answer: Answer, as_json: bool) -> int:
    if as_json:
        json.dump(answer.data, sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        for line in answer.lines:
            print(line)
    return answer.code


def _failed(error: Exception, command: Command, arguments: argparse.Namespace) -> int:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), Exit.BUG)
    if code is Exit.BUG or arguments.verbose:
        traceback.print_exception(type(error), error, error.__traceback__)
    what = "error in this program, please report it" if code is Exit.BUG else "error"
    print(f"{PROG} {command.name}: {what}: {error}", file=sys.stderr)
    if code is Exit.KEY:
        print(f"{PROG} {command.name}: a key is given by --dec-key-file or --dec-key-env", file=sys.stderr)
    if arguments.json:
        told = {"type": type(error).__name__, "message": str(error), "exit_code": code.value}
        json.dump({"error": told}, sys.stdout, indent=1, ensure_ascii=False)
        print()
    return code
