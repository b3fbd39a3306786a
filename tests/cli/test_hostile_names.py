"""Names of parameters and files that attack the terminal, or the code that sorts, folds and counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from safetensors.numpy import save_file

from ms_ckpt_ext.cli import words
from ms_ckpt_ext.cli.main import main
from ms_ckpt_ext.cli.records import json_text
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.groups import natural
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.weight_rules import Stack
from ms_ckpt_ext.engine.source.catalog import whole_tensor
from ms_ckpt_ext.errors import CoverageError, UsageError
from ms_ckpt_ext.formats.index import TensorEntry
from tests.support.damage import memory_limit, time_limit

NAMES = [
    "\x1b[2J\x1b[1;1Hroot@host:~# ",
    "\x1b]0;title\x07",
    "\x9b31mred",
    "\u202egnp.exe",
    "w\r0 faults",
    "w\nfault: none",
    "\x7f\x08\x08",
    "\u2028",
    "\x1b[0m",
    "e\u0301",
    "\u00e9",
    "W",
    "w",
    "w ",
    "w.",
    "CON",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "9" * 5000 + ".w",
    "layers." + "8" * 4400 + ".w",
    "layers.1.w",
    "layers.01.w",
    "layers.\u0661.w",
    "layers.\u00b2.w",
    ".".join("a" * 5000),
    "x" * 60_000,
    "<script>alert(1)</script>",
    "{layer}",
    "%s%n",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("names") / "\x1b[31mnet.safetensors"
    save_file({name: np.full((2, 2), n, np.float32) for n, name in enumerate(NAMES)}, path)
    return path


LINES: dict[str, Callable[[Path, Path], list[str]]] = {
    "inspect": lambda file, out: ["inspect", str(file), "--all"],
    "inspect --tree": lambda file, out: ["inspect", str(file), "--tree"],
    "inspect --json": lambda file, out: ["inspect", str(file), "--json"],
    "convert": lambda file, out: ["convert", str(file), str(out / "net.ckpt"), "--no-sync", "--verbose"],
    "convert --dry-run": lambda file, out: ["convert", str(file), str(out / "net.ckpt"), "--dry-run"],
    "verify": lambda file, out: ["verify", str(file), str(file)],
    "no such file": lambda file, out: ["inspect", f"{file}\x1b[2J"],
    "no such file --verbose": lambda file, out: ["inspect", f"{file}\x1b[2J", "--verbose"],
    "a bad argument": lambda file, out: ["inspect", str(file), "--match"],
}


@pytest.mark.parametrize("line", LINES)
def test_a_terminal_shows_what_a_name_is(line: str, file: Path, tmp_path: Path, capsys: Any) -> None:
    with time_limit(), memory_limit(64 << 20):
        assert main(LINES[line](file, tmp_path)) in (0, 1, 2, 3, 4)
    told = capsys.readouterr()
    for text in (told.out, told.err):
        odd = {each for each in text if not each.isprintable()} - {"\n", "\t"}
        assert not odd, odd
    if line == "inspect --json":
        assert [each["name"] for each in json.loads(told.out)["parameters"]] == sorted(NAMES, key=natural)
    if line == "inspect":
        assert "\\x1b[2J" in told.out and "w\\nfault: none" in told.out and "fault: none" not in told.out.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_as_they_were(name: str) -> None:
    text = json_text({name: [name, {"inner": name}]})
    assert json.loads(text) == {name: [name, {"inner": name}]}
    assert all(each.isprintable() or each == "\n" for each in text)


@pytest.mark.parametrize("sign", ["\U0001f600", "\U000e0001", "\ud800", "\u4e2d"])
def test_signs_of_two_units(sign: str) -> None:
    assert json.loads(json_text([sign])) == [sign]


def test_colours_of_ours_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert words.visible("\x1b[1mw\x1b[0m") == "\\x1b[1mw\\x1b[0m"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert words.visible(words.style("w\x1b[2J", "bold")) == "\x1b[1mw\\x1b[2J\x1b[0m"


@pytest.mark.parametrize("name", NAMES)
def test_names_are_sorted_folded_and_matched(name: str) -> None:
    with time_limit(), memory_limit(16 << 20):
        assert sorted([name, "w"], key=natural)
        assert words.folded({name: "", "layers.3.w": ""})
        found = Pattern("layers.{n<8}.w").match(name)
        assert (found is None) == (name not in ("layers.1.w", "layers.01.w"))


def test_the_number_of_a_tensor_is_not_how_many_there_are() -> None:
    """A stack lacks the numbers below its first, and the error does not count to a quintillion."""
    entry = TensorEntry(DTYPES["F32"], (2,), ())
    tensors = {f"e.{n}.w": whole_tensor(f"e.{n}.w", entry, [0]) for n in (0, 1, 10**17)}
    with time_limit(), memory_limit(1 << 20), pytest.raises(CoverageError, match=r"for 2, 3, 4, 5, 6: check"):
        Stack(["e.{n}.w"], "all").members(tensors)


def test_two_names_of_one_number() -> None:
    entry = TensorEntry(DTYPES["F32"], (2,), ())
    tensors = {name: whole_tensor(name, entry, [0]) for name in ("e.0.w", "e.1.w", "e.01.w")}
    with pytest.raises(UsageError, match=r"'e\.1\.w' and 'e\.01\.w' are both number 1"):
        Stack(["e.{n}.w"], "all").members(tensors)
