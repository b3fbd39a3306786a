"""Settings of `scripts/resume.sh` and `infer.sh`: one table for configuration files and options.

A configuration file is INI, as Python's `configparser` reads it: `key = value` under section names, `;` or `#` before a
comment. Every key but those of [environment] is also an option (`ranks_per_host` is `--ranks-per-host`), and the option
wins. Relative paths count from the directory where the script is called.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ms_ckpt_ext.errors import UsageError
from ms_ckpt_ext.storage.linux import read_small

ENVIRONMENT = "environment"
"""The section of environment variables for the ranks, under any names."""
_WHOLE = re.compile(r"[0-9]{1,18}")


class Setting(NamedTuple):
    """One thing that can be set.

    Attributes:
        section, name: where a configuration file has it.
        kind: str, int, or a tuple of the words that are allowed.
        default: None where it must be given.
        help: what it is.
    """

    section: str
    name: str
    kind: Any
    default: Any
    help: str


SETTINGS = (
    Setting(
        "launch", "script", str, None, "the Python script that every rank runs; it calls resume or load_for_inference"
    ),
    Setting("launch", "arguments", str, "", "its arguments, quoted as in a shell"),
    Setting("launch", "ranks_per_host", int, 8, "processes, and so NPUs, on each host"),
    Setting("launch", "hosts", int, 1, "hosts of the job; call the script on each, with its own host_rank"),
    Setting("launch", "host_rank", int, 0, "number of this host, from 0"),
    Setting("launch", "master", str, "127.0.0.1", "address of host 0, where the ranks meet"),
    Setting(
        "launch", "port", int, 0, "TCP port there, the same on all hosts; 0 for a free one if there is one host only"
    ),
    Setting("launch", "log_dir", str, "log", "directory for worker_N.log of every rank"),
    Setting("launch", "start_timeout", int, 600, "seconds that the ranks wait for each other at the start"),
    Setting("load", "checkpoint_dir", str, None, "where the checkpoints are; the newest complete one is taken"),
    Setting(
        "load",
        "train_strategy",
        str,
        "",
        "layouts of the job that saved; default: recorded or found with the checkpoint",
    ),
    Setting("load", "prefix", str, "", "prefix of the saves that count, where several savers share the directory"),
    Setting("load", "mode", ("auto", "direct", "cooperative"), "auto", "who reads: see docs/training-resume.md"),
    Setting(
        "load",
        "hardware",
        str,
        "",
        "profile of the machine: a name from configs/hardware, or a file; default: by the NPU",
    ),
)


class Settings(NamedTuple):
    """What was set, by name, and variables for the ranks."""

    values: Mapping[str, Any]
    environment: Mapping[str, str]


def read_settings(path: str) -> Settings:
    """Read a configuration file.

    Raises:
        UsageError: no such file, not INI, an unknown section or key, or a value of the wrong kind; says where.
    """
    parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";", "#"))
    parser.optionxform = str  # type: ignore[assignment]  # variables have capitals
    try:
        parser.read_string(read_small(path, pipe=True).decode(), path)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise UsageError(f"cannot read the configuration {path!r}: {error}") from error
    settings = {(setting.section, setting.name): setting for setting in SETTINGS}
    sections = dict.fromkeys(section for section, _ in settings)
    values: dict[str, Any] = {}
    for section in parser.sections():
        if section not in (*sections, ENVIRONMENT):
            raise UsageError(f"{path!r}: there is no section [{section}]; known are {', '.join(sections)}")
        for name, text in parser.items(section) if section != ENVIRONMENT else ():
            if (section, name) not in settings:
                names = [known_name for known_section, known_name in settings if known_section == section]
                raise UsageError(f"{path!r}: [{section}] has no {name!r}; it has {', '.join(names)}")
            values[name] = value_of(settings[section, name], text, f"{path!r}: {name}")
    return Settings(values, dict(parser.items(ENVIRONMENT)) if parser.has_section(ENVIRONMENT) else {})


def value_of(setting: Setting, text: str, where: str) -> Any:
    """A setting's value from its text. Raises UsageError, beginning with `where`."""
    if isinstance(setting.kind, tuple) and text not in setting.kind:
        raise UsageError(f"{where} must be one of {', '.join(setting.kind)}; got {text!r}")
    if setting.kind is not int:
        return text
    if not _WHOLE.fullmatch(text):
        raise UsageError(f"{where} must be a whole number from 0, got {text!r:.60}")
    return int(text)


def complete(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All settings: options override the configuration, which overrides the defaults.

    Raises:
        UsageError: something is missing, or host numbers do not fit.
    """
    given = {**config, **{name: value for name, value in options.items() if value is not None}}
    values = {s.name: given.get(s.name, s.default) for s in SETTINGS}
    missing = [name for name, value in values.items() if value is None or (value == "" and name == "script")]
    if missing:
        options_of = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UsageError(f"{options_of} must be given, here or in the configuration")
    if values["hosts"] < 1 or values["host_rank"] >= values["hosts"]:
        raise UsageError(f"host_rank must be below hosts, got {values['host_rank']} of {values['hosts']}")
    if values["hosts"] > 1 and values["port"] == 0:
        raise UsageError("with several hosts, port must be the same number on all of them, such as 8118")
    return values
