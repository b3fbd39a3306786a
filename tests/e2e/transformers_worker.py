"""transformers on the CPU, in an environment that has torch: transformers_worker.py make|compare|generate ...

make ROOT         ROOT/FAMILY/config.json to ROOT/FAMILY/hub: a model of that configuration with random weights
compare ROOT      loads ROOT/FAMILY/hub and ROOT/FAMILY/out: logits equal bit for bit; prints what it found, as JSON
generate FOLDER   loads one model; prints the tokens that it generates, as JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.arange(48).reshape(2, 24) % 60


def make(root: Path) -> dict[str, Any]:
    found = {}
    for config in sorted(root.glob("*/config.json")):
        torch.manual_seed(len(found))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).to(torch.bfloat16)
        for parameter in model.state_dict().values():
            if parameter.dtype.is_floating_point:
                parameter.normal_()  # biases and corrections are zero at birth, norms one
        model.save_pretrained(config.parent / "hub", max_shard_size="50KB")
        found[config.parent.name] = {name: list(held.shape) for name, held in model.state_dict().items()}
    return found


def loaded(folder: Path) -> Any:
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def compare(root: Path) -> dict[str, Any]:
    found = {}
    for hub in sorted(root.glob("*/hub")):
        with torch.no_grad():
            pair = [loaded(folder)(TOKENS).logits for folder in (hub, hub.with_name("out"))]
        assert all(bool(torch.isfinite(logits).all()) for logits in pair), hub
        spread = float(pair[0].float().std())
        found[hub.parent.name] = {"equal": torch.equal(*pair), "spread": spread, "shape": list(pair[0].shape)}
    return found


def generate(folder: Path) -> list[int]:
    model = loaded(folder)
    made = model.generate(TOKENS[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    return [int(token) for token in made[0]]


what, where = sys.argv[1:]
print(json.dumps({"make": make, "compare": compare, "generate": generate}[what](Path(where))))
