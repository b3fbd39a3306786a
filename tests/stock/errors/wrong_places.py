"""Inputs of every function of the family, and what goes wrong with each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from tests.support import family


class Places(NamedTuple):
    """Where things are: good ones in `good`, others below `base`."""

    base: Path
    good: Path
    counter: list[int]

    def at(self, name: str) -> str:
        return str(self.base / name)

    def out(self, suffix: str = "") -> str:
        """A name that nothing has yet."""
        self.counter.append(1)
        return str(self.base / f"out_{len(self.counter)}{suffix}")

    def files(self, kind: str = "ckpt") -> dict[int, str]:
        return {rank: str(self.good / kind / f"rank_{rank}" / f"net.{kind}") for rank in range(2)}

    def shards(self, kind: str = "ckpt") -> str:
        return str(self.good / kind)

    @property
    def strategy(self) -> str:
        return str(self.good / "strategy.ckpt")


def places(base: Path) -> Places:
    """Good inputs, and what goes wrong with each."""
    good = family.checkpoint(base / "good")
    held = Places(base, good, [])
    (base / "file").write_text("x")
    (base / "folder.ckpt").mkdir()
    (base / "empty").mkdir()
    (base / "empty.ckpt").touch()
    (base / "junk.ckpt").write_bytes(b"\xff\xfejunk")
    (base / "junk.json").write_text("{bad")
    _safetensors(base)
    _trees(base, good)
    _strategies(base, good)
    return held


def _safetensors(base: Path) -> None:
    """Each breaks another rule of the format."""
    tensor = '{"w":{"dtype":"F32","shape":[%d],"data_offsets":[%d,8]}}'
    for name, header, data in (
        ("shorter", b"abc", b""),
        ("cut", (1000).to_bytes(8, "little"), b""),
        ("huge", (1 << 40).to_bytes(8, "little"), b""),
        ("offset", None, tensor % (1, 4)),
        ("shape", None, tensor % (3, 0)),
        ("longer", None, tensor % (2, 0) + "!"),
    ):
        text = data.rstrip("!").encode() if isinstance(data, str) else b""
        head = len(text).to_bytes(8, "little") + text + bytes(8 + 4 * (name == "longer")) if header is None else header
        (base / f"{name}.safetensors").write_bytes(head)


def _trees(base: Path, good: Path) -> None:
    for kind in ("ckpt", "safetensors"):
        shutil.copytree(good / kind, base / "both", dirs_exist_ok=True)
        lacking = shutil.copytree(good / kind, base / f"lacking_{kind}")
        shutil.rmtree(lacking / "rank_1")
        torn = shutil.copytree(good / kind, base / f"torn_{kind}") / "rank_1" / f"net.{kind}"
        torn.write_bytes(torn.read_bytes()[:50])
        several = shutil.copytree(good / kind, base / f"several_{kind}")
        for rank in range(2):
            file = several / f"rank_{rank}" / f"net.{kind}"
            for name in ("a_1-1_2", "b_1-1_2", "a_x", "b_x", "a12", "b12"):
                shutil.copy(file, file.with_name(f"{name}.{kind}"))
            file.unlink()
    shutil.copytree(good / "merged", base / "without_map")
    (base / "without_map" / "param_name_map.json").unlink()
    shutil.copy(base / "without_map" / "part0.safetensors", base / "without_map" / "part1.safetensors")
    listed = shutil.copytree(good / "merged", base / "part_gone") / "param_name_map.json"
    listed.write_text(listed.read_text().replace("part0", "part1"))
    (base / "folder_in_it" / "part0.safetensors").mkdir(parents=True)


def _strategies(base: Path, good: Path) -> None:
    def folder(name: str, **files: bytes) -> None:
        (base / name).mkdir()
        for file, contents in files.items():
            (base / name / file.replace("_", ".")).write_bytes(contents)

    strategy = (good / "strategy.ckpt").read_bytes()
    folder("stages_both", a_ckpt=strategy, b_json=b"{}")
    folder("stages_empty", a_ckpt=b"")
    folder("stages_junk", a_ckpt=b"\xff\xfejunk")
    folder("stages_json", a_json=b'{"parallel_layout_item": {}}')
    shard = b'"field": 0, "opt_weight_shard_size": 0, "opt_weight_shard_step": 0'
    layout = b'{"dev_matrix": [2], "tensor_map": [0, -1], ' + shard + b"}"
    for name, contents in (
        ("nothing_in.json", b"{}"),
        ("no_devices.json", layout.replace(b"[2]", b"[]").join((b'{"parallel_layout_item": {"a.w": ', b"}}"))),
        ("stage_1.json", layout.join((b'{"parallel_layout_item": {"1-a.w": ', b"}}"))),
        ("damaged.json", layout.join((b'{"parallel_layout_item": {"1-2-a.w": ', b"}}"))),
    ):
        (base / name).write_bytes(contents)
