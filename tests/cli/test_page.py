"""docs/cli.md: every command of it is run, and prints what the page says; times and rates aside."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.cli import main as cli
from ms_ckpt_ext.cli.command import Exit
from tests.support.command_line import ROOT, environment, run

TEXT = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
CHANGE = """\
import json, struct, sys
with open(sys.argv[1], "r+b") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    at = 8 + length + json.loads(file.read(length))["head.weight"]["data_offsets"][0] + 400
    file.seek(at)
    (bits,) = struct.unpack("<I", file.read(4))
    file.seek(at)
    file.write(struct.pack("<I", bits ^ 4))
"""
LAYER = "layers.{layer}."
RENAMED = {
    "model.embed_tokens.weight": "tok_embeddings.embedding_weight",
    "lm_head.weight": "head.weight",
    f"model.{LAYER}norm.weight": f"{LAYER}norm",
    f"model.{LAYER}attn.bias": f"{LAYER}wqkv.bias",
    **{f"model.{LAYER}{part}.weight": f"{LAYER}{part}.weight" for part in ("w1", "w2", "wo", "wqkv")},
}
RULES = {
    "title": "the small model of the golden files",
    "bounds": {"layer": "layers"},
    "rules": [{"rule": "Rename", "sources": name, "target": held} for name, held in RENAMED.items()],
}
SHELL = re.compile(r"[|>&;]")
TIMES = re.compile(r"\d+\.\d s \([\d.]+ \w+/s\)")


class Said(NamedTuple):
    """A command of the page, and what the page says it prints."""

    command: str
    output: str


def said() -> Iterator[Said]:
    for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield Said(command, output)


@pytest.fixture
def folder(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page starts from."""
    shutil.copytree(golden / "formats_dp2_tp4" / "safetensors", tmp_path / "checkpoint")
    shutil.copy(golden / "formats_dp2_tp4" / "strategy.ckpt", tmp_path / "strategy_8p.ckpt")
    shutil.copy(golden / "tp4" / "strategy.ckpt", tmp_path / "strategy_4p.ckpt")
    (tmp_path / "own_rules.json").write_text(json.dumps(RULES))
    (tmp_path / "change_one_weight.py").write_text(CHANGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_prints_what_the_page_says(folder: Path) -> None:
    code = 0
    for command, output in said():
        if command == "echo $?":
            printed = f"{code}\n"
        elif command.startswith("ms-ckpt ") and not SHELL.search(command):
            ran = run(*shlex.split(command)[1:])
            code, printed = ran.code, ran.out + ran.err
        else:
            command = command.replace("python3", shlex.quote(sys.executable))
            done = subprocess.run(
                ["bash", "-c", command], capture_output=True, text=True, env=environment(), check=True
            )
            code, printed = done.returncode, done.stdout
        assert TIMES.sub("T", _plain(printed)) == TIMES.sub("T", output), command


def _plain(text: str) -> str:
    """Free space is another one everywhere."""
    return re.sub(r"^  free .*\n", "", text, flags=re.MULTILINE)


def test_every_command_and_exit_code_is_there() -> None:
    commands = {command.split()[1] for command, _ in said() if command.startswith("ms-ckpt")}
    assert commands | {"plan", "measure", "completion"} == {command.name for command in cli.commands()}
    assert all(f"| {code.value} | {code.meaning} |\n" in TEXT for code in Exit)


def test_functions_have_the_names_of_commands() -> None:
    for command in cli.commands():
        if command.name != "completion":
            assert callable(getattr(ms_ckpt_ext, command.name.replace("-", "_")))
