"""What a command is: its words, its options, and a function from options to an answer.

A command is a module here with a `COMMAND`, listed in `cli.main.COMMANDS`. Its module is imported by every start of
`ms-ckpt`, so it imports nothing but this package's `cli`; `run` imports what it calls.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Callable, NamedTuple


class Exit(IntEnum):
    """Exit codes, with what they mean; `ms-ckpt --help` and docs/cli.md list them."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    FINE = 0, "done; what was compared or checked is equal and right"
    DIFFERENT = 1, "differences or faults were found"
    USAGE = 2, "wrong arguments; nothing was read or written"
    BAD_INPUT = 3, "a checkpoint or strategy is missing, damaged, incomplete, or does not fit"
    STORAGE = 4, "the operating system refused a read, a write or memory; run again to go on"
    DEPENDENCY = 5, "an optional package is not installed"
    KEY = 6, "an encrypted file: no key, a wrong one, or the file was altered"
    BUG = 70, "an error in this program; please report it"
    INTERRUPTED = 130, "Ctrl-C; run again to go on"
    PIPE = 141, "the program that read the output ended before"


class Answer(NamedTuple):
    """What a command found.

    Attributes:
        data: for machines, as `--json` prints it: values that `json` can write, and records.
        lines: for people, made when they are printed.
        code: the exit code.
    """

    data: Any
    lines: Iterable[str]
    code: Exit = Exit.FINE


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        name: as it is typed.
        summary: one line in `ms-ckpt --help`; no capital, no full stop.
        description: paragraphs of its own `--help`.
        examples: (command line, what it does); tests parse every one.
        configure: adds its arguments to its parser.
        run: does it; errors of `ms_ckpt_ext.errors` are printed and become exit codes.
        json: whether `--json` is offered.
    """

    name: str
    summary: str
    description: str
    examples: tuple[tuple[str, str], ...]
    configure: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], Answer]
    json: bool = True


def takes_path(action: Action, kind: str = "file") -> Action:
    """Mark an argument for shell completion: kind is "file" or "directory"."""
    action.completes = kind  # type: ignore[attr-defined]
    return action
