"""A load of a small model by one rank, cooperatively: imports_worker.py load|resume DIR; tells what was imported."""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from safetensors.numpy import save_file

import ms_ckpt_ext

what, directory = sys.argv[1], Path(sys.argv[2])
contents = np.arange(64, dtype=np.float32).reshape(8, 8)
save_file({"weight": contents}, directory / "net-1_2.safetensors")
network = ms.nn.Cell()
network.insert_param_to_cell("weight", ms.Parameter(ms.Tensor(np.zeros_like(contents)), name="weight"))
if what == "load":
    ms_ckpt_ext.load_distributed_checkpoint(
        network, format="safetensors", unified_safetensors_dir=directory, mode="cooperative"
    )
else:
    ms_ckpt_ext.resume(network, checkpoint_dir=directory, mode="cooperative")
assert network.weight.asnumpy().tobytes() == contents.tobytes()
ours = [name for name in sys.modules if name.startswith("ms_ckpt_ext")]
print(*sorted(name for name in ours if not hasattr(sys.modules[name], "__path__")))
