"""One rank that resumes or serves, as a training or serving script would; run by scripts/resume.sh and infer.sh.

rank.py {resume,infer} STRATEGY TRUTH

The network has the slices that STRATEGY (of this job) gives this rank, filled with poison: weights and optimizer states
to resume, weights alone to serve. TRUTH holds rank_N/net.safetensors as MindSpore cut them; every byte is compared.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.communication import get_rank, init

import ms_ckpt_ext
from ms_ckpt_ext.formats.registry import read_index

action, strategy, truth = sys.argv[1:]
ms.set_device("CPU")
init()
rank = get_rank()
expected = read_index(f"{truth}/rank_{rank}/net.safetensors")
contents = Path(expected.path).read_bytes()
dtypes = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}
names = [name for name in expected.tensors if action == "resume" or not name.startswith("adam_")]


class Network(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.held = ms.ParameterTuple(
            ms.Parameter(ms.Tensor(np.full(entry.shape, 777), dtypes[entry.dtype.name]), name=name)
            for name, entry in expected.tensors.items()
            if name in names
        )


network = Network()
load = ms_ckpt_ext.resume if action == "resume" else ms_ckpt_ext.load_for_inference
state = load(network, predict_strategy=strategy)  # what and how: MS_CKPT_EXT_CHECKPOINT_DIR, …, set by the launcher

for parameter in network.get_parameters():
    (extent,) = expected.tensors[parameter.name].extents
    if parameter.asnumpy().tobytes() != contents[extent.offset : extent.offset + extent.length]:
        sys.exit(f"rank {rank}: wrong bytes in {parameter.name}")
print(
    f"DEMO rank {rank}: {len(names)} parameters of {state.checkpoint}, {state.mode}, {state.bytes_read:,} bytes read, "
    f"all equal; epoch {state.epoch}, step {state.step}, loss scale {state.loss_scale}"
)
