"""Mistakes on the command line: a message, an exit code, and nothing written."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import environment, fine, run, run_script, script

ZERO = "dp2_tp4_zero"


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "nothing"),
        ("plan", "nothing", "none"),
        ("diff-strategy", "nothing", "nothing"),
        ("merge", "nothing", "out"),
        ("reshard", "nothing", "out"),
        ("convert", "nothing", "out"),
        ("encrypt", "nothing", "out", "--enc-key-env", "KEY"),
        ("decrypt", "nothing", "out", "--dec-key-env", "KEY"),
        ("verify", "nothing"),
    ],
    ids=lambda words: words[0],
)
def test_the_installed_script_says_what_is_missing(words: tuple[str, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        [*script(), *words],
        capture_output=True,
        text=True,
        env=environment(KEY="0123456789abcdef"),
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"ms-ckpt {words[0]}: error: ")
    assert "'nothing'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("refuses", "told"),
    [
        (
            OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
            "of memory: Cannot allocate memory; use fewer threads",
        ),
        (MemoryError(), "cannot merge: Cannot allocate memory; use fewer threads or smaller buffers"),
    ],
    ids=["of the system", "of Python"],
)
def test_lack_of_memory_is_no_error_of_the_program(
    refuses: Exception, told: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise refuses

    if isinstance(refuses, OSError):
        monkeypatch.setattr(mmap, "mmap", refuse)
    else:
        monkeypatch.setattr(os, "preadv", refuse)
    strategy = golden / ZERO / "strategy.ckpt"
    ran = run("merge", golden / ZERO / "shards", tmp_path / "out", "--strategy", strategy, "--workers", 1)
    assert (ran.code, ran.out) == (4, "")
    assert "ms-ckpt merge: error: " in ran.err and told in ran.err
    assert "Traceback" not in ran.err and "report" not in ran.err
    assert not (tmp_path / "out").exists()


SECRET = "S3cretS3cretS3c!"
HEX = SECRET.encode().hex()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("inspect", "full", "--dec-key", SECRET), 2, "unrecognized arguments: --dec-key; did you mean --dec-key-"),
        (("inspect", "full", f"--dec-key={SECRET}"), 2, "unrecognized arguments: --dec-key; did you mean --dec-key-"),
        (("inspect", "full", f"-k{SECRET}"), 2, "unrecognized arguments: -k"),
        (("inspect", "full", "--dec-mode", SECRET), 2, "argument --dec-mode: no such mode; choose one of AES-GCM, "),
        (("merge", "full", "out", "--dec-mode", SECRET), 2, "argument --dec-mode: no such mode; choose one of "),
        (("encrypt", "full", "out", "--enc-mode", SECRET), 2, "argument --enc-mode: no such mode; choose one of "),
        (("inspect", "full", "--dec-key-env", f"hex:{HEX}"), 2, "put the key into a variable"),
        (("inspect", "full", "--dec-key-env", f"hex:{HEX}", "--json"), 2, "put the key into a variable"),
        (("inspect", "full", "--dec-key-file", f"hex:{HEX}"), 4, "write the key into a file"),
        (("inspect", "full", "--dec-key-file", SECRET, "--json"), 4, "write the key into a file"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_repeated(
    words: tuple[str, ...], code: int, told: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden)
    ran = run(*words)
    assert ran.code == code and told in ran.err
    assert not any(secret in ran.out + ran.err for secret in (SECRET, HEX))


def test_an_unknown_option_names_its_command(golden: Path) -> None:
    ran = run("reshard", golden / "full", "out", "--to-strategi", "x.ckpt")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: ms-ckpt reshard ")
    assert ran.err.endswith(
        "ms-ckpt reshard: error: unrecognized arguments: --to-strategi; did you mean --to-strategy?\n"
    )


@pytest.mark.parametrize(
    "words", [("inspect", "full"), ("inspect", "full", "--json"), ("inspect", "nothing", "--json")]
)
def test_a_full_device_is_no_traceback(golden: Path, words: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*script(), *words],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd=golden,
            check=False,
            text=True,
        )
    assert done.returncode == 4
    assert done.stderr.endswith("ms-ckpt: error: cannot write to standard output: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_a_closed_output_is_no_error(golden: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *script(), "inspect", str(golden / "full")],
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_show_a_sign(golden: Path, tmp_path: Path) -> None:
    """A terminal without the signs of a tree, and a name that is no text in any encoding."""
    ran = run_script("inspect", golden / "full", "--tree", PYTHONIOENCODING="ascii")
    assert (ran.code, ran.err) == (0, "")
    assert "\\u2514" in ran.out
    odd = os.path.join(os.fsencode(tmp_path), b"\xff.safetensors")
    shutil.copy(golden / "full" / "model.safetensors", odd)
    done = subprocess.run([*script(), "inspect", odd], capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\udcff.safetensors: a checkpoint file" in done.stdout


def test_ctrl_c_in_an_import_that_turns_it_into_another_error() -> None:
    """As numpy's does: C code that finds no array API raises an ImportError of its own."""
    code = (
        "import os, signal, sys; from ms_ckpt_ext.cli import main as cli\n"
        "def importing(_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT); signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    raise ImportError('failed to import')\n"
        "made = cli.commands()[-1]._replace(run=importing); cli.commands = lambda _: [made]\n"
        "sys.exit(cli.main(['completion', 'bash']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    assert done.stderr == "\nms-ckpt: interrupted; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("merge", "SRC", ""), "dst is needed here: give a path"),
        (("merge", "", "out"), "src is needed here: give a path"),
        (("merge", "SRC", "SRC/rank_3", "--strategy", "OWN"), "rank_3' is a rank folder of the source"),
        (("merge", "SRC", "out", "--workers", "0"), "argument --workers: '0' is no number of at least 1"),
        (("verify", "SRC", "--strategy", "OWN", "--match", "nothing.*"), "no parameter is left by match ['nothing.*']"),
        (("verify", "FULL", "FULL", "--match", "nothing.*"), "no parameter is left by match ['nothing.*']"),
        (("diff-strategy", "OWN", "TP4", "--exclude", "*"), "no parameter is left by match [] and exclude ['*']"),
        (("plan", "FULL", "none", "--bucket", "1"), "bucket_bytes must be at least 4096, got 1"),
        (("plan", "FULL", "none", "--prefetch", "-1"), "prefetch must be at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_arguments(words: tuple[str, ...], told: str, golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / ZERO / "shards", tmp_path / "src")
    places = {"OWN": golden / ZERO / "strategy.ckpt", "TP4": golden / "tp4" / "strategy.ckpt", "FULL": golden / "full"}
    before = sorted(tmp_path.rglob("*"))
    ran = run(*(places.get(word, word.replace("SRC", str(tmp_path / "src"))) for word in words))
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reshard_beside_shards_of_another_name_is_refused(golden: Path, tmp_path: Path) -> None:
    for rank in range(8):
        (tmp_path / f"rank_{rank}").mkdir()
        shutil.copy(
            golden / ZERO / "shards" / f"rank_{rank}" / "net.safetensors", tmp_path / f"rank_{rank}" / "a.safetensors"
        )
    own, other = golden / ZERO / "strategy.ckpt", golden / "tp4" / "strategy.ckpt"
    for words in ((), ("--rank", "1")):
        ran = run("reshard", tmp_path, tmp_path, "--strategy", own, "--to-strategy", other, *words)
        assert (ran.code, ran.out) == (2, "")
        assert "is a rank folder of the source" in ran.err


def test_a_shape_that_cannot_be_cut_is_named(golden: Path, tmp_path: Path) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text('{"head.weight": {"dtype": "F32", "shape": [97, 24]}}')
    ran = run("plan", "none", golden / ZERO / "strategy.ckpt", "--shapes", shapes)
    assert (ran.code, ran.out) == (3, "")
    assert "parameter 'head.weight': axis 0 of shape [97, 24] cannot be cut into 8 equal parts" in ran.err


def test_inspect_says_that_nothing_is_like_this(golden: Path) -> None:
    assert fine("inspect", golden / "full", "--match", "nothing.*").endswith("no parameters\n")


def test_strategy_files_are_not_hidden_files(golden: Path, tmp_path: Path) -> None:
    """A directory that was merged into holds a hidden JSON file, which is no strategy."""
    (tmp_path / ".ms_ckpt_ext.json").write_text("{}")
    ran = run("diff-strategy", tmp_path, golden / "tp4" / "strategy.ckpt")
    assert (ran.code, ran.out) == (3, "")
    assert "holds no .ckpt or .json file" in ran.err
