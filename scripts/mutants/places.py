"""Where a module may be changed, and what it is then."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

SWAPPED = ["Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is"]
ARITHMETIC = ["Add_Sub", "Sub_Add", "Mul_FloorDiv", "FloorDiv_Mul", "Div_Mul", "Mod_FloorDiv", "Pow_Mul"]
BITS = ["RShift_LShift", "LShift_RShift", "BitOr_BitAnd", "BitAnd_BitOr", "BitXor_BitOr"]
OPERATORS = [
    *(f"ReplaceComparisonOperator_{name}" for name in SWAPPED),
    *(f"ReplaceBinaryOperator_{name}" for name in (*ARITHMETIC, *BITS)),
    *(f"ReplaceUnaryOperator_{name}" for name in ("Delete_USub", "Delete_Not", "Delete_Invert")),
    *("AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
    *("ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop"),
]


class LeaveAway(Operator):
    """Leave a statement away that calls something or changes a value in place."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """See `Operator`."""
        if node.type != "simple_stmt":
            return
        first = node.children[0]
        changed = first.type == "expr_stmt" and first.children[1].type == "operator" and first.children[1].value != "="
        augmented = first.type == "expr_stmt" and first.children[1].type == "augassign"
        if changed or augmented or first.type in ("atom_expr", "power"):
            yield first.start_pos, first.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """See `Operator`."""
        old = node.children[0]
        node.children[0] = parso.python.tree.Name("pass", old.start_pos, prefix=old.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        """See `Operator`."""
        return ()


class Mutant(NamedTuple):
    """A module with one fault in it; `line` is where."""

    module: Path
    operator: str
    line: int
    code: str
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What it is known by when lines move: the module, and the changed lines."""
        return self.module.stem, self.before, self.after


class Place(NamedTuple):
    """Where an operator may change something: the `number`-th place of those that it finds in a statement."""

    operator: str
    number: int
    line: int
    before: str
    statement: str
    after: str


def places_of(source: str) -> list[Place]:
    """All places in a module."""
    left_alone = [*_left_alone(ast.parse(source))]
    statements = [(node, node.get_code()) for node in get_ast(source).children]
    found = []
    for at, (statement, text) in enumerate(statements):
        nodes = [*ast_nodes(statement)]
        rest = "".join(other for _, other in statements[:at]), text, "".join(other for _, other in statements[at + 1 :])
        for name in (*OPERATORS, LeaveAway.__name__):
            positions = (position for node in nodes for position in _operator(name).mutation_positions(node))
            for number, (start, _) in enumerate(positions):
                if not any(low <= start < high for low, high in left_alone):
                    found.append(Place(name, number, start[0], *rest))
    return found


@cache
def _operator(name: str) -> Operator:
    return LeaveAway() if name == LeaveAway.__name__ else get_operator(f"core/{name}")()


def mutant_of(module: Path, place: Place) -> Optional[Mutant]:
    """A module with a fault; None where that is no Python."""
    faulty = mutate_code(place.statement, _operator(place.operator), place.number)
    code = place.before + faulty + place.after
    if not _compiles(code):
        return None
    changed = [*difflib.unified_diff(place.statement.split("\n"), faulty.split("\n"), lineterm="", n=0)][2:]
    before, after = (" ".join(text[1:].strip() for text in changed if text[0] == sign) for sign in "-+")
    return Mutant(module, place.operator, place.line, code, before, after)


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _left_alone(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing is changed: annotations and types, decorators, errors, imports for type checkers only."""
    for node in ast.walk(tree):
        part: Any = None
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            part = node.annotation
        elif isinstance(node, ast.FunctionDef):
            part = node.returns
            for each in node.decorator_list:
                yield (each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0)
        elif (
            isinstance(node, ast.Raise)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            or (isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("Union[", "Callable[")))
        ):
            part = node
        if part is not None:
            yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)
