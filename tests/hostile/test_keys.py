"""Keys show nowhere: not in what is printed, logged, raised, written or traced, whatever happens to them."""

from __future__ import annotations

import base64
import logging
import os
import traceback
from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.cli.main import main
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from tests.support.checkpoints import source

RAW = bytes(range(0xA1, 0xA1 + 16))
TEXT = b"correct horse ba"
WRONG = b"a wrong key 1234"
KEYS = (RAW, TEXT, WRONG)
SPELLED = sorted(
    {
        text
        for key in KEYS
        for text in (
            key.hex(),
            key.hex().upper(),
            base64.b64encode(key).decode(),
            repr(key)[2:-1],
            key.decode("latin-1"),
            str([*key])[1:-1],
            str(int.from_bytes(key, "big")),
        )
    }
)


def hides(text: str) -> bool:
    return not any(spelled in text for spelled in SPELLED)


def test_the_test_would_see_a_key() -> None:
    assert not hides(f"key {RAW!r}") and not hides(RAW.hex()) and hides("nothing")


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("keys")
    made = source(root / "made", seed=1)
    ms_ckpt_ext.merge(made / "shards", root / "merged", strategy=made / "strategy.ckpt", sync=False, enc_key=RAW)
    ms_ckpt_ext.convert(made / "shards/rank_0/net.safetensors", root / "net.ckpt", sync=False)
    ms_ckpt_ext.encrypt(root / "net.ckpt", root / "gcm.ckpt", enc_key=TEXT, enc_mode="AES-GCM", sync=False)
    for name, key in (("raw", RAW), ("text", TEXT), ("wrong", WRONG)):
        (root / name).write_bytes(key)
        (root / f"{name}.hex").write_text(f"hex:{key.hex()}")
        (root / f"{name}.base64").write_text(f"base64:{base64.b64encode(key).decode()}")
        (root / f"{name}.torn").write_bytes(b"hex:" + key.hex().encode()[:-1])
        (root / f"{name}.long").write_bytes(key + b"xy")
    return {path.name: path for path in root.iterdir()}


LINES = [
    ["inspect", "merged", "--dec-key-file", "raw"],
    ["inspect", "merged", "--dec-key-file", "wrong"],
    ["inspect", "merged"],
    ["inspect", "gcm.ckpt", "--dec-key-file", "wrong.hex", "--verbose"],
    ["inspect", "gcm.ckpt", "--dec-key-file", "text.base64", "--json"],
    ["inspect", "gcm.ckpt", "--dec-key-file", "raw.torn", "--verbose"],
    ["inspect", "gcm.ckpt", "--dec-key-file", "raw.long", "--json"],
    ["inspect", "gcm.ckpt", "--dec-key-env", "A_KEY", "--verbose"],
    ["inspect", "gcm.ckpt", "--dec-key-env", "A_KEY", "--dec-mode", "AES-CBC", "--verbose"],
    ["inspect", "gcm.ckpt", "--dec-key-env", TEXT.decode()],
    ["inspect", "gcm.ckpt", "--dec-key-env", f"hex:{RAW.hex()}"],
    ["inspect", "gcm.ckpt", "--dec-key-file", RAW.hex()],
    ["inspect", "gcm.ckpt", "--dec-mode", base64.b64encode(RAW).decode()],
    ["inspect", "gcm.ckpt", f"--dec-key={RAW.hex()}"],
    ["verify", "merged", "--manifest", "--dec-key-file", "raw", "--json"],
    ["verify", "merged", "--manifest", "--dec-key-file", "wrong", "--verbose"],
    ["convert", "gcm.ckpt", "OUT/a.safetensors", "--dec-key-env", "A_KEY", "--enc-key-file", "raw", "--verbose"],
    ["encrypt", "net.ckpt", "OUT/b.ckpt", "--enc-key-file", "wrong", "--enc-mode", "SM4-CBC", "--verbose"],
    ["decrypt", "merged", "OUT/c", "--dec-key-file", "text", "--verbose"],
    ["decrypt", "merged", "OUT/d", "--dec-key-file", "raw", "--dry-run", "--json"],
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_what_commands_tell_and_write(
    line: list[str], sealed: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("A_KEY", TEXT.decode())
    caplog.set_level(logging.DEBUG)
    words = [str(sealed.get(word, word)).replace("OUT", str(tmp_path)) for word in line]
    try:
        main(words)
    except SystemExit as error:
        assert error.code == 2
    told = capsys.readouterr()
    assert told.out + told.err
    assert hides(told.out) and hides(told.err) and hides(caplog.text)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not any(key in path.read_bytes() for key in KEYS)


CALLS: dict[str, Callable[[dict[str, Path]], Any]] = {
    "another key": lambda at: ms_ckpt_ext.load(at["merged"], dec_key=WRONG),
    "a key of another length": lambda at: ms_ckpt_ext.load(at["merged"], dec_key=RAW + b"x"),
    "a key as text": lambda at: ms_ckpt_ext.load(at["merged"], dec_key=TEXT.decode()),
    "a key as a mode": lambda at: ms_ckpt_ext.load(at["merged"], dec_key=RAW, dec_mode=TEXT.decode()),
    "a key as another argument": lambda at: ms_ckpt_ext.encrypt(at["net.ckpt"], at["merged"], enc_key=[*RAW]),
    "a key for what is plain": lambda at: ms_ckpt_ext.load(at["net.ckpt"], dec_key=RAW),
    "a key in a pickle": lambda at: Key(RAW).__reduce__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_errors_tell(call: str, sealed: dict[str, Path], caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(Exception, match=r".") as caught:
        held = CALLS[call](sealed)
        held.arrays()
    error = caught.value
    told = traceback.TracebackException.from_exception(error)
    # The lines of this very file show what was passed: they are ours.
    ours = [frame for frame in told.stack if frame.filename != __file__]
    assert hides("".join(traceback.format_list(ours)) + str(error) + repr(error) + repr(error.args) + caplog.text)
    while error is not None:
        assert hides(str(error) + repr(vars(error)))
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("form", [str, repr, lambda value: f"{value}", lambda value: f"{value!r:.80}"])
def test_values_that_hold_a_key(form: Callable[[Any], str]) -> None:
    for value in (Key(RAW), Access(Key(RAW)), [Key(RAW)], {"key": Key(TEXT)}, (Access(Key(TEXT), "AES-GCM"),)):
        assert hides(form(value)) and "hidden" in form(value)


def test_no_process_is_started_with_a_key(sealed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of processes shows arguments to everybody."""
    started: list[Any] = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *words, **more: started.append((words, more)))
    monkeypatch.setattr(os, "execv", lambda *words: started.append(words))
    with ms_ckpt_ext.load(sealed["merged"], dec_key=RAW, verify="full") as held:
        assert held.arrays()
    assert started == [] and hides(Path("/proc/self/cmdline").read_bytes().decode("latin-1"))
