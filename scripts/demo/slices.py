"""The slices that one rank must end up with, and a network that has Parameters of those names, filled with poison."""

from pathlib import Path

import mindspore as ms
import numpy as np

from ms_ckpt_ext.formats.registry import read_index

_DTYPES = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16}


class Slices:
    """What `truth/rank_N/net.safetensors` holds, as MindSpore cut it: `network` is to be given these bytes.

    Args:
        truth: the directory.
        rank: N.
        prefix: parameters whose names begin with this are left out; "" leaves none out.
    """

    def __init__(self, truth: str, rank: int, prefix: str = "") -> None:
        index = read_index(f"{truth}/rank_{rank}/net.safetensors")
        kept = {name: entry for name, entry in index.tensors.items() if not (prefix and name.startswith(prefix))}
        contents = Path(index.path).read_bytes()
        self.expected = {
            name: contents[extent.offset : extent.offset + extent.length]
            for name, entry in kept.items()
            for extent in entry.extents
        }
        self.network = ms.nn.Cell()
        self.network.held = ms.ParameterTuple(
            ms.Parameter(ms.Tensor(np.full(entry.shape, 777), _DTYPES[entry.dtype.name]), name=name)
            for name, entry in kept.items()
        )

    def wrong(self) -> list:
        """Names of Parameters that hold other bytes."""
        return [p.name for p in self.network.get_parameters() if p.asnumpy().tobytes() != self.expected[p.name]]
