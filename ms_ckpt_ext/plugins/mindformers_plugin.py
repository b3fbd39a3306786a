"""MindFormers loads checkpoints through this package when its YAML asks for it.

    export REGISTER_PATH="$(python -m ms_ckpt_ext.plugins)"

    callbacks:
      - type: Resharding
        auto_register: mindformers_plugin.Resharding
        mode: auto

MindFormers copies this file and imports the copy, so its imports are absolute. The entry is a callback
because MindFormers makes its callbacks before it loads a checkpoint; during training it does nothing.
"""

from __future__ import annotations

from typing import Any, Optional

from mindspore.train.callback import Callback

from ms_ckpt_ext.api.mindspore.install import install
from ms_ckpt_ext.bridge.mindformers import seam
from ms_ckpt_ext.bridge.mindformers.options import Options


class Resharding(Callback):
    """Installs this package's loaders when it is constructed.

    Args:
        mode: "direct", "cooperative" or "auto", as in `ms_ckpt_ext.load_distributed_checkpoint`.
        verify: "none" or "replicas".
        bucket_bytes: staging memory of a rank for one round of a cooperative load; None for what fits.
        workers: reading threads of a rank.
        hardware: profile of the machine, a name or the path of a file; "" for the one that fits.
    """

    def __init__(
        self,
        mode: str = "auto",
        verify: str = "none",
        bucket_bytes: Optional[int] = None,
        workers: int = 4,
        hardware: str = "",
        **_: Any,
    ) -> None:
        super().__init__()
        install()
        seam.install(Options(mode, verify, bucket_bytes, workers, hardware))
