"""MindFormers' folders into a network on one device: what is torn, unhealthy or not wanted; `resume` and inference."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ms_ckpt_ext import load_distributed_checkpoint, load_for_inference, resume
from ms_ckpt_ext.errors import CoverageError, DiscoveryError
from ms_ckpt_ext.transport.local import LocalTransport
from ms_ckpt_ext.transport.select import lent
from tests.support.mindformers_folder import STATES, WHOLE, saved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIMIZER = sorted(f"toy-opt-{rank:07d}-0000004.safetensors" for rank in range(4))


class Network(ms.nn.Cell):
    """The weights, and with them the optimizer's states if it trains; empty."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        held = {**WHOLE, **(STATES if trains else {})}
        self.held = ms.ParameterTuple([ms.Parameter(ms.Tensor(np.zeros_like(a)), name=n) for n, a in held.items()])

    def right(self) -> bool:
        want = {**WHOLE, **STATES}
        return all(p.asnumpy().tobytes() == want[p.name].tobytes() for p in self.get_parameters())


def iterations(root: Path, *steps: int) -> dict[int, Path]:
    """Folders of these steps, alike but for the step they tell."""
    first = saved(root)
    found = {step: root / f"iteration_{step:08d}" for step in steps}
    for step, folder in found.items():
        if folder != first:
            shutil.copytree(first, folder)
        told(folder, global_step=step)
    if first not in found.values():
        shutil.rmtree(first)
    (root / "latest_checkpointed_iteration.txt").write_text(str(max(steps)))
    return found


def told(folder: Path, **changes: Any) -> None:
    common = folder / "common.json"
    common.write_text(json.dumps({**json.loads(common.read_text()), **changes}))


def test_weights_are_served_without_the_optimizers_files(tmp_path: Path) -> None:
    folder = iterations(tmp_path, 10)[10]
    for name in OPTIMIZER:
        (folder / name).unlink()
    for source in (tmp_path, folder):
        network = Network(trains=False)
        assert load_for_inference(network, source).step == 10
        assert network.right()
    for mode in ("direct", "cooperative"):
        network = Network(trains=False)
        load_distributed_checkpoint(network, format="safetensors", unified_safetensors_dir=tmp_path, mode=mode)
        assert network.right()
        with pytest.raises(CoverageError, match="'adam_m.rows' and 3 more should be in 'toy-opt-0000000.*not there"):
            load_distributed_checkpoint(
                Network(trains=True), format="safetensors", unified_safetensors_dir=tmp_path, mode=mode
            )


def test_a_resume_names_what_is_missing_and_takes_an_older_one(tmp_path: Path) -> None:
    folders = iterations(tmp_path, 10, 20, 30)
    for name in OPTIMIZER:
        (folders[30] / name).unlink()
    (folders[20] / OPTIMIZER[1]).unlink()
    network = Network(trains=True)
    restored = resume(network, checkpoint_dir=tmp_path)
    assert (restored.step, network.right()) == (10, True)
    assert [skipped.name for skipped in restored.skipped] == ["iteration_00000030", "iteration_00000020"]
    assert "'adam_m.rows' and 3 more should be in 'toy-opt-0000000-0000004.safetensors'" in restored.skipped[0].reason
    assert "'adam_m.both' should be in 'toy-opt-0000001-0000004.safetensors'" in restored.skipped[1].reason
    assert load_for_inference(Network(trains=False), tmp_path).step == 30, "who serves weights wants no states"
    shutil.rmtree(folders[10])
    network = Network(trains=True)
    with pytest.raises(DiscoveryError, match="'adam_m.rows' and 3 more should be in 'toy-opt-0000000"):
        resume(network, checkpoint_dir=tmp_path)
    assert not any(p.asnumpy().any() for p in network.get_parameters())


@pytest.mark.parametrize("status", [1, 2, -1, 0.5, True])
def test_an_unhealthy_iteration_is_skipped(status: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = iterations(tmp_path, 10, 20)
    told(folders[20], ckpt_status=status)
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        restored = resume(Network(trains=True), checkpoint_dir=tmp_path)
    assert (restored.step, [skipped.name for skipped in restored.skipped]) == (10, ["iteration_00000020"])
    assert f"common.json says ckpt_status {status!r}" in restored.skipped[0].reason
    assert "unhealthy" in caplog.text
    assert load_for_inference(Network(trains=False), tmp_path).step == 10
    told(folders[10], ckpt_status=1)
    with pytest.raises(DiscoveryError, match="ckpt_status"):
        resume(Network(trains=True), checkpoint_dir=tmp_path)
    assert resume(Network(trains=True), checkpoint_dir=tmp_path, required=False).checkpoint is None


@pytest.mark.parametrize("status", [0, None, 0.0, False])
def test_a_healthy_or_unjudged_iteration_is_taken(status: Any, tmp_path: Path) -> None:
    folders = iterations(tmp_path, 10, 20)
    told(folders[20], ckpt_status=status)
    assert resume(Network(trains=True), checkpoint_dir=tmp_path).step == 20
    common = json.loads((folders[20] / "common.json").read_text())
    del common["ckpt_status"]
    (folders[20] / "common.json").write_text(json.dumps(common))
    assert resume(Network(trains=True), checkpoint_dir=tmp_path).step == 20
    (folders[20] / "common.json").unlink()
    assert resume(Network(trains=True), checkpoint_dir=tmp_path).step is None


DAMAGED = ["", "{", "[]", "3", "[" * 100_000, '{"ckpt_status": "0"}', '{"ckpt_status": [0]}', '{"loss_scale": {}}']
DAMAGED += ['{"epoch_num": 1e999}', '{"global_step": "ten"}', '{"global_step": 1.5}', '{"epoch_num": -1}']
DAMAGED += ['{"step_num": true}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_common_json_is_skipped(text: str, tmp_path: Path) -> None:
    folders = iterations(tmp_path, 10, 20)
    (folders[20] / "common.json").write_text(text)
    restored = resume(Network(trains=True), checkpoint_dir=tmp_path)
    assert restored.step == 10
    assert "common.json" in restored.skipped[0].reason


def _iteration(root: Path, **files: str) -> None:
    folder = root / "iteration_00000004"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)


FIRST = {
    "nothing at all": lambda root: None,
    "an empty folder": lambda root: root.mkdir(),
    "an empty iteration": _iteration,
    "an iteration without files": lambda root: _iteration(root, common='{"global_step": 4}'),
    "metadata without files": lambda root: _iteration(root, metadata='{"state_dict_metadata": {}, "storage_data": {}}'),
    "metadata cut short": lambda root: _iteration(root, metadata='{"state_dict_meta'),
    "a tracker and no iteration": lambda root: (
        root.mkdir() or (root / "latest_checkpointed_iteration.txt").write_text("4")
    ),
    "an empty tracker": lambda root: root.mkdir() or (root / "latest_checkpointed_iteration.txt").write_text(""),
    "empty rank folders": lambda root: [(root / f"rank_{rank}").mkdir(parents=True) for rank in range(4)],
    "empty folders of records": lambda root: (root / "ms_ckpt_ext/net-1_1.ckpt/strategy").mkdir(parents=True),
}


@pytest.mark.parametrize("left", FIRST)
def test_what_a_killed_first_start_left_does_not_block_a_first_start(left: str, tmp_path: Path) -> None:
    FIRST[left](tmp_path / "checkpoint")  # type: ignore[no-untyped-call]
    network = Network(trains=True)
    restored = resume(network, checkpoint_dir=tmp_path / "checkpoint", required=False)
    assert (restored.checkpoint, restored.epoch, restored.step) == (None, 0, 0)
    with pytest.raises(DiscoveryError, match="holds no complete checkpoint|no such checkpoint directory"):
        resume(network, checkpoint_dir=tmp_path / "checkpoint")


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_meet_once_to_choose_and_to_load(fails: bool, tmp_path: Path) -> None:
    """A rank that fails between the two leaves the meeting, and nobody waits for it at another."""
    iterations(tmp_path, 10)
    left: list[LocalTransport] = []

    class Transport(LocalTransport):
        def close(self) -> None:
            left.append(self)

    class Failing(Network):
        def parameters_and_names(self, *_: Any, **__: Any) -> Any:
            raise MemoryError

    transport = Transport()
    with lent(transport), pytest.raises(MemoryError) if fails else nullcontext():
        resume((Failing if fails else Network)(trains=True), checkpoint_dir=tmp_path)
    assert left == [transport]


def test_what_common_json_and_the_files_tell_differently_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = iterations(tmp_path, 10)[10]
    for rank in range(4):
        file = folder / OPTIMIZER[rank]
        save_file({**load_file(file), "global_step": np.array([10], np.int32)}, file)
    with caplog.at_level(logging.WARNING, "ms_ckpt_ext"):
        assert resume(Network(trains=True), checkpoint_dir=tmp_path).step == 10
        assert "common.json says" not in caplog.text
        told(folder, global_step=20)
        assert resume(Network(trains=True), checkpoint_dir=tmp_path).step == 10
    assert "common.json says that global_step is 20, and the files, which count, hold [10]" in caplog.text
