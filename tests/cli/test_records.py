"""Values as JSON: records become objects, and every item of a long list has a line of its own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

from ms_ckpt_ext.cli.records import json_text, plain


class Point(NamedTuple):
    x: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Found:
    name: str
    points: tuple[Point, ...]
    by_rank: dict[int, Point]
    none: None = None


FOUND = Found("ä }, {", (Point(1.5, (2, 3)), Point(math.nan, ())), {0: Point(math.inf, (1,))})


def test_records_become_objects() -> None:
    assert json.loads(json.dumps(plain(FOUND))) == {
        "name": "ä }, {",
        "points": [{"x": 1.5, "shape": [2, 3]}, {"x": "nan", "shape": []}],
        "by_rank": {"0": {"x": "inf", "shape": [1]}},
        "none": None,
    }


def test_a_line_for_every_item() -> None:
    text = json_text(plain(FOUND))
    assert json.loads(text) == json.loads(json.dumps(plain(FOUND)))
    assert text.splitlines() == [
        "{",
        ' "name": "ä }, {",',
        ' "points": [',
        '  {"x": 1.5, "shape": [2, 3]},',
        '  {"x": "nan", "shape": []}',
        " ],",
        ' "by_rank": {',
        '  "0": {"x": "inf", "shape": [1]}',
        " },",
        ' "none": null',
        "}",
    ]
    assert [json_text(value) for value in ({}, [], 3, "a")] == ["{}", "[]", "3", '"a"']


def test_rows_of_a_list_are_those_of_their_records() -> None:
    shape, other = (2, 3), (True, 1.5, "%s")
    rows = [Point(math.nan, shape), Point(1.0, shape), Point(1, other), Point(True, (1, 1)), Point(-0.0, ())]
    mixed: list[object] = [*rows, FOUND, "text", 3, None]
    for listed in (rows, rows[:1], [rows[0]] * 3, tuple(rows), mixed, [FOUND, FOUND], [(), ()]):
        text = json_text({"rows": listed})
        assert [line[2:].rstrip(",") for line in text.splitlines()[2:-2]] == [
            json.dumps(plain(each), ensure_ascii=False) for each in listed
        ]
        assert json.loads(text) == {"rows": json.loads(json.dumps(plain(listed)))}
