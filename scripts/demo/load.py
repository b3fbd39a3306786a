"""One rank of the demonstration: a 4-way network takes its slices from an 8-way checkpoint.

Run by msrun: load.py SOURCE SOURCE_STRATEGY TARGET_STRATEGY TRUTH MODE
TRUTH holds rank_N/net.safetensors as MindSpore itself cut them for the target; every byte is compared.
"""

import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.communication import get_rank, init

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.formats.registry import read_index

source, source_strategy, target_strategy, truth, mode = sys.argv[1:]
ms.set_device("CPU")
init()
rank = get_rank()

# The slices this rank must end up with, and a network that has Parameters of those names, filled with poison.
expected = read_index(f"{truth}/rank_{rank}/net.safetensors")
contents = Path(expected.path).read_bytes()
dtypes = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}


class Network(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.weights = ms.ParameterTuple(
            ms.Parameter(ms.Tensor(np.full(entry.shape, 777), dtypes[entry.dtype.name]), name=name)
            for name, entry in expected.tensors.items()
        )


network = Network()
start = time.perf_counter()
not_loaded, unused = load_distributed_checkpoint(
    network,
    format="safetensors",
    unified_safetensors_dir=source,
    train_strategy_filename=source_strategy,
    predict_strategy=target_strategy,
    mode=mode,
)
seconds = time.perf_counter() - start

wrong, total = [], 0
for parameter in network.get_parameters():
    (extent,) = expected.tensors[parameter.name].extents
    total += extent.length
    if parameter.asnumpy().tobytes() != contents[extent.offset : extent.offset + extent.length]:
        wrong.append(parameter.name)
if wrong or not_loaded or unused:
    sys.exit(f"rank {rank}: wrong bytes in {wrong}, not loaded {not_loaded}, unused {unused}")
print(f"DEMO rank {rank}: {len(expected.tensors)} parameters, {total:,} bytes, all equal ({mode}, {seconds:.2f} s)")
