"""Random calls of what converts between formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, Optional

from tests.stock.fuzz.cases import Case, Place, write_source
from tests.stock.fuzz.files import write
from tests.stock.fuzz.model import Wishes, random_model


def convert_file(rng: Random, root: Path) -> Case:
    """ckpt_to_safetensors and safetensors_to_ckpt, of a file"""
    model = random_model(rng, Wishes(target=False))
    kind = rng.choice(["ckpt", "safetensors"])
    held = model.rank(0)
    write(root / "in" / f"net.{kind}", held)
    other, function = _conversion(kind)
    named: dict[str, Any] = {}
    if rng.random() < 0.7:
        named["save_path"] = Place("out")
    if rng.random() < 0.3:
        named["processes_num"] = 2
    renamed = _name_map(rng, held)
    if renamed is not None:
        named["name_map"] = renamed
    if rng.random() < 0.1:
        named["file_name_regex"] = rng.choice(["net", "other", "n.t"])
    folder = "out" if "save_path" in named else "in"
    expected = {(renamed or {}).get(n, n): a for n, a in held.items()}
    met = re.search(named.get("file_name_regex", ""), f"in/net.{kind}")
    return Case(
        function, (Place(f"in/net.{kind}"),), named, model, {f"{folder}/net.{other}": expected},
        refusal="" if met else "the file is not meant",
    )  # fmt: skip


def convert_tree(rng: Random, root: Path) -> Case:
    """ckpt_to_safetensors and safetensors_to_ckpt, of rank folders"""
    model = random_model(rng, Wishes(target=False))
    source = write_source(rng, model, root, dedup=False, tidy=True)
    other, function = _conversion(source.kind)
    named: dict[str, Any] = {"save_path": Place("out")} if rng.random() < 0.7 else {}
    if rng.random() < 0.3:
        named["file_name_regex"] = rng.choice(["net", "llama", "other"])
    names = [f"rank_{r}/{source.stem.format(r)}" for r in range(model.source.world)]
    met = [bool(re.search(named.get("file_name_regex", ""), f"{name.split('/')[1]}.{source.kind}")) for name in names]
    folder = "out" if "save_path" in named else "src"
    expected = {f"{folder}/{n}.{other}": model.rank(r) for r, n in enumerate(names) if met[r]}
    return Case(function, (Place("src"),), named, model, expected, refusal="" if any(met) else "no file is meant")


def _conversion(kind: str) -> tuple[str, str]:
    return ("safetensors", "ckpt_to_safetensors") if kind == "ckpt" else ("ckpt", "safetensors_to_ckpt")


def _name_map(rng: Random, names: Mapping[str, Any]) -> Optional[dict[str, str]]:
    if rng.random() < 0.7:
        return None
    return {name: f"model.{name}" for name in names if rng.random() < 0.5}
