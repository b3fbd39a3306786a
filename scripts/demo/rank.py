"""One rank that resumes or serves, as a training or serving script would; run by scripts/resume.sh and infer.sh.

rank.py {resume,infer} STRATEGY TRUTH

The network has the slices that STRATEGY (of this job) gives this rank, filled with poison: weights and optimizer states
to resume, weights alone to serve. TRUTH holds rank_N/net.safetensors as MindSpore cut them; every byte is compared.
"""

import sys

import mindspore as ms
from mindspore.communication import get_rank, init
from slices import Slices

import ms_ckpt_ext

action, strategy, truth = sys.argv[1:]
ms.set_device("CPU")
init()
rank = get_rank()
slices = Slices(truth, rank, prefix="" if action == "resume" else "adam_")
load = ms_ckpt_ext.resume if action == "resume" else ms_ckpt_ext.load_for_inference
state = load(slices.network, predict_strategy=strategy)  # what and how: MS_CKPT_EXT_…, set by the launcher

if wrong := slices.wrong():
    sys.exit(f"rank {rank}: wrong bytes in {wrong}")
print(
    f"DEMO rank {rank}: {len(slices.expected)} parameters of {state.checkpoint}, {state.mode}, "
    f"{state.bytes_read:,} bytes read, all equal; epoch {state.epoch}, step {state.step}, loss scale {state.loss_scale}"
)
