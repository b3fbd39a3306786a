"""The launchers' settings: files, options, what is run. That the ranks then load is tested with the pages of docs/."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext.cli import launch, settings
from ms_ckpt_ext.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"resume_8_to_4": "resume", "infer_8_to_tp4": "infer", "infer_tp8_from_64": "infer"}
LEAST = ["--script", __file__, "--checkpoint-dir", "out"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_understood(name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(ROOT)
    job = CONFIGS[name]
    assert launch.main([job, "--config", f"configs/{name}.ini", "--dry-run"]) == 0
    told = capfd.readouterr().out
    values = settings.read_settings(f"configs/{name}.ini").values
    assert all(str(value) in told for key, value in values.items() if key in ("checkpoint_dir", "script"))


def test_no_configuration_is_untested() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.ini")} == set(CONFIGS)


def test_the_command_of_two_hosts() -> None:
    given = {
        "script": "t.py",
        "arguments": "--a 'b c'",
        "checkpoint_dir": "c",
        "hosts": 2,
        "host_rank": 1,
        "port": 8118,
    }
    values = settings.complete({**given, "ranks_per_host": 4}, {"master": "10.0.0.1"})
    assert launch.command(values, 8118) == [
        "msrun", "--worker_num=8", "--local_worker_num=4", "--master_addr=10.0.0.1", "--master_port=8118",
        "--node_rank=1", "--log_dir=log", "--cluster_time_out=600", "--join=True", "t.py", "--a", "b c",
    ]  # fmt: skip
    assert launch.variables({**values, "train_strategy": "s", "hardware": "h.json"}, {"GLOG_v": "3"}) == {
        "MS_CKPT_EXT_CHECKPOINT_DIR": "c",
        "MS_CKPT_EXT_TRAIN_STRATEGY": "s",
        "MS_CKPT_EXT_MODE": "auto",
        "MS_CKPT_EXT_HARDWARE": "h.json",
        "GLOG_v": "3",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[launch]\nranks = 8\n", r"\[launch\] has no 'ranks'; it has script, arguments, ranks_per_host"),
        ("[merge]\nsource = a\n", r"there is no section \[merge\]; known are launch, load"),
        ("[launch]\nhosts = two\n", "hosts must be a whole number from 0, got 'two'"),
        ("[load]\nmode = fast\n", "mode must be one of auto, direct, cooperative; got 'fast'"),
        ("mode = fast\n", "no section headers"),
        ("[load]\nmode = auto\nmode = auto\n", "already exists"),
    ],
)
def test_wrong_configurations(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.ini").write_text(text)
    with pytest.raises(UsageError, match=message) as failure:
        settings.read_settings(str(tmp_path / "c.ini"))
    assert str(tmp_path / "c.ini") in str(failure.value)


def test_comments_and_variables(tmp_path: Path) -> None:
    text = "; one\n[launch] \nhosts = 2 ; two\narguments = --x 100%\n[environment]\nGLOG_v = 3\nEmpty =\n"
    (tmp_path / "c.ini").write_text(text)
    assert settings.read_settings(str(tmp_path / "c.ini")) == (
        {"hosts": 2, "arguments": "--x 100%"},
        {"GLOG_v": "3", "Empty": ""},
    )


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        ("resume", [], "--script, --checkpoint-dir must be given"),
        ("resume", [*LEAST, "--hosts", "2"], "port must be the same number"),
        ("resume", [*LEAST, "--host-rank", "1"], "host_rank must be below hosts, got 1 of 1"),
        ("resume", [*LEAST, "--hosts", "0"], "host_rank must be below hosts"),
        ("resume", [*LEAST, "--ranks-per-host", "-1"], "--ranks-per-host must be a whole number"),
        ("resume", [*LEAST, "--config", "no such file"], "cannot read the configuration 'no such file'"),
        ("resume", ["--script", "no.py", "--checkpoint-dir", "o"], "no such script: 'no.py'"),
        ("infer", ["--script", ""], "--script, --checkpoint-dir must be given"),
    ],
)
def test_wrong_options(job: str, options: list[str], message: str, capfd: Any) -> None:
    assert launch.main([job, *options]) == 2
    told = capfd.readouterr().err
    assert told.startswith(f"scripts/{job}.sh: ") and message in told


def test_a_rank_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Through a stand-in for msrun, which writes what msrun writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "msrun").write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in --log_dir=*) d=${a#*=};; esac; done\nmkdir -p "$d"\n'
        'echo "ValueError: in $MS_CKPT_EXT_CHECKPOINT_DIR" > "$d/worker_1.log"; echo fine > "$d/worker_0.log"; exit 3\n'
    )
    (folder / "msrun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert launch.main(["resume", *LEAST, "--log-dir", str(tmp_path / "log")]) == 3
    told = capfd.readouterr()
    assert "worker_1.log:\nValueError: in out" in told.err and "worker_0" not in told.err
    assert "failed; the ranks' logs are in" in told.out
    (folder / "msrun").unlink()
    monkeypatch.setenv("PATH", str(folder))
    assert launch.main(["resume", *LEAST]) == 2
    assert "msrun is not on PATH" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_msrun_ends_with_the_launcher(number: int, code: int, tmp_path: Path) -> None:
    """A stand-in for msrun, which ends what it started at SIGINT, and not at SIGTERM."""
    (tmp_path / "msrun").write_text(
        f"#!{sys.executable}\nimport pathlib, time\nhere = pathlib.Path({str(tmp_path)!r})\n"
        "try:\n    (here / 'started').touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    (here / 'ended').touch()\n"
    )
    (tmp_path / "msrun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "ms_ckpt_ext.cli.launch", "resume", *LEAST]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as launcher:
        while not (tmp_path / "started").exists():
            assert launcher.poll() is None
            time.sleep(0.01)
        launcher.send_signal(number)
        assert launcher.wait(30) == code
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("job", ["resume", "infer"])
def test_help_explains_every_option(job: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ms_ckpt_ext.cli.launch", job, "--help"], capture_output=True, text=True, check=True
    )
    told: Mapping[str, str] = {setting.name: setting.help for setting in settings.SETTINGS}
    words = " ".join(run.stdout.split())
    assert all("--" + name.replace("_", "-") in words for name in told)
    assert all(text in words for text in told.values())


def test_an_unknown_job_prints_the_usage(capfd: Any) -> None:
    assert launch.main([]) == launch.main(["train"]) == 2
    assert "{resume,infer}" in capfd.readouterr().err
