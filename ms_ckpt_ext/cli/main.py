"""From a command line to an exit code: parse, run, print, and turn every error into words.

Starting must be quick: nothing but argparse and the small modules here is imported before a command is known, and a
command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any, Optional

from ms_ckpt_ext import errors, log
from ms_ckpt_ext._version import __version__
from ms_ckpt_ext.cli.command import Answer, Command, Exit

PROG = "ms-ckpt"
_LAYOUT = "\n\t"
"""Control characters that stay in messages: their layout."""
COMMANDS = (
    "inspect",
    "plan",
    "measure",
    "diff_strategy",
    "merge",
    "reshard",
    "export",
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

# The first match counts, so specific errors come before general ones.
_CODES = (
    (errors.UsageError, Exit.USAGE),
    (errors.MissingDependencyError, Exit.DEPENDENCY),
    (errors.DecryptionError, Exit.KEY),
    (errors.StorageError, Exit.STORAGE),
    (errors.CheckpointError, Exit.BAD_INPUT),
)


def commands(names: Sequence[str] = COMMANDS) -> list[Command]:
    """Every subcommand, or those of some modules."""
    return [importlib.import_module(f"{__package__}.commands.{name}").COMMAND for name in names]


def parser(listed: Optional[Sequence[Command]] = None) -> argparse.ArgumentParser:
    """The parser of all subcommands, or of some. Its result has `command`, and `parser`, the parser of that command."""
    top = argparse.ArgumentParser(
        prog=PROG, description=_DESCRIPTION, epilog=_exit_codes(), formatter_class=_Formatter, allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    below = top.add_subparsers(prog=PROG, metavar="COMMAND", title="commands", required=True)
    for command in commands() if listed is None else listed:
        made = below.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=_examples(command),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        command.configure(made)
        made.set_defaults(command=command, parser=made, json=False)
        if command.json:
            made.add_argument("--json", action="store_true", help="print one JSON document, for machines")
        made.add_argument("--verbose", action="store_true", help="log what is done, on standard error; show tracebacks")
    return top


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps paragraphs as written, leaves room beside long options, and lists commands without their own heading."""

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


class _OutputError(Exception):
    """Standard output could not be written; the cause says why."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command line and return its exit code."""
    return run_line(sys.argv[1:] if argv is None else argv)


def run_line(argv: Sequence[str], listed: Optional[Sequence[Command]] = None) -> int:
    """Run one line of these commands (by default of all), and return its exit code."""
    _ready_output()
    try:
        with _interruptions() as interrupted:
            code = _main(list(argv), listed, interrupted)
        with _writing():
            sys.stdout.flush()
    except _OutputError as error:
        # The interpreter flushes once more at exit: into /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__cause__, BrokenPipeError):
            return Exit.PIPE
        print(f"{PROG}: error: cannot write to standard output: {error}", file=sys.stderr)
        return Exit.STORAGE
    except KeyboardInterrupt:
        print(f"\n{PROG}: interrupted; run the same command again to go on", file=sys.stderr)
        return Exit.INTERRUPTED
    return code


def _ready_output() -> None:
    """Prepare for names that the terminal's encoding cannot represent, and for a closed standard output (`>&-`)."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    elif isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _OutputError(error.strerror or str(error)) from error


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Record Ctrl-C besides raising KeyboardInterrupt, which an import of C code may turn into an ImportError."""
    seen: list[int] = []

    def note(number: int, frame: Optional[FrameType]) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _main(argv: list[str], listed: Optional[Sequence[Command]], interrupted: Sequence[int]) -> int:
    if not argv:
        parser(listed).print_help(sys.stderr)
        return Exit.USAGE
    try:
        arguments = _parsed(argv, listed)
    except SystemExit as asked:  # --help, --version, or a usage error that argparse has printed
        return int(asked.code or 0)
    command: Command = arguments.command
    if arguments.verbose:
        _show_messages(command, "INFO")
    else:
        log.prepared_by(lambda: _show_messages(command, "WARNING"))
    from ms_ckpt_ext.storage.threads import few_collections  # which --version and --help do without

    try:
        with few_collections():
            return _print(command.run(arguments), arguments.json)
    except _OutputError:
        raise
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        return _failed(error, command, arguments)


def _show_messages(command: Command, level: str) -> None:
    import logging

    from ms_ckpt_ext.cli import words

    class Visible(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return words.visible(super().format(record), _LAYOUT)

    shown = logging.StreamHandler()
    shown.setFormatter(Visible(f"{PROG} {command.name}: %(message)s"))
    logging.basicConfig(handlers=[shown], level=level)


def _parsed(argv: list[str], listed: Optional[Sequence[Command]]) -> argparse.Namespace:
    meant = commands(_meant(argv[0])) if listed is None else listed
    arguments, unknown = parser(meant).parse_known_args(argv)
    if unknown:
        import difflib

        made: argparse.ArgumentParser = arguments.parser
        near = difflib.get_close_matches(unknown[0].split("=")[0], made._option_string_actions, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        made.error(f"unrecognized arguments: {' '.join(_quotable(unknown))}{hint}")
    return arguments


def _meant(word: str) -> Sequence[str]:
    """The modules of the commands that a first word may mean."""
    module = word.replace("-", "_")
    return () if word == "--version" else (module,) if module in COMMANDS else COMMANDS


def _quotable(unknown: Sequence[str]) -> list[str]:
    """Unknown arguments; of options only the names, because what follows may be a key (`--dec-key …`)."""
    options = [word.split("=")[0] if word.startswith("--") else word[:2] for word in unknown if word.startswith("-")]
    return options or list(unknown)


def _print(answer: Answer, as_json: bool) -> int:
    if as_json:
        _print_json(answer.data)
    else:
        from ms_ckpt_ext.cli import words

        for line in answer.lines:
            with _writing():
                print(words.visible(line, "\t"))
    return answer.code


def _print_json(data: Any) -> None:
    from ms_ckpt_ext.cli.records import json_text

    text = json_text(data)
    with _writing():
        print(text)


def _failed(error: BaseException, command: Command, arguments: argparse.Namespace) -> int:
    from ms_ckpt_ext.cli import words

    error = errors.named(error, command.name)
    code = next((code for kind, code in _CODES if isinstance(error, kind)), Exit.BUG)
    if code is Exit.BUG or arguments.verbose:
        import traceback

        lines = traceback.format_exception(type(error), error, error.__traceback__)
        sys.stderr.write(words.visible("".join(lines), _LAYOUT))
    what = "error in this program, please report it" if code is Exit.BUG else "error"
    print(f"{PROG} {command.name}: {what}: {words.visible(str(error), _LAYOUT)}", file=sys.stderr)
    if code is Exit.KEY:
        print(f"{PROG} {command.name}: a key is given by --dec-key-file or --dec-key-env", file=sys.stderr)
    if arguments.json:
        told = {"type": type(error).__name__, "message": str(error), "exit_code": code.value}
        _print_json({"error": told})
    return code
