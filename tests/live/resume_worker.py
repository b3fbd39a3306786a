"""One of two ranks that train alike, save through `ModelCheckpoint`, lose part of the newest save, and resume."""

from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
from mindspore import nn
from mindspore.communication import get_rank, init
from mindspore.train import CheckpointConfig, Model, ModelCheckpoint

from ms_ckpt_ext import CheckpointRecorder, resume
from ms_ckpt_ext.errors import DisagreementError
from ms_ckpt_ext.transport.select import select_transport
from tests.support.batches import Batches


def meet() -> None:
    """Wait for the other rank. MindSpore's barrier on the CPU is queued, and does not."""
    transport = select_transport()
    transport.share(b"")
    transport.close()


def main(root: Path) -> None:
    ms.set_device("CPU")
    init()
    ms.set_seed(1)  # ranks that begin alike train alike
    rank = get_rank()
    net = nn.Dense(4, 2)
    model = Model(net, nn.MSELoss(), nn.Adam(net.trainable_params(), learning_rate=0.1))
    data = ms.dataset.GeneratorDataset(Batches(8), ["x", "y"], shuffle=False).batch(2)
    folder = root / f"rank_{rank}"
    saver = ModelCheckpoint(f"net_rank_{rank}", str(folder), CheckpointConfig(save_checkpoint_steps=1))
    model.train(1, data, callbacks=[saver, CheckpointRecorder()], dataset_sink_mode=False)
    meet()
    assert (root / "ms_ckpt_ext" / "net_rank_-1_4.ckpt" / "complete.json").exists()
    if rank == 1:
        newest = folder / f"net_rank_{rank}-1_4.ckpt"
        newest.chmod(0o600)  # MindSpore saves it read-only
        newest.write_bytes(newest.read_bytes()[:-8])
    meet()

    state = resume(model.train_network, checkpoint_dir=root)
    assert (state.epoch, state.step) == (1, 3), state
    assert state.checkpoint == str(root / "net_rank_-1_3.ckpt"), state
    ((name, reason),) = state.skipped
    assert name == "net_rank_-1_4.ckpt" and "rank_1/net_rank_1-1_4.ckpt" in reason, state
    assert int(model.train_network.optimizer.global_step.asnumpy()[0]) == 3
    try:
        resume(model.train_network, checkpoint_dir=root if rank else root / "rank_0")
    except DisagreementError as error:
        assert "checkpoint_dir of rank 1" in str(error), error
    else:
        raise AssertionError("the ranks looked into different directories")
    print(f"rank {rank} is right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
