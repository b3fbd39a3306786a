"""`Model.train` on the CPU with MindSpore's callback and ours; checkpoints are damaged, and training goes on."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from mindspore.train import CheckpointConfig, Model, ModelCheckpoint

from ms_ckpt_ext import CheckpointRecorder, load_for_inference, resume, unified_safetensors
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import load_manifest
from ms_ckpt_ext.engine.resume.records import read_records
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, LayoutMismatchError, StrategyError, UsageError
from tests.support.batches import Batches
from tests.support.checkpoints import read_file
from tests.support.parameters import bytes_of as contents

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
STEPS = 4


def network(seed: int = 0) -> nn.Cell:
    dense = nn.Dense(4, 2)
    rng = np.random.default_rng(seed)
    for parameter in dense.get_parameters():
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    return dense


def optimizer_of(net: nn.Cell) -> nn.Cell:
    return nn.Adam(net.trainable_params(), learning_rate=0.1)


def train(root: Path, epochs: int = 2, recorder: Any = None, **config: Any) -> Model:
    """Saves after every step: 3 steps an epoch."""
    ms.set_device("CPU")
    net = network()
    model = Model(net, nn.MSELoss(), optimizer_of(net), loss_scale_manager=None)
    data = ms.dataset.GeneratorDataset(Batches(6), ["x", "y"], shuffle=False).batch(2)
    saver = ModelCheckpoint("net", str(root), CheckpointConfig(**{"save_checkpoint_steps": 1, **config}))
    model.train(epochs, data, callbacks=[saver, recorder or CheckpointRecorder()], dataset_sink_mode=False)
    return model


@pytest.mark.parametrize(("format", "background"), [("ckpt", False), ("safetensors", False), ("ckpt", True)])
def test_every_save_is_recorded_and_the_last_is_resumed(format: str, background: bool, tmp_path: Path) -> None:
    model = train(tmp_path, format=format, async_save=background, keep_checkpoint_max=3)
    names = sorted(os.listdir(tmp_path / "ms_ckpt_ext"))
    assert names == sorted(f for f in os.listdir(tmp_path) if f.endswith(f".{format}"))
    assert names == [f"net-2_{step}.{format}" for step in (1, 2, 3)]
    told = [read_records(str(tmp_path), name) for name in names]
    assert [(r[0].epoch, r[0].step, r[0].world, r[0].sharded) for r in told] == [(2, s, 1, False) for s in (4, 5, 6)]
    assert all((tmp_path / "ms_ckpt_ext" / name / "complete.json").exists() for name in names)
    manifest = load_manifest(str(tmp_path))
    assert manifest is not None and set(manifest.files) == set(names)
    assert check_digests(str(tmp_path), manifest) == []

    net = network(1)
    optimizer = optimizer_of(net)
    state = resume(net, optimizer, tmp_path)
    assert (state.epoch, state.step, state.loss_scale) == (2, 6, None)
    assert state.checkpoint == str(tmp_path / f"net-2_3.{format}")
    assert state.skipped == state.not_loaded == ()
    expected = contents(model.train_network)
    found = contents(net) | contents(optimizer)
    assert found == {name: expected[name] for name in found}
    assert int(optimizer.global_step.asnumpy()[0]) == 6


def test_a_torn_one_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path)
    newest = tmp_path / "net-2_3.ckpt"
    newest.chmod(0o600)  # MindSpore saves it read-only
    newest.write_bytes(newest.read_bytes()[:-20])
    net = network(1)
    state = resume(net, optimizer_of(net), tmp_path, check="digests")
    assert (state.step, state.epoch) == (5, 2)
    ((name, reason),) = state.skipped
    assert name == "net-2_3.ckpt" and "bytes" in reason
    assert reason in caplog.text


@pytest.mark.parametrize("mode", ["AES-GCM", "SM4-CBC"])
def test_encrypted_ones(mode: str, tmp_path: Path) -> None:
    key = b"0123456789abcdef"
    model = train(tmp_path, epochs=1, enc_key=key, enc_mode=mode)
    manifest = load_manifest(str(tmp_path))
    assert manifest is not None and [dict(held.tensors) for held in manifest.files.values()] == [{}] * 3
    net = network(1)
    assert resume(net, None, tmp_path, dec_key=key, dec_mode=mode).step == 3
    expected = contents(model.train_network)
    assert contents(net) == {name: expected[name] for name in contents(net)}
    with pytest.raises(DiscoveryError, match="is encrypted .*pass the key"):
        resume(net, None, tmp_path)


def test_a_run_that_was_resumed_counts_on(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    train(tmp_path, epochs=1, recorder=CheckpointRecorder(start_epoch=1, start_step=3))
    state = resume(network(), None, tmp_path)
    assert (state.checkpoint, state.epoch, state.step) == (str(tmp_path / "net_1-1_3.ckpt"), 2, 6)


def test_the_loss_scale_is_kept(tmp_path: Path) -> None:
    net = network()
    scaled = nn.TrainOneStepWithLossScaleCell(
        nn.WithLossCell(net, nn.MSELoss()), optimizer_of(net), ms.Tensor(np.array([1024.0], np.float32))
    )
    ms.save_checkpoint(scaled, str(tmp_path / "a-1_7.ckpt"), append_dict={"epoch_num": 3, "step_num": 21})
    state = resume(scaled, None, tmp_path)
    assert (state.epoch, state.step, state.loss_scale) == (3, 21, 1024.0)
    assert set(state.scalars) >= {"epoch_num", "step_num", "scale_sense", "global_step"}


def test_nothing_to_resume_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = network()
    with pytest.raises(DiscoveryError, match="holds no complete checkpoint"):
        resume(net, None, tmp_path)
    (tmp_path / "net-1_3.ckpt").write_bytes(b"\x0a\xff\xff\xff\xff")
    with pytest.raises(DiscoveryError, match="skipped:\n  net-1_3.ckpt: .*net-1_3"):
        resume(net, None, tmp_path)
    before = contents(net)
    state = resume(net, None, tmp_path, required=False)
    assert (state.checkpoint, state.epoch, state.step) == (None, 0, 0)
    assert [name for name, _ in state.skipped] == ["net-1_3.ckpt"]
    assert contents(net) == before
    assert "starts anew" in caplog.text


def test_parameters_that_are_not_there_are_an_error_before_anything_changes(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    wider = nn.SequentialCell([network(1), nn.Dense(2, 2)])
    before = contents(wider)
    with pytest.raises(LayoutMismatchError, match=r"1\.weight.*allow_missing"):
        resume(wider, None, tmp_path, name_map={"0.weight": "weight", "0.bias": "bias"})
    assert contents(wider) == before
    state = resume(wider, None, tmp_path, allow_missing=True, name_map={"0.weight": "weight", "0.bias": "bias"})
    assert state.not_loaded == ("1.weight", "1.bias")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("out",), ArgumentTypeError, "checkpoint_dir="),
        ((None, None), UsageError, "checkpoint_dir"),
        ((None, "out", {"format": "pt"}), UsageError, "safetensors, ckpt"),
        ((None, "out", {"check": "all"}), UsageError, "headers, digests"),
        ((3, "out"), ArgumentTypeError, "Cell"),
        ((None, "out", {"train_strategy_filename": "no such"}), StrategyError, "no such"),
    ],
)
def test_wrong_arguments(arguments: Any, error: Any, message: str) -> None:
    *given, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        resume(network(), *given, **options)


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, epochs=1)
    monkeypatch.setenv("MS_CKPT_EXT_CHECKPOINT_DIR", str(tmp_path))
    assert resume(network(1)).step == 3


def test_a_failing_recorder_does_not_stop_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "ms_ckpt_ext").write_text("a file where a folder is wanted")
    model = train(tmp_path, epochs=1)
    assert int(model.train_network.optimizer.global_step.asnumpy()[0]) == 3
    assert sum("could not be recorded" in r.getMessage() for r in caplog.records if r.levelno == logging.ERROR) == 3


def test_weights_from_a_hugging_face_directory_and_back(tmp_path: Path) -> None:
    """`name_map` says how the network's names are called in the checkpoint; merging writes the other names back."""
    theirs = {"weight": "model.dense.weight", "bias": "model.dense.bias"}
    net = network()
    (tmp_path / "train" / "rank_0").mkdir(parents=True)
    ms.save_checkpoint(net, str(tmp_path / "train" / "rank_0" / "net.safetensors"), format="safetensors")
    unified_safetensors(
        tmp_path / "train", None, tmp_path / "hf", naming="huggingface", choice_func=lambda name: theirs[name]
    )
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(theirs.values())
    served = network(1)
    state = load_for_inference(served, tmp_path / "hf", name_map=theirs)
    assert contents(served) == contents(net)
    assert state.checkpoint == str(tmp_path / "hf")
    assert state.bytes_read == sum(map(len, contents(net).values()))
    chosen = network(2)
    load_for_inference(chosen, tmp_path / "hf", choice_func=lambda name: name.rpartition(".")[2])
    assert contents(chosen) == contents(net)
    with pytest.raises(ArgumentTypeError, match="choice_func must be callable, got dict"):
        load_for_inference(chosen, tmp_path / "hf", choice_func=theirs)


def test_optimizer_states_are_not_read_for_inference(tmp_path: Path) -> None:
    dense, served = nn.Dense(256, 4096), nn.Dense(256, 4096)
    optimizer = optimizer_of(dense)
    whole = nn.TrainOneStepCell(nn.WithLossCell(dense, nn.MSELoss()), optimizer)
    ms.save_checkpoint(whole, str(tmp_path / "net-1_3.safetensors"), format="safetensors")
    state = load_for_inference(served, tmp_path)
    assert contents(served) == contents(dense)
    weights = sum(map(len, contents(dense).values()))
    held = sum(len(tensor.data) for tensor in read_file(tmp_path / "net-1_3.safetensors").values())
    assert held > 3 * weights
    assert weights <= state.bytes_read <= weights + 2 * 4096, "small gaps are read over"
    assert {"moment1.weight", "moment2.bias", "global_step"} <= set(state.unused)


def test_a_network_of_another_dtype_is_cast_for_inference_only(tmp_path: Path) -> None:
    net = network()
    ms.save_checkpoint(net, str(tmp_path / "net-1_3.ckpt"))
    half = network(1).to_float(ms.float16)
    for parameter in half.get_parameters():
        parameter.set_dtype(ms.float16)
    with pytest.raises(LayoutMismatchError, match="strict_load forbids a cast"):
        resume(half, None, tmp_path)
    load_for_inference(half, tmp_path)
    expected = {p.name: p.asnumpy().astype(np.float16).tobytes() for p in net.get_parameters()}
    assert contents(half) == expected


@pytest.mark.parametrize(("step", "scale"), [(np.int64(7), np.float32(2.0)), (np.uint8(7), 2), (7, None)])
def test_a_recorder_takes_numbers_of_any_kind(step: Any, scale: Any, tmp_path: Path) -> None:
    net = network()
    ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
    assert CheckpointRecorder().record(str(tmp_path / "net.ckpt"), net, epoch=step, step=step, loss_scale=scale)
    restored = resume(network(1), checkpoint_dir=tmp_path)
    assert (restored.epoch, restored.step, restored.loss_scale) == (7, 7, scale)


@pytest.mark.parametrize("step", [7.0, "7", True])
def test_a_recorder_takes_no_other_step(step: Any, tmp_path: Path) -> None:
    net = network()
    ms.save_checkpoint(net, str(tmp_path / "net.ckpt"))
    with pytest.raises(ArgumentTypeError, match="step must be an int"):
        CheckpointRecorder().record(str(tmp_path / "net.ckpt"), net, step=step)
