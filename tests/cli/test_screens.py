"""Whole screens of every command, as the files in `screens/` have them; places, times and rates aside.

What commands find is compared as data in the other modules. After a change that is meant, look at what
`python -m tests.cli.test_screens` wrote.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import unified_safetensors
from tests.support.checkpoints import source
from tests.support.command_line import ROOT, run

SCREENS = Path(__file__).with_name("screens")
GOLDEN = ROOT / "tests" / "data" / "golden"
MASKS = [
    (re.compile(r"\d+\.\d s \([\d.]+ \w+/s\)"), "TIME"),
    (re.compile(r"^  free .*\n", re.MULTILINE), ""),  # another one everywhere
    (re.compile(r"\b[0-9a-f]{32}\b"), "d" * 32),
]

# Name of the screen -> exit code and command line, in a folder as `prepare` leaves it.
COMMANDS = {
    "inspect": (
        0,
        "inspect golden/dp2_tp4/shards --strategy golden/dp2_tp4/strategy.ckpt --match layers.0.w?.weight",
    ),
    "inspect-tree": (0, "inspect golden/full --tree --exclude adam_*"),
    "inspect-without-strategy": (0, "inspect golden/formats_dp2_tp4/ckpt"),
    "inspect-strategy": (0, "inspect golden/tp4_pp2/strategy_stages --match layers.0.*"),
    "inspect-encrypted": (0, "inspect golden/formats_dp2_tp4/ckpt_aes_gcm --dec-key-file key --match head.*"),
    "diff-strategy": (
        1,
        "diff-strategy golden/dp2_tp4_zero/strategy.ckpt golden/tp4_pp2/strategy.ckpt --match layers.*",
    ),
    "diff-strategy-same": (0, "diff-strategy golden/tp4/strategy.ckpt golden/tp4/strategy.ckpt"),
    "verify": (0, "verify golden/dp2_tp4/shards golden/full --strategy golden/dp2_tp4/strategy.ckpt"),
    "verify-different": (1, "verify shards other.safetensors --strategy strategy.ckpt"),
    "verify-itself": (
        0,
        "verify golden/dp2_tp4/shards --strategy golden/dp2_tp4/strategy.ckpt --match head.*",
    ),
    "verify-faulty": (1, "verify lacking --strategy strategy.ckpt"),
    "verify-manifest": (0, "verify merged --manifest"),
    "verify-damaged": (1, "verify damaged --manifest"),
    "verify-unchecked": (1, "verify sealed --manifest"),
    "merge": (0, "merge shards out --strategy strategy.ckpt"),
    "merge-again": (0, "merge shards merged --strategy strategy.ckpt"),
    "merge-share": (0, "merge shards out --strategy strategy.ckpt --part-size 8K --share 1/2"),
    "merge-dry-run": (0, "merge shards out --strategy strategy.ckpt --dry-run"),
    "reshard": (0, "reshard merged out --to-strategy strategy.ckpt"),
    "export": (0, "export shards out --rules rules.json --strategy strategy.ckpt"),
    "export-unnamed": (2, "export shards out --rules few.json --strategy strategy.ckpt"),
    "reshard-rules": (0, "reshard merged out --rules back.json --set layers=1"),
    "convert": (0, "convert merged out --to ckpt --crc"),
    "encrypt": (0, "encrypt merged out --enc-key-file key"),
    "decrypt": (0, "decrypt sealed out --dec-key-file key"),
}


def prepare(here: Path) -> None:
    """A source under dp2 tp2, what was made of it, and what was changed in that."""
    source(here)
    (here / "golden").symlink_to(GOLDEN)
    (here / "key").write_text("0123456789ABCDEF")
    renames = [{"rule": "Rename", "sources": f"model.{name}", "target": f"{name}.w"} for name in "abcd"]
    turned = [{"rule": "Stack", "sources": ["a.w", "b.w"], "target": "{=layers}.ab"}]
    (here / "back.json").write_text(json.dumps({"rules": turned}))
    (here / "rules.json").write_text(json.dumps({"rules": renames}))
    (here / "few.json").write_text(json.dumps({"rules": renames[:3]}))
    unified_safetensors(here / "shards", here / "strategy.ckpt", here / "merged")
    arrays = load_file(here / "merged" / "part0.safetensors")
    shutil.copytree(here / "merged", here / "damaged")
    raw = bytearray((here / "damaged" / "part0.safetensors").read_bytes())
    raw[-1] ^= 1
    (here / "damaged" / "part0.safetensors").write_bytes(raw)
    assert run("encrypt", here / "merged", here / "sealed", "--enc-key-file", here / "key").code == 0
    arrays["a.w"][3, 4] = np.nan
    arrays["b.w"] = arrays["b.w"].astype(np.float16)
    del arrays["d.w"]
    save_file(arrays, here / "other.safetensors")
    shutil.copytree(here / "shards", here / "lacking")
    for rank in (0, 2, 3):
        (path,) = (here / "lacking" / f"rank_{rank}").iterdir()
        held = load_file(path)
        held["d.w"] = held["d.w"] + (rank == 3)
        if rank != 3:
            del held["b.w"]
        save_file(held, path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("screens") / "here"
    prepare(here)
    return here


def screen(name: str) -> tuple[int, str]:
    """The exit code of a command, and all that it printed, errors last."""
    shutil.rmtree("out", ignore_errors=True)
    ran = run(*COMMANDS[name][1].split())
    text = ran.out + ran.err
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    return ran.code, text


@pytest.mark.parametrize("name", COMMANDS)
def test_a_screen(name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(prepared)
    code, text = screen(name)
    assert text == (SCREENS / f"{name}.txt").read_text(encoding="utf-8")
    assert code == COMMANDS[name][0]


def test_there_is_a_screen_for_every_command() -> None:
    from ms_ckpt_ext.cli import main as cli

    typed = {words.split()[0] for _, words in COMMANDS.values()}
    assert typed | {"plan", "measure", "completion"} >= {
        command.name for command in cli.commands()
    }  # tested on their own
    assert {path.stem for path in SCREENS.glob("*.txt")} == {*COMMANDS}


if __name__ == "__main__":
    import os

    os.environ["COLUMNS"] = "100"
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder, "here"))
        os.chdir(Path(folder, "here"))
        for each in COMMANDS:
            (SCREENS / f"{each}.txt").write_text(screen(each)[1], encoding="utf-8")
        os.chdir(ROOT)
    sys.exit(0)
