"""One rank of the demonstration: a 4-way network takes its slices from an 8-way checkpoint.

Run by msrun: load.py SOURCE SOURCE_STRATEGY TARGET_STRATEGY TRUTH MODE
TRUTH holds rank_N/net.safetensors as MindSpore itself cut them for the target; every byte is compared.
"""

import sys
import time

import mindspore as ms
from mindspore.communication import get_rank, init
from slices import Slices

from ms_ckpt_ext import load_distributed_checkpoint

source, source_strategy, target_strategy, truth, mode = sys.argv[1:]
ms.set_device("CPU")
init()
rank = get_rank()
slices = Slices(truth, rank)
start = time.perf_counter()
not_loaded, unused = load_distributed_checkpoint(
    slices.network,
    format="safetensors",
    unified_safetensors_dir=source,
    train_strategy_filename=source_strategy,
    predict_strategy=target_strategy,
    mode=mode,
)
seconds = time.perf_counter() - start

wrong = slices.wrong()
if wrong or not_loaded or unused:
    sys.exit(f"rank {rank}: wrong bytes in {wrong}, not loaded {not_loaded}, unused {unused}")
total = sum(map(len, slices.expected.values()))
print(f"DEMO rank {rank}: {len(slices.expected)} parameters, {total:,} bytes, all equal ({mode}, {seconds:.2f} s)")
