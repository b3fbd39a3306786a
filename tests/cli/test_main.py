"""The command line as a whole: help, exit codes, messages of errors, start-up, completion, pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from ms_ckpt_ext import __version__, errors
from ms_ckpt_ext.cli import main as cli
from ms_ckpt_ext.cli.command import Answer, Command, Exit
from tests.support.command_line import ROOT, Ran, environment, run, run_script, script

ALL = cli.commands()
HEAVY = ("mindspore", "numpy", "google", "tqdm", "safetensors", "xxhash", "shtab", "cryptography")


def test_help_lists_every_command_and_exit_code() -> None:
    ran = run_script("--help")
    assert (ran.code, ran.err) == (0, "")
    assert all(f"  {command.name}" in ran.out and command.summary in ran.out for command in ALL)
    assert all(f"  {code.value:<4} {code.meaning}\n" in ran.out for code in Exit)


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from ms_ckpt_ext.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    loaded = {name.split(".")[0] for name in told.stderr.split()}
    assert "argparse" in loaded
    assert not loaded & {*HEAVY}


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_every_command_explains_itself(command: Command) -> None:
    ran = run_script(command.name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"usage: ms-ckpt {command.name} ")
    assert all(f"  # {told}\n  {typed}" in ran.out for typed, told in command.examples)


@pytest.mark.parametrize("typed", [typed for command in ALL for typed, _ in command.examples])
def test_examples_parse(typed: str) -> None:
    inside = typed[typed.index("ms-ckpt ") :]
    words = shlex.split(inside.split(" | ")[0].split(" > ")[0].rstrip(')"'))
    assert cli.parser().parse_args(words[1:]).command.name == words[1]


def test_version() -> None:
    assert run("--version") == (0, f"ms-ckpt {__version__}\n", "")


def test_no_command_shows_the_help() -> None:
    ran = run()
    assert (ran.code, ran.out) == (2, "")
    assert "commands:" in ran.err


def test_an_unknown_command_is_a_usage_error() -> None:
    ran = run("inspekt")
    assert (ran.code, ran.out) == (2, "")
    assert "invalid choice: 'inspekt'" in ran.err


def doing(run_: object, *more: str) -> Ran:
    """What `completion` gives if it does something else."""
    made = ALL[-1]._replace(run=run_, json=True)  # type: ignore[arg-type]
    return run("completion", "bash", *more, listed=[made])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("told"), 2),
        (errors.ArgumentTypeError("told"), 2),
        (errors.DiscoveryError("told"), 3),
        (errors.FormatError("told"), 3),
        (errors.StrategyError("told"), 3),
        (errors.CoverageError("told"), 3),
        (errors.StorageError(28, "told"), 4),
        (errors.MissingDependencyError("told"), 5),
        (errors.DecryptionError("told"), 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_are_words_and_codes(error: Exception, code: int) -> None:
    def fail(_: Namespace) -> Answer:
        raise error

    hint = "ms-ckpt completion: a key is given by --dec-key-file or --dec-key-env\n" if code == 6 else ""
    assert doing(fail) == (code, "", f"ms-ckpt completion: error: told\n{hint}")
    ran = doing(fail, "--json")
    assert json.loads(ran.out) == {"error": {"type": type(error).__name__, "message": "told", "exit_code": code}}
    assert "Traceback" in doing(fail, "--verbose").err


def test_a_bug_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = doing(lambda _: 1 / 0)
    assert (ran.code, ran.out) == (70, "")
    assert "Traceback" in ran.err
    assert ran.err.endswith("error in this program, please report it: division by zero\n")


def test_an_answer_gives_lines_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: Namespace) -> Answer:
        return Answer({"a": "ä"}, iter(["one", "two"]), Exit.DIFFERENT)

    assert doing(answer) == (1, "one\ntwo\n", "")
    assert doing(answer, "--json") == (1, '{\n "a": "ä"\n}\n', "")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Namespace) -> Answer:
        raise KeyboardInterrupt

    ran = doing(stop)
    assert (ran.code, ran.out) == (130, "")
    assert "interrupted" in ran.err
    assert "Traceback" not in ran.err


def test_a_reader_that_goes_away_is_no_error(golden: Path) -> None:
    """As `ms-ckpt … | head` does, but surely before the output is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*script(), "inspect", str(golden / "full")],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    pytest.importorskip("shtab", reason="completion scripts are made by shtab, which this environment lacks")
    ran = run("completion", shell)
    assert (ran.code, ran.err) == (0, "")
    assert all(command.name in ran.out for command in ALL)


def test_bash_completes_commands(tmp_path: object) -> None:
    pytest.importorskip("shtab", reason="completion scripts are made by shtab, which this environment lacks")
    ask = (
        "COMP_WORDS=(ms-ckpt compl); COMP_CWORD=1; COMP_LINE='ms-ckpt compl'; COMP_POINT=13; "
        '_shtab_ms_ckpt ms-ckpt compl ms-ckpt; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc"], input=run("completion", "bash").out + ask, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["completion"], "")


def test_the_module_runs_too() -> None:
    command = [sys.executable, "-m", "ms_ckpt_ext", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (0, f"ms-ckpt {__version__}\n")
