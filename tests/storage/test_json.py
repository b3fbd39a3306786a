"""JSON of files: what has two readings, or takes more of a program than it has, is no document."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.storage.reader import MOST_LEVELS, from_json
from tests.support.damage import memory_limit, time_limit


def nested(levels: int, opens: str = "[", closes: str = "]", inner: str = "") -> bytes:
    return (opens * levels + inner + closes * levels).encode()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": 1, "a": 1.0}', "twice"),
        (b'{"a": 1, "a": true}', "twice"),
        (b'{"a": [], "a": []}', "twice"),
        (b'{"b": {"a": 1, "\\u0061": "1"}}', "'a' occurs twice"),
        (nested(MOST_LEVELS + 1), "nested deeper"),
        (nested(MOST_LEVELS, '{"a":', "}", "[]"), "nested deeper"),
        (nested(900), "nested deeper"),
        (nested(100_000), "nested deeper"),
        (b"[" * 1_000_000, "nested deeper"),
        (b"{'a': 1}", "Expecting"),
        (b"", "Expecting"),
        (b"\xff\xfe\xff", "decode"),
        (b'"\xff"', "decode"),
    ],
)
def test_what_is_no_document(text: bytes, fault: str) -> None:
    with time_limit(), memory_limit(32 << 20), pytest.raises(ValueError, match=fault) as caught:
        from_json(text)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b'{"a": "x", "b": 2, "a": "x"}', {"a": "x", "b": 2}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b"Infinity", float("inf")),
        (b'{"\\ud800": 0}', {"\ud800": 0}),
        (nested(MOST_LEVELS), None),
    ],
    ids=["twice the same", "twice the same text", "a byte order mark", "infinity", "half a character", "deep"],
)
def test_what_is_one(text: bytes, value: Any) -> None:
    found = from_json(text)
    assert value is None or found == value


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(documents, st.booleans())
def test_what_is_written_is_read(document: Any, ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    assert from_json(text) == document
    assert from_json(text.encode()) == document


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), min_size=1, max_size=5), st.data())
def test_no_name_has_two_values(document: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(document)))
    other = data.draw((st.integers() | st.text(max_size=3)).filter(lambda value: repr(value) != repr(document[name])))
    pairs = [*document.items(), (name, other)]
    order = data.draw(st.permutations(pairs))
    text = "{" + ",".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in order) + "}"
    with pytest.raises(ValueError, match="twice"):
        from_json(text)
