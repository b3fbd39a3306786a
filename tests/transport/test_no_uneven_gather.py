"""AllGatherV, which several products lack, is called nowhere: not by the package, and by no load that was planned."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.transport.local import LocalTransport
from tests.support.counting import counted
from tests.support.loads import Load, Loaded, wide_source

PACKAGE = Path(ms_ckpt_ext.__file__).parent
UNEVEN = {"AllGatherV", "HcclAllGatherV", "all_gather_into_tensor_uneven", "DistCommAllGatherIntoTensorUneven"}
USED = {"all_gather_into_tensor", "all_gather", "all_to_all_single", "broadcast", "scatter", "isend", "irecv"}


def called(path: Path) -> set[str]:
    """What a module calls of MindSpore's collectives, by any name that it uses or imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
    return found & (UNEVEN | USED)


def test_the_package_calls_what_every_product_has() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): called(path) for path in PACKAGE.rglob("*.py")}
    assert set().union(*found.values()) == USED, "the names that are looked for are those that are used"
    speaking = {name for name, calls in found.items() if calls & (UNEVEN | {"all_gather_into_tensor", "irecv"})}
    assert speaking == {"transport/hccl.py"}, "one module speaks to HCCL"


class Counting(Load):
    """Counts the calls of every rank, and the sizes that members of a group give to their gathers."""

    def host(self, rank: int) -> str:
        return f"server {rank // 3}"

    def rank(self, transport: LocalTransport) -> Loaded:
        self.calls = getattr(self, "calls", Counter[str]())
        self.shares = getattr(self, "shares", {})
        gather = transport.start_all_gather

        def noted(send: Any, nbytes: int, recv: Any, group: tuple[int, ...] = ()) -> Any:
            self.shares.setdefault(group, {}).setdefault(transport.rank, []).append(nbytes)
            return gather(send, nbytes, recv, group)

        transport.start_all_gather = noted  # type: ignore[method-assign]
        counts = counted(transport)
        loaded = super().rank(transport)
        self.calls.update(counts.collectives)
        return loaded


@pytest.mark.parametrize(
    "target", [Layout((8, 1), ((), ())), Layout((4, 2), ((0,), ())), Layout((4, 2), ((), (0,)))], ids=str
)
def test_a_load_makes_three_kinds_of_calls(target: Layout, tmp_path: Path) -> None:
    """By eight ranks on servers of three, three and two, where an uneven gather is refused by every product."""
    made = wide_source(tmp_path, Layout((2, 4), ((0,), ())), target)
    load = Counting(made.source, made.trained, made.target, bucket_bytes=1 << 18, verify="none")
    load.run()
    assert load.calls.keys() <= {"share", "all_to_all", "all_gather", "broadcast"}
    assert bool(load.calls["all_gather"]) == (target.parts[1] == 1)
    for group, by_rank in load.shares.items():
        assert sorted(by_rank) == sorted(group)
        assert len({tuple(sizes) for sizes in by_rank.values()}) == 1, "all give equally much"
