"""Trains the tiny Qwen3 of a YAML through MindFormers' Trainer: train_worker.py CONFIG RESULT [KEY=VALUE ...].

RESULT gets the exact losses of all steps, digests of all parameters and optimizer states when the first step begins,
and who loaded. Values are YAML; a key may be dotted; `without=TYPE` drops a callback. `-- RESULT [KEY=VALUE ...]` is
one more training, in a process of its own that need not import everything again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import standin
import mindspore as ms
import numpy as np
import pytest
import yaml
from mindformers import Trainer
from mindformers.core.context.build_context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import base_trainer
from mindspore.communication import get_group_size, get_rank
from mindspore.dataset import GeneratorDataset
from mindspore.train.callback import Callback

from ms_ckpt_ext.bridge import names
from tests.support.machine import watch_reads

LENGTH, VOCABULARY, BATCHES = 32, 256, 4


class Losses(Callback):
    """Every step's loss, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ours = False
        self.begun: dict[str, str] = {}

    def on_train_begin(self, run_context: Any) -> None:
        """Note whose function MindFormers' trainer calls (ours wraps the one that it replaces), and all values."""
        self.ours = hasattr(base_trainer.load_checkpoint, "__wrapped__")
        network = run_context.original_args().train_network
        for parameter in network.get_parameters():
            self.begun[parameter.name] = hashlib.sha256(parameter.asnumpy().tobytes()).hexdigest()

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


class Counts:
    """Calls of MindSpore's own functions that fill a network, and bytes that this package has read."""

    def __init__(self) -> None:
        self.stock = 0
        self.reads = watch_reads(pytest.MonkeyPatch())
        fill = ms.load_param_into_net

        def counted_fill(*args: Any, **named: Any) -> Any:
            self.stock += 1
            return fill(*args, **named)

        names.replace({fill: counted_fill}, everywhere=True)


def main(path: str, result: str, *changes: str) -> None:
    config = configure(path, list(changes))
    os.environ["RUN_MODE"] = config.run_mode
    if config.use_parallel:
        standin.affinity()
    build_context(config)
    standin.operators()
    if config.use_parallel:
        standin.collectives(get_rank(), get_group_size())
    counts, losses = Counts(), Losses()
    Trainer(args=config, task="text_generation", train_dataset=dataset(), callbacks=[losses]).train()
    told = {"losses": losses.found, "ours": losses.ours, "begun": losses.begun, "stock": counts.stock}
    told["read"] = sum(read.nbytes for read in counts.reads)
    Path(result).write_text(json.dumps(told))


def forked(path: str, words: list[str]) -> int:
    """One training in a child of this process; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        main(path, *words)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


config_path, *rest = sys.argv[1:]
trainings = [list(words) for other, words in itertools.groupby(rest, lambda word: word == "--") if not other]
if len(trainings) == 1:
    main(config_path, *trainings[0])
elif any(forked(config_path, words) for words in trainings):
    sys.exit(1)
