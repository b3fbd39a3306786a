"""Two outcomes of one case: what differs, and who is right."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Optional

from tests.stock.fuzz.cases import Case
from tests.stock.fuzz.model import Array
from tests.stock.fuzz.sides import Outcome

_ACCIDENTS = (KeyError, AttributeError, IndexError, UnboundLocalError, ZeroDivisionError, AssertionError)
"""What stock raises where it did not mean to: any error of ours will do."""
_SAID_BY_ACCIDENT = (
    "not supported between instances", "object is not iterable", "'NoneType'", "expected str, bytes or os.PathLike",
    "C++ Call Stack", "Error while deserializing", "not all arguments converted", "argument must be",
    "object is not subscriptable", "object is not callable", "unsupported operand", "codec can't decode",
)  # fmt: skip


class Difference(NamedTuple):
    """One thing that differs.

    Attributes:
        kind: "refused" (stock gives a result, ours an error), "served" (the other way), "error type", "value",
            "files", "names", "dtype", "shape", "bytes", "order", "raw", "map", "silent".
        where: a file, and a parameter where there is one.
        right: "ours", "stock", "either", "neither" or "unknown", by the truth of the case.
        told: what both sides have.
    """

    kind: str
    where: tuple[str, ...]
    right: str
    told: str


def compare(case: Case, stock: Outcome, ours: Outcome) -> list[Difference]:
    if stock.error is not None or ours.error is not None:
        return _errors(case, stock, ours)
    found = _silent(stock)
    found += _values(case, stock, ours)
    found += _files(case, stock, ours)
    for file in sorted(stock.tensors.keys() & ours.tensors.keys()):
        found += _tensors(case, file, stock, ours)
    return found


def _errors(case: Case, stock: Outcome, ours: Outcome) -> list[Difference]:
    told = f"stock: {_said(stock.error)}; ours: {_said(ours.error)}"
    mistake = "mistake" in case.tags
    if stock.error is None:
        right = "unknown" if mistake else "stock" if not case.refusal and _true(case, stock) else "ours"
        return [Difference("refused", (type(ours.error).__name__,), right, f"{told}; {case.refusal}")]
    if ours.error is None:
        right = "unknown" if mistake else "stock" if case.refusal else "ours" if _true(case, ours) else "unknown"
        return [Difference("served", (type(stock.error).__name__,), right, told)]
    if isinstance(ours.error, _builtin(stock.error)) or _is_accident(stock.error) or "torn" in case.tags:
        return [] if not _changed(ours) else [Difference("changed", tuple(_changed(ours)), "unknown", told)]
    return [Difference("error type", (type(stock.error).__name__, type(ours.error).__name__), "unknown", told)]


def _builtin(error: BaseException) -> type:
    """The built-in type of an error, which an `except` clause may name."""
    return next(kind for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _is_accident(error: BaseException) -> bool:
    return isinstance(error, _ACCIDENTS) or any(text in str(error) for text in _SAID_BY_ACCIDENT)


def _changed(outcome: Outcome) -> list[str]:
    return sorted(outcome.files)


def _said(error: Optional[BaseException]) -> str:
    return "no error" if error is None else f"{type(error).__name__}: {str(error)[:300]}"


def _true(case: Case, outcome: Outcome) -> bool:
    """Whether an outcome is what the case expects."""
    for file, held in case.expected.items():
        found = outcome.tensors.get(file, {})
        needed = held.keys() - case.optional
        if not needed <= found.keys() or any(not _same(found[n], held[n]) for n in found.keys() & held.keys()):
            return False
        if case.only and any(name not in held and not name.startswith("accu_grads") for name in found):
            return False
    return bool(case.expected)


def _same(one: Array, two: Array) -> bool:
    return (one.dtype, one.shape, one.data) == (two.dtype, two.shape, two.data)


def _silent(stock: Outcome) -> list[Difference]:
    return [Difference("silent", (type(error).__name__,), "ours", _said(error)) for error in stock.silent[:1]]


def _values(case: Case, stock: Outcome, ours: Outcome) -> list[Difference]:
    if stock.value is None or stock.value == ours.value or _unordered(stock.value) == _unordered(ours.value):
        return []
    if isinstance(stock.value, dict) and isinstance(ours.value, dict):  # which names they have is told elsewhere
        both = stock.value.keys() & ours.value.keys()
        stock, ours = (each._replace(value={n: each.value[n] for n in both}) for each in (stock, ours))
    if _unnamed(stock.value) == _unnamed(ours.value):
        told = f"stock: {stock.value!r:.300}; ours: {ours.value!r:.300}"
        return [Difference("parameter names", (case.function,), "ours", told)]
    return [Difference("value", (case.function,), "unknown", f"stock: {stock.value!r:.300}; ours: {ours.value!r:.300}")]


def _unordered(value: Any) -> Any:
    """What a load answers; its second list has no defined order."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(each, list) for each in value):
        return value[0], sorted(value[1])
    return value


def _unnamed(value: Any) -> Any:
    """A dictionary of Parameters without the names that MindSpore gives to those that have none."""
    if not isinstance(value, dict):
        return value
    return {key: each[0::2] if isinstance(each, tuple) else each for key, each in value.items()}


def _files(case: Case, stock: Outcome, ours: Outcome) -> list[Difference]:
    found = []
    for file in sorted(stock.files.keys() ^ ours.files.keys()):
        mine = file in ours.files
        expected = file in case.expected
        right = "unknown" if not case.expected else "ours" if mine == expected else "stock"
        found.append(Difference("files", (file,), right, f"only {'ours' if mine else 'stock'} writes it"))
    for file in sorted(stock.files.keys() & ours.files.keys()):
        one, two = stock.files[file], ours.files[file]
        if one == two:
            continue
        if file.endswith(".json"):
            if json.loads(one) != json.loads(two):
                found.append(Difference("map", (file,), "unknown", f"stock: {one!r:.500}; ours: {two!r:.500}"))
        elif (
            file not in stock.tensors
            or file not in ours.tensors
            or stock.tensors[file].keys() != ours.tensors[file].keys()
        ):
            if file not in stock.tensors:
                found.append(Difference("raw", (file,), "unknown", "not the same bytes"))
        elif list(stock.tensors[file]) != list(ours.tensors[file]):
            told = f"stock: {list(stock.tensors[file])}; ours: {list(ours.tensors[file])}"
            found.append(Difference("order", (file,), "unknown", told))
        elif all(_same(a, ours.tensors[file][n]) for n, a in stock.tensors[file].items()):
            found.append(Difference("raw", (file,), "unknown", f"stock: {one!r:.200}; ours: {two!r:.200}"))
    return found


def _tensors(case: Case, file: str, stock: Outcome, ours: Outcome) -> list[Difference]:
    theirs, mine = stock.tensors[file], ours.tensors[file]
    truth = case.expected.get(file)
    found = []
    for name in sorted(theirs.keys() ^ mine.keys()):
        held = "ours" if name in mine else "stock"
        right = "unknown"
        if name in case.optional:
            right = "either"
        elif truth is not None:
            right = ("ours" if name in mine else "stock") if name in truth else ("stock" if name in mine else "ours")
        found.append(Difference("names", (file, name), right, f"only {held} has it"))
    for name in sorted(theirs.keys() & mine.keys()):
        if not _same(theirs[name], mine[name]):
            found.append(_tensor(file, name, theirs[name], mine[name], (truth or {}).get(name)))
        elif truth is not None and name in truth and not _same(truth[name], mine[name]):
            told = f"both: {mine[name].dtype}{mine[name].shape}; truth {truth[name].dtype}{truth[name].shape}"
            found.append(Difference("both wrong", (file, name), "neither", told))
    return found


def _tensor(file: str, name: str, theirs: Array, mine: Array, truth: Optional[Array]) -> Difference:
    kind = "dtype" if theirs.dtype != mine.dtype else "shape" if theirs.shape != mine.shape else "bytes"
    right = "unknown"
    if truth is not None:
        right = "ours" if _same(mine, truth) else "stock" if _same(theirs, truth) else "neither"
    told = f"stock: {theirs.dtype}{theirs.shape}; ours: {mine.dtype}{mine.shape}"
    return Difference(kind, (file, name), right, told)
