"""Random calls of what merges: checkpoints, and strategies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Callable, Optional

from tests.stock.fuzz.cases import Case, Place, merged, strategy_form, write_source
from tests.stock.fuzz.files import write_strategy
from tests.stock.fuzz.model import Wishes, random_model

Choice = Callable[[str], Any]


def unify(rng: Random, root: Path) -> Case:
    """unified_safetensors"""
    model = random_model(rng, Wishes(target=False))
    source = write_source(rng, model, root, "safetensors")
    named: dict[str, Any] = {}
    if source.dedup or rng.random() < 0.3:
        named["merge_with_redundancy"] = not source.dedup
    choice = choice_of(rng, model.parameters)
    if choice is not None:
        named["choice_func"] = choice
    if rng.random() < 0.3:
        named["max_process_num"] = rng.choice([1, 2, 8])
    if rng.random() < 0.1:
        named["split_dst_file"] = (1, 1)
    if source.stem == "llama_rank_{}-3_1200" and rng.random() < 0.5:
        named["file_suffix"] = rng.choice(["3_1200", "-3_1200", "1200", "_1200"])
    chosen = {n: called(choice, n) for n in model.parameters if n in model.source.listed}
    parts = {
        new: model.parameters[name]
        for name, new in chosen.items()
        if new is not None and not name.startswith("accu_grads")
    }
    unlisted = {n: a for n, a in model.parameters.items() if n not in model.source.listed}
    torn = {n for n in model.unlisted_cut if not called(choice, n)}  # what is outside is left out only on that account
    unlisted = {n: a for n, a in unlisted.items() if n not in torn}
    expected = {"out/part0.safetensors": parts, "out/hyper_param.safetensors": {**unlisted, **model.extras}}
    return Case(
        "unified_safetensors",
        (Place("src"), Place(source.strategy), Place("out")),
        named,
        model,
        {file: held for file, held in expected.items() if held},
        refusal=merged(model, choice).refusal or ("" if parts else "nothing is left"),
    )


def choice_of(rng: Random, names: Mapping[str, Any]) -> Optional[Choice]:
    """A choice function: leaves out, renames, or both."""
    if rng.random() < 0.65:
        return None
    dropped = set(rng.sample(sorted(names), rng.randint(0, max(0, len(names) // 2))))
    renamed = set(rng.sample(sorted(names), rng.randint(0, len(names))))
    if rng.random() < 0.5:
        renamed = set()

    def choice(name: str) -> Any:
        if name in dropped:
            return False
        return f"model.{name}" if name in renamed else True

    return choice


def called(choice: Optional[Choice], name: str) -> Optional[str]:
    """What a choice function makes of a name; None where it leaves it out."""
    said = True if choice is None else choice(name)
    return said if isinstance(said, str) else name if said else None


def strategies(rng: Random, root: Path) -> Case:
    """merge_pipeline_strategys"""
    model = random_model(rng, Wishes(target=False))
    job = model.source
    form = strategy_form(rng, job)
    for stage in range(job.stages):
        every = rng.random() < 0.3
        for local in range(job.devices if every else 1):
            write_strategy(root / "strategies" / f"s_rank_{stage * job.devices + local}.{form}", job, stage, form)
    return Case("merge_pipeline_strategys", (Place("strategies"), Place(f"merged_strategy.{form}")), {}, model, {})
