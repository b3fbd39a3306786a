"""`merge`, `reshard`, `convert`, `encrypt`, `decrypt`: results on golden cases, dry runs, keys, and interruptions."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.engine.files.dry_run import Preview
from ms_ckpt_ext.errors import UsageError
from tests.support.checkpoints import shard, source, tree
from tests.support.command_line import as_json, environment, fine, run, run_script, script

KEY = "0123456789ABCDEF"


@pytest.fixture
def case(golden: Path) -> tuple[Path, Path]:
    """Rank folders and their strategy."""
    return golden / "dp2_tp4_zero" / "shards", golden / "dp2_tp4_zero" / "strategy.ckpt"


def same(a: Path, b: Path, *options: Any) -> bool:
    found = as_json("verify", a, b, *options)
    return bool(found["ok"]) and found["parameters"] == 42


def test_merge(case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    shards, strategy = case
    done = as_json("merge", shards, tmp_path / "merged", "--strategy", strategy)
    assert (done["published"], done["files_written"], done["files_kept"]) == (True, ["part0.safetensors"], [])
    assert done["bytes_written"] == (tmp_path / "merged" / "part0.safetensors").stat().st_size
    assert (done["bytes_read"], done["reads"]) == (190944, 8)
    assert same(tmp_path / "merged", golden / "full")
    again = as_json("merge", shards, tmp_path / "merged", "--strategy", strategy)
    assert (again["published"], again["files_written"], again["files_kept"]) == (True, [], ["part0.safetensors"])
    assert again["bytes_read"] == again["bytes_written"] == 0


def test_merge_in_shares_and_parts(case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    words = ["merge", case[0], tmp_path / "hf", "--strategy", case[1], "--naming", "huggingface"]
    words += ["--part-size", "40K", "--exclude", "adam_*"]
    first = as_json(*words, "--share", "1/2")
    assert not first["published"] and first["missing"] and first["files_written"]
    again = as_json(*words, "--share", "1/2")
    assert (again["published"], again["missing"]) == (False, first["missing"])
    assert (again["files_written"], again["files_kept"]) == ([], first["files_written"])
    last = as_json(*words, "--share", "2/2")
    assert (last["published"], last["missing"], last["files_written"]) == (True, [], first["missing"])
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    found = as_json("verify", tmp_path / "hf", golden / "full", "--exclude", "adam_*")
    assert (found["ok"], found["parameters"]) == (True, 14)


def test_parts_of_a_merged_one_are_cut_anew(golden: Path, tmp_path: Path) -> None:
    assert len(as_json("merge", golden / "full", tmp_path / "parts", "--part-size", "50K")["files_written"]) > 1
    assert same(tmp_path / "parts", golden / "full")


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_reshard(form: str, case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    target = golden / "tp4" / "strategy.ckpt"
    words = ["reshard", case[0], tmp_path / "out", "--strategy", case[1], "--to-strategy", target, "--to", form]
    assert len(as_json(*words)["files_written"]) == 4
    assert same(tmp_path / "out", golden / "tp4" / "shards", "--strategy", target, "--strategy-b", target)


def test_reshard_one_rank(case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    words = ["reshard", case[0], tmp_path / "out", "--strategy", case[1]]
    words += ["--to-strategy", golden / "tp4" / "strategy.ckpt", "--rank"]
    assert len(as_json(*words, 2)["files_written"]) == 1
    assert same(shard(tmp_path / "out" / "rank_2"), shard(golden / "tp4" / "shards" / "rank_2"))
    assert "rank must be between 0 and 3" in run(*words, 4).err


def test_convert_there_and_back(golden: Path, tmp_path: Path) -> None:
    root = golden / "formats_dp2_tp4"
    strategy = ["--strategy", root / "strategy.ckpt", "--strategy-b", root / "strategy.ckpt"]
    fine("convert", root / "ckpt", tmp_path / "st", "--to", "safetensors")
    fine("convert", tmp_path / "st", tmp_path / "back", "--to", "ckpt", "--crc")
    found = as_json("verify", tmp_path / "back", root / "safetensors", *strategy)
    assert (found["ok"], found["parameters"]) == (True, 49)


def test_encrypt_and_decrypt(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_text(f"hex:{KEY.encode().hex()}\n")
    fine("encrypt", golden / "full", tmp_path / "sealed", "--enc-key-file", key)
    assert run("inspect", tmp_path / "sealed").code == 6
    assert same(tmp_path / "sealed", golden / "full", "--dec-key-file", key)
    assert same(golden / "full", tmp_path / "sealed", "--dec-key-file-b", key)
    monkeypatch.setenv("NET_KEY", KEY)
    fine("decrypt", tmp_path / "sealed", tmp_path / "plain", "--dec-key-env", "NET_KEY")
    assert tree(tmp_path / "plain") == {"model.safetensors": (golden / "full" / "model.safetensors").read_bytes()}
    monkeypatch.setenv("NET_KEY", KEY[::-1])
    ran = run("decrypt", tmp_path / "sealed", tmp_path / "again", "--dec-key-env", "NET_KEY")
    assert (ran.code, ran.out, (tmp_path / "again").exists()) == (6, "", False)
    assert KEY[::-1] not in ran.err


def test_a_key_is_needed(golden: Path, tmp_path: Path) -> None:
    ran = run("encrypt", golden / "full", tmp_path / "sealed")
    assert (ran.code, ran.out) == (2, "")
    assert "MS_CKPT_EXT_ENC_KEY" in ran.err


@pytest.mark.parametrize("command", ["merge", "reshard", "convert", "encrypt", "decrypt", "verify", "inspect"])
def test_no_command_takes_a_key_itself(command: str) -> None:
    options = [word.strip(",") for word in run(command, "--help").out.split() if word.startswith("--")]
    assert {option for option in options if "key" in option} <= {
        f"--{verb}-key-{how}{whose}" for verb in ("dec", "enc") for how in ("file", "env") for whose in ("", "-b")
    }


# --- dry runs


def test_a_dry_run_tells_what_the_job_then_does(case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    """Its numbers are those of the report, and nothing is made."""
    shards, strategy = case
    layout = golden / "dp2_tp2" / "strategy.ckpt"
    jobs = {
        "merge": ["--strategy", strategy, "--part-size", "50K"],
        "reshard": ["--strategy", strategy, "--to-strategy", layout],
        "convert": ["--to", "ckpt"],
    }
    for command, options in jobs.items():
        words = [command, shards, tmp_path / command, *options]
        told = as_json(*words, "--dry-run")
        assert told.pop("dry_run") is True
        assert not (tmp_path / command).exists()
        done = as_json(*words)
        assert done.pop("dry_run") is False
        assert done == {**{key: told[key] for key in done}, "published": True}
        assert sum(told["sources"].values()) == done["bytes_read"]
        sizes = {name: (tmp_path / command / name).stat().st_size for name in told["sizes"]}
        assert sizes == told["sizes"]
        again = as_json(*words, "--dry-run")
        assert (again["published"], again["files_written"]) == (True, [])
        assert "already holds this result, complete" in fine(*words, "--dry-run")


def test_a_dry_run_in_words(case: tuple[Path, Path], tmp_path: Path) -> None:
    out = fine("merge", case[0], tmp_path / "m", "--strategy", case[1], "--dry-run").splitlines()
    assert out[:3] == [
        "Dry run: nothing was written",
        "  read    186.5 KiB in 8 reads",
        f"  write   190.1 KiB to {tmp_path / 'm'}",
    ]
    assert f"{case[0] / 'rank_0' / 'net.safetensors'}  23.3 KiB" in out
    assert out[-2:] == ["to                     bytes", "part0.safetensors  190.1 KiB"]


def test_dry_runs_of_the_functions(golden: Path, tmp_path: Path) -> None:
    options = {"enc_key": KEY.encode(), "dry_run": True}
    found = ms_ckpt_ext.encrypt(golden / "full", tmp_path / "out", **options)
    assert isinstance(found, Preview)
    assert found.sizes["model.safetensors"] > found.bytes_read > 0
    with pytest.raises(UsageError, match="to must be one of"):
        ms_ckpt_ext.merge(golden / "full", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


# --- as a user would

STUMBLES = [
    (["merge", "shards", "out"], 3, "the strategy that cut them is needed"),
    (["merge", "shards", "out", "--strategy", "other.ckpt"], 3, "is for 4 ranks, but the checkpoint has"),
    (["merge", "nothing", "out"], 3, "no such file or directory"),
    (["merge", "shards", "shards", "--share", "3/2"], 2, "is no share"),
    (["merge", "full", "out", "--part-size", "huge"], 2, "is no size"),
    (["merge", "full", "out", "--exclude", "*"], 2, "no parameter is left by match"),
    (["merge", "full", "out", "--part-size", "1.5G"], 2, "is no size: give bytes, or a whole number with K, M or G"),
    (["merge", "full", "file/out"], 4, "cannot write into"),
    (["reshard", "full", "out", "--to-strategy", "full/model.safetensors"], 3, "not a strategy file"),
    (["reshard", "full", "out", "--to-strategy", "layout.ckpt"], 3, "layout.ckpt"),
    (["convert", "full", "out", "--to", "onnx"], 2, "invalid choice: 'onnx'"),
    (["convert", "empty", "out"], 3, "holds no checkpoint file to convert"),
    (["decrypt", "full", "out"], 2, "dec_key is needed"),
    (["encrypt", "full", "out", "--enc-key-file", "a", "--enc-key-env", "B"], 2, "not allowed with argument"),
]


@pytest.mark.parametrize(("words", "code", "told"), STUMBLES, ids=[" ".join(row[0]) for row in STUMBLES])
def test_mistakes_are_told_in_one_line(
    words: list[str], code: int, told: str, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full").symlink_to(golden / "full")
    (tmp_path / "shards").symlink_to(golden / "dp2_tp4" / "shards")
    (tmp_path / "other.ckpt").symlink_to(golden / "dp2_tp2" / "strategy.ckpt")
    (tmp_path / "layout.ckpt").write_bytes(b"\x08\x01nonsense")
    ran = run(*words)
    assert (ran.code, ran.out) == (code, ""), ran
    assert told in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].startswith(f"ms-ckpt {words[0]}: error: ")
    assert not (tmp_path / "out").exists()


def test_the_installed_script_merges_and_reshards(case: tuple[Path, Path], golden: Path, tmp_path: Path) -> None:
    ran = run_script("merge", case[0], tmp_path / "m", "--strategy", case[1])
    assert (ran.code, ran.err) == (0, "")
    target = golden / "tp4" / "strategy.ckpt"
    ran = run_script("reshard", tmp_path / "m", tmp_path / "r", "--to-strategy", target)
    assert (ran.code, ran.err) == (0, "")
    assert same(tmp_path / "r", golden / "tp4" / "shards", "--strategy", target, "--strategy-b", target)


def test_ctrl_c_leaves_a_job_that_goes_on(tmp_path: Path) -> None:
    """The signal comes when the first bytes are written."""
    root = source(tmp_path / "source", rows=1 << 16)
    words = ["merge", root / "shards", tmp_path / "out", "--strategy", root / "strategy.ckpt", "--part-size", "1M"]
    running = subprocess.Popen(
        [*script(), *map(str, words), "--buffer", "64K", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    staged = tmp_path / "out"
    deadline = time.monotonic() + 60
    while not list(staged.glob(".ms_ckpt_ext/*/*")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert "Traceback" not in err
    assert running.returncode in (0, 130)  # 0: it was faster than the signal
    if running.returncode == 130:
        assert (out, err) == ("", "\nms-ckpt: interrupted; run the same command again to go on\n")
        assert not list(staged.glob("*.safetensors"))
    fine(*words, "--buffer", "64K")
    found = as_json("verify", root / "shards", staged, "--strategy", root / "strategy.ckpt")
    assert (found["ok"], found["parameters"]) == (True, 6)
