"""`resume` and `load_for_inference` on what MindSpore's callbacks leave beside or instead of recorded saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import pytest
from mindspore import nn
from mindspore.train import Callback, CheckpointConfig, Model, ModelCheckpoint

from ms_ckpt_ext import CheckpointRecorder, load_for_inference, resume
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError
from tests.bridge.test_resume import contents, network, optimizer_of
from tests.support.batches import Batches

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Failing(Callback):
    """An operator fails in this step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def step_end(self, run_context: Any) -> None:
        if run_context.original_args().cur_step_num == self._step:
            raise RuntimeError("an operator failed")


def train(root: Path, callbacks: list[Any], epochs: int = 1) -> nn.Cell:
    ms.set_device("CPU")
    net = network()
    data = ms.dataset.GeneratorDataset(Batches(6), ["x", "y"], shuffle=False).batch(2)
    try:
        Model(net, nn.MSELoss(), optimizer_of(net)).train(epochs, data, callbacks=callbacks, dataset_sink_mode=False)
    except RuntimeError as error:
        assert "an operator failed" in str(error)
    return net


def saver(root: Path, prefix: str = "net", steps: int = 1, **config: Any) -> ModelCheckpoint:
    return ModelCheckpoint(prefix, str(root), CheckpointConfig(save_checkpoint_steps=steps, **config))


def resumed(root: Path, **more: Any) -> tuple[dict[str, bytes], Any]:
    net = network(1)
    state = resume(net, optimizer_of(net), root, **more)
    return contents(net), state


def test_the_breakpoint_of_an_exception_is_resumed(tmp_path: Path) -> None:
    callbacks = [saver(tmp_path, steps=2, exception_save=True), CheckpointRecorder(), Failing(5)]
    net = train(tmp_path, callbacks, epochs=2)
    found, state = resumed(tmp_path)
    assert state.checkpoint == str(tmp_path / "net-2_2_breakpoint.ckpt")
    assert found == contents(net) and state.skipped == ()


def test_a_recorder_before_the_saver_misses_nothing_that_counts(tmp_path: Path) -> None:
    net = train(tmp_path, [CheckpointRecorder(), saver(tmp_path)])
    found, state = resumed(tmp_path)
    assert state.checkpoint == str(tmp_path / "net-1_3.ckpt") and found == contents(net)


def test_a_run_without_a_recorder_follows_one_with_it(tmp_path: Path) -> None:
    train(tmp_path, [saver(tmp_path), CheckpointRecorder()], epochs=2)
    net = train(tmp_path, [saver(tmp_path)])
    found, state = resumed(tmp_path)
    assert state.checkpoint == str(tmp_path / "net_1-1_3.ckpt") and found == contents(net)
    assert [each.name for each in state.skipped] == ["net-2_3.ckpt"]
    assert "is of a later run" in state.skipped[0].reason


def test_two_savers_in_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, [saver(tmp_path), saver(tmp_path, "ema"), CheckpointRecorder()])
    for call in (resume, load_for_inference):
        with pytest.raises(DiscoveryError, match=r"'ema-1_3.ckpt'.* are whole and equally new"):
            call(network(), checkpoint_dir=tmp_path, required=False)
    assert resumed(tmp_path, prefix="net")[1].checkpoint == str(tmp_path / "net-1_3.ckpt")
    monkeypatch.setenv("MS_CKPT_EXT_PREFIX", "ema")
    state = load_for_inference(network(), tmp_path)
    assert state.checkpoint == str(tmp_path / "ema-1_3.ckpt")
    with pytest.raises(ArgumentTypeError, match="prefix must be a str"):
        resume(network(), None, tmp_path, prefix=3)  # type: ignore[arg-type]


def test_one_file(tmp_path: Path) -> None:
    train(tmp_path, [saver(tmp_path)])
    found, state = resumed(tmp_path / "net-1_2.ckpt")
    assert state.checkpoint == str(tmp_path / "net-1_2.ckpt")
    assert found != resumed(tmp_path)[0]
    served = network(1)
    load_for_inference(served, tmp_path / "net-1_2.ckpt")
    assert contents(served) == found
