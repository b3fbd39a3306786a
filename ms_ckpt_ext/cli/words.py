"""Numbers, tables and emphasis for people."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Optional

from ms_ckpt_ext.errors import spelled

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}
_STYLED = re.compile(rf"(\033\[(?:0|{'|'.join(_CODES.values())})m)")
MOST_LISTED = 20
"""Rows of a table that people read at a glance; `--all` and `--json` show the others too."""


def size(nbytes: float) -> str:
    """Bytes in binary units.

    >>> size(1536), size(7), size(3 << 30)
    ('1.5 KiB', '7 B', '3.0 GiB')
    """
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun.

    >>> count(1, "rank"), count(2400, "parameter"), count(2, "copy", "copies")
    ('1 rank', '2,400 parameters', '2 copies')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def ranges(numbers: Sequence[int], comma: str = ", ", least: int = 3) -> str:
    """Ascending integers as text; runs of at least `least` numbers become ranges.

    >>> ranges([0, 1, 2, 5]), ranges([3, 4])
    ('0-2, 5', '3, 4')
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return comma.join(f"{run[0]}-{run[-1]}" if len(run) >= least else comma.join(map(str, run)) for run in runs)


def shape(extents: Optional[Sequence[int]]) -> str:
    """A shape, as numpy users write it.

    >>> shape([2, 3]), shape([])
    ('[2, 3]', '[]')
    """
    return "-" if extents is None else "[" + ", ".join(map(str, extents)) + "]"


def coloured() -> bool:
    """Whether to use colours: on a terminal, unless they are switched off (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, kind: str) -> str:
    """Text in bold, or in a colour."""
    return f"\033[{_CODES[kind]}m{text}\033[0m" if coloured() else text


def visible(text: str, kept: str = "") -> str:
    r"""Text that is safe on a terminal: characters that move the cursor or hide text are escaped as in Python.

    Args:
        kept: characters that stay as they are.

    >>> print(visible("a\x1b[2Jb\u202e"))
    a\x1b[2Jb\u202e
    """
    text = spelled(text)
    if text.isprintable():
        return text
    pieces = _STYLED.split(text) if coloured() else [text]
    return "".join(piece if n % 2 else _escaped(piece, kept) for n, piece in enumerate(pieces))


def _escaped(text: str, kept: str) -> str:
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape", "surrogatepass").decode()
        for each in text
    )


def width() -> Optional[int]:
    """Columns of the terminal; None when the output is no terminal, and nothing may be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: str = "", indent: str = "") -> Iterator[str]:
    """Rows under heads. On a terminal that is too narrow, the first column has a line of its own.

    Args:
        right: one letter per column, "r" for right-aligned, e.g. "lrr".
    """
    rows = [[*map(_to_its_end, row)] for row in rows]
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(len(heads))]
    columns = width()
    stacked = columns is not None and len(indent) + sum(widths) + 2 * (len(widths) - 1) > columns and len(heads) > 1
    flush = right.ljust(len(heads), "l")

    def cells(row: Sequence[str]) -> list[str]:
        return [c.rjust(w) if f == "r" else c.ljust(w) for c, w, f in zip(row, widths, flush)]

    for row in (heads, *rows):
        first, *others = cells(row)
        lines = [first, "    " + "  ".join(others)] if stacked else ["  ".join([first, *others])]
        for line in lines:
            yield style((indent + line).rstrip(), "bold") if row is heads else (indent + line).rstrip()


def _to_its_end(cell: str) -> str:
    """A cell whose spaces at the end show."""
    shown = cell.rstrip(" ")
    return shown + "\\x20" * (len(cell) - len(shown))


def listed(
    heads: Sequence[str], rows: Sequence[Sequence[str]], right: str, everything: bool, hint: str = "--all"
) -> Iterator[str]:
    """A table of the first rows, or of all; the rest is counted, and `hint` is the option that lists it."""
    shown = rows if everything else rows[:MOST_LISTED]
    yield from table(heads, shown, right)
    if len(rows) > len(shown):
        yield style(f"… and {len(rows) - len(shown):,} more ({hint} lists them)", "dim")


def folded(told: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names with the same text that differ only in the number of their first numbered part, folded into one.

    >>> folded({"head.w": "", "layers.0.w": "", "layers.1.w": "", "layers.3.w": ""})
    [('head.w', ''), ('layers.[0-1,3].w', '')]
    """
    from ms_ckpt_ext.core.geometry.groups import number_in

    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, text in told.items():
        parts = name.split(".")
        at = next((n for n, part in enumerate(parts) if number_in(part) is not None), len(parts))
        key = (".".join(parts[:at]), ".".join(parts[at + 1 :]), text)
        groups.setdefault(key, []).extend(map(int, parts[at : at + 1]))
    found = []
    for (head, tail, text), numbers in groups.items():
        runs = ranges(sorted(numbers), ",", 2)
        middle = f"[{runs}]" if len(numbers) > 1 else runs
        found.append((".".join(filter(None, (head, middle, tail))), text))
    return found
