"""`ms-ckpt plan`: its words, its JSON, its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import plan
from ms_ckpt_ext.api.convert import encrypt
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.formats.strategies.file import load_strategy, save_strategy
from tests.support.command_line import as_json, fine, run, run_script


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """shapes.json, train.ckpt (dp4 tp2 pp2 zero) and serve.ckpt (tp4) of one model."""
    names = [f"{state}layers.{n}.w" for n in range(4) for state in ("", "adam_m.")]
    for path, parts, shard in (("train.ckpt", (4, 2), (1, -1)), ("serve.ckpt", (1, 4), (0, 0))):
        stages = 2 if path == "train.ckpt" else 1
        items = [
            LayoutItem(n, i * stages // len(names), Layout(parts, ((0,), ()), *shard)) for i, n in enumerate(names)
        ]
        save_strategy(Strategy.from_items(items, path), tmp_path / path)
    described = {name: {"dtype": "BF16", "shape": [512, 256]} for name in names}
    (tmp_path / "shapes.json").write_text(json.dumps({**described, "global_step": {"dtype": "Int32", "shape": [1]}}))
    return tmp_path


def test_text(golden: Path) -> None:
    source = golden / "dp2_tp4_zero"
    ran = run_script(
        "plan", source / "shards", golden / "dp3_tp8/strategy.ckpt", "--src-strategy", source / "strategy.ckpt"
    )
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "42 parameters, 186.5 KiB, by 24 ranks"
    assert lines[3] == "  held 1.0 times in the files, wanted 3.1 times"
    (head,) = [line for line in lines if line.startswith("per rank")]
    assert head.split()[2:] == ["least", "mean", "most", "all", "ranks"]
    assert {line.split()[0] for line in lines if line} >= {
        "read,",
        "sent",
        "received",
        "messages",
        "staging",
        "cpu",
        "atlas-a3",
    }


def test_the_source_has_a_strategy_as_in_other_commands(golden: Path) -> None:
    words = ["plan", golden / "tp4" / "shards", "none"]
    own = golden / "tp4" / "strategy.ckpt"
    assert as_json(*words, "--strategy", own) == as_json(*words, "--src-strategy", own)


def test_json_from_shapes(shapes: Path) -> None:
    argv = ["plan", shapes / "train.ckpt", shapes / "serve.ckpt", "--shapes", shapes / "shapes.json"]
    found = as_json(*argv, "--hardware", "cpu", "--hardware", "atlas-a3", "--bucket", "1M")
    assert (found["ranks"], found["files"], found["parameters"]) == (4, 16, 9)
    assert found["unique"] == 8 * 512 * 256 * 2 + 4
    assert found["direct"]["read"]["total"] == 8 * 512 * 256 * 2 + 4 * 4
    assert found["cooperative"]["read"]["total"] == found["unique"]
    assert found["bucket"] == 1 << 20
    assert [machine["profile"] for machine in found["predictions"]] == ["cpu", "atlas-a3"]
    assert sum(each["moved"] for each in found["rounds"]) == found["cooperative"]["sent"]["total"] == 12


def test_without_groups(shapes: Path) -> None:
    argv = ["plan", shapes / "train.ckpt", shapes / "serve.ckpt", "--shapes", shapes / "shapes.json", "--bucket", "8K"]
    with_groups, without = as_json(*argv), as_json(*argv, "--no-groups")
    assert without["groups"] == 0 <= with_groups["groups"]
    assert with_groups["cooperative"]["read"] == without["cooperative"]["read"]


def test_one_device_and_a_page(shapes: Path) -> None:
    page = shapes / "plan.html"
    out = fine("plan", "none", "none", "--shapes", shapes / "shapes.json", "--html", page, "--mode", "direct")
    assert f"page: {page}" in out and "the job asks for direct mode" in out
    assert page.read_text().startswith("<!doctype html>")


def test_dst_strategy_says_what_dst_does(shapes: Path) -> None:
    argv = ["plan", shapes / "train.ckpt", "--shapes", shapes / "shapes.json"]
    assert as_json(*argv, "out/", "--dst-strategy", shapes / "serve.ckpt") == as_json(*argv, shapes / "serve.ckpt")


ROOT = Path(__file__).resolve().parents[2]
TYPED = [
    line.split()[1:] for line in (ROOT / "docs/plan.md").read_text().splitlines() if line.startswith("    ms-ckpt ")
]


@pytest.mark.parametrize("words", TYPED)
def test_commands_of_the_page(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert fine(*words).startswith("42 parameters, 186.5 KiB, by ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["shards", "serve.ckpt"], 3, "does not exist|is not a directory|no such|neither"),
        (["none", "nothing.ckpt", "--shapes", "shapes.json"], 3, "cannot read strategy file"),
        (["none", "serve.ckpt", "--shapes", "none.json"], 4, "cannot read shapes 'none.json'"),
        (["none", "serve.ckpt", "--shapes", "train.ckpt"], 3, "is not JSON"),
        (["train.ckpt", "none", "--shapes", "bad.json"], 2, "parameter 'w' must be like"),
        (["train.ckpt", "none", "--shapes", "list.json"], 2, "must map names to"),
        (["train.ckpt", "none", "--shapes", "other.json"], 2, "lists none of the 1 parameters"),
        (["train.ckpt", "none", "--shapes", "shapes.json", "--src-strategy", "train.ckpt"], 2, "leave --src-strategy"),
        (["train.ckpt", "none", "--shapes", "shapes.json", "--hardware", "abacus"], 2, "no hardware profile 'abacus'"),
        (["train.ckpt", "none", "--shapes", "shapes.json", "--bucket", "much"], 2, "'much' is no size"),
        (["train.ckpt", "none", "--shapes", "shapes.json", "--bucket", "1"], 2, "bucket_bytes must be at least"),
        (["train.ckpt", "none", "--shapes", "shapes.json", "--html", "no/where.html"], 4, "cannot write plan page"),
    ],
)
def test_errors(words: list[str], code: int, message: str, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shapes)
    (shapes / "bad.json").write_text('{"w": {"dtype": "F31", "shape": [4]}}')
    (shapes / "list.json").write_text("[]")
    (shapes / "other.json").write_text('{"w": {"dtype": "F32", "shape": [4]}}')
    ran = run("plan", *words)
    assert (ran.code, ran.out) == (code, "")
    assert re.search(message, ran.err), ran.err


def test_by_the_names_that_the_load_will_use(golden: Path) -> None:
    """The target may be laid out for what the load calls parameters; what it leaves out is not read."""
    source, target = golden / "dp2_tp4/shards", load_strategy(golden / "tp4/strategy.ckpt")
    saved = golden / "dp2_tp4/strategy.ckpt"
    weights = [name for name in target.layouts if not name.startswith("adam_")]
    renamed = target._replace(layouts={f"net.{name}": target.layouts[name] for name in weights})
    plain = plan(source, target, src_strategy=saved)
    how: dict[str, Any] = {"choice_func": lambda name: name in weights and f"net.{name}"}
    found = plan(source, renamed, src_strategy=saved, **how)
    assert found.parameters == len(weights) < plain.parameters
    assert found.unique < plain.unique / 2
    tied = renamed._replace(layouts={**renamed.layouts, "tied": target.layouts[weights[0]]})
    more = plan(source, tied, src_strategy=saved, **how, name_map={"tied": f"net.{weights[0]}"})
    assert more.parameters == found.parameters + 1
    with pytest.raises(UsageError, match="give shapes by the names that are loaded"):
        plan(None, None, shapes={"w": {"dtype": "F32", "shape": [4]}}, **how)


def test_an_encrypted_checkpoint(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("A_KEY", "0123456789abcdef")
    encrypt(golden / "tp4/shards", tmp_path / "sealed", enc_key=b"0123456789abcdef")
    argv = ["plan", tmp_path / "sealed", "none", "--src-strategy", golden / "tp4/strategy.ckpt"]
    assert as_json(*argv, "--dec-key-env", "A_KEY")["unique"] == 190_944
    assert run(*argv).code == 6


def test_a_transfer(shapes: Path, tmp_path: Path) -> None:
    """Two copies of four slices in two stages of eight ranks, to four: on the same ranks, and on others."""
    arguments = ("plan", shapes / "train.ckpt", shapes / "serve.ckpt", "--transfer", "--shapes", shapes / "shapes.json")
    ran = run_script(*arguments, "--html", tmp_path / "page.html")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "9 parameters, 2.0 MiB, by 16 ranks"
    assert lines[1].endswith(", 16 ranks")
    assert {line.split("  ")[0] for line in lines} >= {"wanted", "held already", "sent", "received", "predicted time"}
    assert not any(line.startswith("read") for line in lines)
    assert "Transfer of" in (tmp_path / "page.html").read_text()
    told, apart = (as_json(*arguments, *more) for more in ((), ("--other-ranks",)))
    assert told["direct"]["wanted"]["total"] == told["kept"]["total"] + told["cooperative"]["received"]["total"]
    assert apart["kept"]["total"] == 0
    assert apart["cooperative"]["received"]["total"] == apart["direct"]["wanted"]["total"]
    assert apart["ranks"] == 20
    assert run("plan", "src", "dst", "--transfer").code != 0
    assert run("plan", shapes / "train.ckpt", "none", "--other-ranks", "--shapes", shapes / "shapes.json").code != 0
