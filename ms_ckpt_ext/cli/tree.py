"""Parameters as a tree of the dotted parts of their names; numbered branches that are alike are shown once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ms_ckpt_ext.cli import words
from ms_ckpt_ext.core.geometry.groups import number_in

_DEEPEST = 64
"""Names are split at this many dots at most; the rest is one part."""


@dataclass
class _Node:
    """A branch, or a parameter (`kind` is set)."""

    kind: str = ""
    nbytes: int = 0
    leaves: int = 0
    below: dict[str, _Node] = field(default_factory=dict)

    def likeness(self) -> object:
        return self.kind, self.nbytes, tuple((name, node.likeness()) for name, node in self.below.items())


def tree_lines(parameters: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    """Lines of a tree.

    Args:
        parameters: (name, description, bytes) of each.
    """
    root = _Node()
    for name, kind, nbytes in parameters:
        node = root
        for part in name.split(".", _DEEPEST):
            node = node.below.setdefault(part, _Node())
            node.leaves, node.nbytes = node.leaves + 1, node.nbytes + nbytes
        node.kind = kind
    yield from _branch(root, "")


def _branch(node: _Node, indent: str) -> Iterator[str]:
    shown = [_joined(*entry) for entry in _folded(node.below)]
    for number, (name, copies, child) in enumerate(shown):
        last = number == len(shown) - 1
        total = f" ({words.size(child.nbytes * copies)})" if child.nbytes else ""
        if child.below:
            many = f"{copies} x " if copies > 1 else ""
            told = f"{many}{words.count(child.leaves, 'parameter')}{total}"
        else:
            told = f"{child.kind}{total}"
        yield f"{indent}{'└─ ' if last else '├─ '}{words.style(name, 'bold')}  {told}"
        yield from _branch(child, indent + ("   " if last else "│  "))


def _joined(name: str, copies: int, node: _Node) -> tuple[str, int, _Node]:
    """A branch with a single entry, and no parameter of its own, joined with that entry on one line."""
    while copies == 1 and not node.kind and len(node.below) == 1:
        ((part, below_copies, node),) = _folded(node.below)
        name, copies = f"{name}.{part}", below_copies
    return name, copies, node


def _folded(below: dict[str, _Node]) -> Iterator[tuple[str, int, _Node]]:
    """(name, how many, one of them): equal branches with consecutive numbers are folded into one."""
    numbers_of = {name: number_in(name) for name in below}
    numbered = sorted((number, name) for name, number in numbers_of.items() if number is not None)
    runs: list[tuple[list[int], _Node]] = []
    for number, name in numbered:
        node = below[name]
        if runs and runs[-1][0][-1] + 1 == number and runs[-1][1].likeness() == node.likeness():
            runs[-1][0].append(number)
        else:
            runs.append(([number], node))
    for numbers, node in runs:
        name = str(numbers[0]) if len(numbers) == 1 else f"[{numbers[0]}-{numbers[-1]}]"
        yield name, len(numbers), node
    for name, node in below.items():
        if numbers_of[name] is None:
            yield name, 1, node
