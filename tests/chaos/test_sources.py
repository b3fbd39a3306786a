"""Storage that fails at any access to a source: a job does what is right, or raises an error that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext import errors
from tests.chaos.inputs import KEY, make_inputs
from tests.storage.test_unreadable import Failing
from tests.support.checkpoints import tree

Made = Callable[[Path, Path], Any]
"""(inputs, target) -> what comes of a call."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "inputs"
    make_inputs(root)
    return root / "A"


def written(call: Callable[..., Any], kind: str, **files: str) -> Made:
    """What a job writes; `files`: arguments that are files beside the checkpoints."""

    def made(inputs: Path, target: Path) -> dict[str, bytes]:
        beside = {name: inputs / "with" / file for name, file in files.items()}
        call(inputs / kind, target, max_process_num=1, sync=False, **beside)
        return tree(target)

    return made


def decrypted(source: Path, target: Path, **more: Any) -> None:
    ms_ckpt_ext.decrypt(source, target, dec_key=KEY, **more)


def to_safetensors(source: Path, target: Path, **more: Any) -> None:
    ms_ckpt_ext.convert(source, target, to="safetensors", **more)


def compared(inputs: Path, _target: Path) -> Any:
    return ms_ckpt_ext.verify(inputs / "merged", inputs / "shards", strategy_b=inputs / "with" / "strategy.ckpt")


def checked(inputs: Path, _target: Path) -> Any:
    """How much was looked at; a file that cannot be read is a fault."""
    found = ms_ckpt_ext.verify(inputs / "merged", manifest=True)
    for fault in found.faults:
        raise errors.ReadError(None, f"{inputs}: {fault}")
    return found


def loaded(inputs: Path, _target: Path) -> dict[str, bytes]:
    with ms_ckpt_ext.load(inputs / "shards", strategy=inputs / "with" / "strategy.ckpt") as found:
        return {name: array.tobytes() for name, array in found.arrays().items()}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(written(ms_ckpt_ext.merge, "shards", strategy="strategy.ckpt"), id="merge"),
        pytest.param(
            written(ms_ckpt_ext.reshard, "shards", strategy="strategy.ckpt", to_strategy="target.ckpt"), id="reshard"
        ),
        pytest.param(written(to_safetensors, "ckpt"), id="convert"),
        pytest.param(written(decrypted, "sealed"), id="decrypt"),
        pytest.param(written(ms_ckpt_ext.export, "trained", strategy="trained.ckpt", config="hub"), id="export"),
        pytest.param(loaded, id="load"),
        pytest.param(checked, id="verify a manifest"),
        pytest.param(compared, id="verify two"),
    ],
)
def test_any_look_may_fail(make: Made, inputs: Path, tmp_path: Path) -> None:
    right = make(inputs, tmp_path / "right")
    told, number = 0, 0
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, inputs, number)
            try:
                assert make(inputs, tmp_path / f"out{number}") == right, f"look {number}"
            except errors.CheckpointError as error:
                assert str(inputs) in str(error) or "config.json" in str(error), f"look {number}: {error}"
                told += 1
        if failing.seen < number:
            break
    assert told > 5
