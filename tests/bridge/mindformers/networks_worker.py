"""Builds networks as MindFormers does, and tells what their parameters are: networks_worker.py YAML ROOT.

ROOT/cases.json has, for each case, the class of the network, that of its configuration (both as "module:name") and
what config.json says; a case that is `legacy` is built as MindFormers' older models are. ROOT/shapes.json gets name ->
shape for each. ROOT/CASE/converters gets what converters of the class make of the model in ROOT/CASE/hub, if it has
some, and ROOT/CASE/function what its function makes of it, where the case says that it `converts`.
"""

from __future__ import annotations

import importlib
import json
import sys
from multiprocessing import Condition, Manager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import standin  # noqa: F401 - before mindformers
import numpy as np
from mindformers.core.context.build_context import MFContextOperator, build_context
from mindformers.tools.register import MindFormerConfig
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext
from ms_ckpt_ext.bridge.mindformers.converters import rules_for


def named(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(f"mindformers.{module}"), name)


def convert(network: Any, model: Any, case: Path) -> None:
    """By the function of the network's class."""
    held = {name: array for file in sorted(case.glob("hub/*.safetensors")) for name, array in load_file(file).items()}
    (case / "function").mkdir()
    with Manager() as manager:
        shared = {"qkv_dict": manager.dict(), "condition": Condition()}
        found = network.convert_weight_dict(held, model_config=model, **shared)
    save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, case / "function/model.safetensors")


def main(yaml: str, root: Path) -> None:
    config = MindFormerConfig(yaml)
    config.callbacks = []
    build_context(config)
    shapes = {}
    for name, case in json.loads((root / "cases.json").read_text()).items():
        MFContextOperator.get_mf_ctx_instance().use_legacy = case["legacy"]
        model = named(case["config class"])(**case["config"])
        network = named(case["network"])(model)
        shapes[name] = {parameter.name: list(parameter.shape) for parameter in network.get_parameters()}
        if hasattr(network, "template"):
            rules = rules_for(network)
            ms_ckpt_ext.merge(root / name / "hub", root / name / "converters", rules=rules, digests=False, sync=False)
        if case["converts"]:
            convert(network, model, root / name)
    (root / "shapes.json").write_text(json.dumps(shapes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
