"""Trains the tiny Qwen3 of a YAML through MindFormers' Trainer: train_worker.py CONFIG RESULT [KEY=VALUE ...].

RESULT gets the exact losses of all steps, and whether our loader was in place. Values are YAML; a key may be dotted;
`without=TYPE` drops a callback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import standin
import numpy as np
import yaml
from mindformers import Trainer
from mindformers.core.context.build_context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import base_trainer
from mindspore.dataset import GeneratorDataset
from mindspore.train.callback import Callback

LENGTH, VOCABULARY, BATCHES = 32, 256, 4


class Losses(Callback):
    """Every step's loss, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ours = False

    def on_train_begin(self, run_context: Any) -> None:
        """Whose function MindFormers' trainer calls: ours wraps the one it stands for."""
        self.ours = hasattr(base_trainer.load_checkpoint, "__wrapped__")

    def on_train_step_end(self, run_context: Any) -> None:
        outputs = run_context.original_args().net_outputs
        loss = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        self.found.append(float(np.asarray(loss.asnumpy()).reshape(-1)[0]).hex())


def configure(path: str, changes: list[str]) -> MindFormerConfig:
    config = MindFormerConfig(path)
    for change in changes:
        dotted, _, text = change.partition("=")
        if dotted == "without":
            config.callbacks = [entry for entry in config.callbacks if entry["type"] != text]
            continue
        *outer, last = dotted.split(".")
        place = config
        for key in outer:
            place = place[key]
        place[last] = yaml.safe_load(text)
    return config


def dataset() -> Any:
    rng = np.random.RandomState(0)
    rows = []
    for _ in range(2 * BATCHES):
        tokens = rng.randint(0, VOCABULARY, LENGTH).astype(np.int32)
        rows.append((tokens, tokens, np.ones(LENGTH, np.float32), np.arange(LENGTH, dtype=np.int32)))
    columns = ["input_ids", "labels", "loss_mask", "position_ids"]
    return GeneratorDataset(rows, column_names=columns, shuffle=False).batch(2)


def main() -> None:
    config = configure(sys.argv[1], sys.argv[3:])
    os.environ["RUN_MODE"] = config.run_mode
    build_context(config)
    standin.operators()
    losses = Losses()
    Trainer(args=config, task="text_generation", train_dataset=dataset(), callbacks=[losses]).train()
    Path(sys.argv[2]).write_text(json.dumps({"losses": losses.found, "ours": losses.ours}))


main()
