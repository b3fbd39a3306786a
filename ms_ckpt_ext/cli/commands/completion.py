"""`ms-ckpt completion SHELL`: a script that completes commands, options and paths.

shtab makes it from the parser once, so pressing TAB starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ms_ckpt_ext.cli.command import Answer, Command
from ms_ckpt_ext.errors import MissingDependencyError

SHELLS = ("bash", "zsh", "fish")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.cli.main import PROG, parser

    try:
        import shtab
    except ImportError as error:
        raise MissingDependencyError("completion scripts are made by shtab: pip install shtab") from error
    whole = parser()
    kinds = {"file": shtab.FILE, "directory": shtab.DIRECTORY}
    for action in _actions(whole):
        if hasattr(action, "completes"):
            action.complete = kinds[action.completes]  # type: ignore[attr-defined]
    return Answer(None, shtab.complete(whole, arguments.shell, root_prefix=PROG.replace("-", "_")).splitlines())


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of those below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


COMMAND = Command(
    name="completion",
    summary="print a completion script for bash, zsh or fish",
    description="Print a script that makes the shell complete commands, options and paths.",
    examples=(
        ('eval "$(ms-ckpt completion bash)"', "in this bash; put it into ~/.bashrc to keep it"),
        ("ms-ckpt completion zsh > ~/.zfunc/_ms-ckpt", "for zsh, in a folder of its $fpath"),
        ("ms-ckpt completion fish > ~/.config/fish/completions/ms-ckpt.fish", "for fish"),
    ),
    configure=_configure,
    run=_run,
    json=False,
)
