"""The JSON header of a safetensors file, member by member, in memory that is bounded by what is kept.

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …, "__metadata__": {"key": "value", …}}

A header may be 100,000,000 bytes long and list a million tensors. Parsed at once, it becomes objects of ten times its
size, and a hostile one of far more; here one member is parsed at a time.

1. A member that is written as every writer does is one match of a regular expression.
2. For any other (more keys, another order, escapes) the end is found by quotes and braces, then it is parsed alone.
3. What is not a table of tensors is refused at the first member that is not a tensor.
"""

from __future__ import annotations

import json
import re
from typing import Any, Callable, NamedTuple, Optional

METADATA = "__metadata__"
MAX_MEMBER = 1 << 16
"""Most bytes of one tensor's member; a usual one has a hundred."""
MAX_NOTES = 1 << 21
"""Most pairs of `__metadata__`: more than one for every tensor of the longest header."""
_SPACE = rb"[ \t\n\r]*"
_TEXT, _NUMBER = rb'"([^"\\\x00-\x1f]*)"', rb"(0|[1-9][0-9]{0,19})"


def _grammar(pattern: bytes) -> re.Pattern[bytes]:
    """A pattern in which a blank means JSON's white space, `T` a text without escapes, `N` a number."""
    return re.compile(pattern.replace(b" ", _SPACE).replace(b"T", _TEXT).replace(b"N", _NUMBER))


_USUAL = _grammar(rb' T : \{ "dtype" : T , "shape" : \[([0-9,\s]{0,999})\] , "data_offsets" : \[ N , N \] \} ([,}])')
_NOTE = _grammar(rb" T : T ([,}])")
_OPEN, _EMPTY, _QUOTE, _COLON = (_grammar(each) for each in (rb" \{", rb" \}", rb' "', rb" : "))
_MORE, _END, _NULL = (_grammar(each) for each in (rb" ([,}])", rb" \Z", rb"null"))
_LIST, _LIST_END, _LISTED = _grammar(rb" \["), _grammar(rb" \]"), _grammar(rb" ([,\]])")
_ESCAPE_OR_QUOTE, _QUOTE_OR_BRACE = re.compile(rb'[\\"]'), re.compile(rb'["{}]')
_FORM = "dtype, shape and data_offsets"


class HeaderError(Exception):
    """What is wrong with a header; the message goes after the name of the file."""


class Member(NamedTuple):
    """A tensor as in the header; only that shape and offsets are whole numbers is checked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(raw: bytearray, take: Callable[[Member], None], most: int = MAX_NOTES) -> dict[str, str]:
    """Give every tensor of a header to `take`, in its order, and return the metadata, at most `most` entries.

    Raises:
        HeaderError: it is not a valid header.
    """
    notes: Optional[dict[str, str]] = None
    shapes: dict[bytes, tuple[int, ...]] = {}
    mark, at = _first(raw, _behind(_OPEN, raw, 0, "an object"))
    while mark == b",":
        usual = _USUAL.match(raw, at)
        if usual is not None and usual[1] != b"__metadata__":
            text, dtype, listed, start, stop, mark = usual.groups()
            shape = shapes.get(listed)
            if shape is None:
                shape = shapes[listed] = _numbers(listed, at)
            take(Member(_decoded(text, at), dtype.decode(errors="replace"), shape, int(start), int(stop)))
            at = usual.end()
            continue
        name, at = _key(raw, at)
        if name != METADATA:
            at = _other(raw, at, name, take)
        elif notes is None:
            notes, at = _notes(raw, at, most)
        else:
            raise HeaderError(f"the header names {METADATA!r} twice")
        mark, at = _mark(raw, at)
    _behind(_END, raw, at, "nothing but blanks after the object")
    return notes or {}


def _first(raw: bytearray, at: int) -> tuple[bytes, int]:
    """As `_mark`, at the beginning of an object: a comma means that a member follows."""
    empty = _EMPTY.match(raw, at)
    return (b",", at) if empty is None else (b"}", empty.end())


def read_texts(listed: str) -> list[str]:
    """A JSON list of texts. Raises HeaderError when it is something else."""
    raw = bytearray(listed, "utf-8", "surrogatepass")
    names: list[str] = []
    at = _behind(_LIST, raw, 0, "a list")
    empty = _LIST_END.match(raw, at)
    mark, at = (b",", at) if empty is None else (b"]", empty.end())
    while mark == b",":
        name, at = _string(raw, _behind(_QUOTE, raw, at, "a text in quotes") - 1)
        names.append(name)
        more = _LISTED.match(raw, at)
        if more is None:
            raise _not_json(at, "a comma or the end of the list")
        mark, at = more[1], more.end()
    _behind(_END, raw, at, "nothing but blanks after the list")
    return names


def _numbers(listed: bytes, at: int) -> tuple[int, ...]:
    try:
        return tuple(json.loads(b"[%b]" % listed))
    except ValueError:
        raise _not_json(at, "a list of whole numbers") from None


def _other(raw: bytearray, at: int, name: str, take: Callable[[Member], None]) -> int:
    """Take a member that is not in the usual form; returns where its value has ended."""
    if raw[at : at + 1] != b"{":
        raise _no_entry(name, "it is no object")
    end = _object_end(raw, at)
    try:
        entry: dict[str, Any] = json.loads(raw[at:end].decode(), object_pairs_hook=_unique)
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise _no_entry(name, repr(error)) from error
    if not isinstance(shape, list) or not all(type(number) is int for number in (*shape, start, stop)):
        raise HeaderError(
            f"parameter {name!r} has shape {str(shape)[:99]}, offsets {str([start, stop])[:99]}: expected whole numbers"
        )
    take(Member(name, str(dtype), tuple(shape), start, stop))
    return end


def _notes(raw: bytearray, at: int, most: int) -> tuple[dict[str, str], int]:
    """The metadata, whose value begins there, and where that has ended; null means none."""
    notes: dict[str, str] = {}
    values: dict[str, str] = {}
    null = _NULL.match(raw, at)
    if null is not None:
        return notes, null.end()
    if raw[at : at + 1] != b"{":
        raise HeaderError(f"{METADATA} must map strings to strings")
    mark, at = _first(raw, at + 1)
    while mark == b",":
        usual = _NOTE.match(raw, at)
        if usual is not None:
            key, value, mark, at = _decoded(usual[1], at), _decoded(usual[2], at), usual[3], usual.end()
        else:
            key, at = _key(raw, at)
            if raw[at : at + 1] != b'"':
                raise HeaderError(f"{METADATA} must map strings to strings")
            value, at = _string(raw, at)
            mark, at = _mark(raw, at)
        if key in notes:
            raise HeaderError(f"{METADATA} names {key[:99]!r} twice")
        notes[key] = values.setdefault(value, value)
        if len(notes) > most:
            raise HeaderError(f"{METADATA} has more than {most} entries")
    return notes, at


def _key(raw: bytearray, at: int) -> tuple[str, int]:
    """The name of a member, and where its value begins."""
    quote = _behind(_QUOTE, raw, at, "a name in quotes") - 1
    name, at = _string(raw, quote)
    return name, _behind(_COLON, raw, at, "a colon")


def _string(raw: bytearray, quote: int) -> tuple[str, int]:
    """The text in quotes that begins there, and where it has ended."""
    end = _string_end(raw, quote)
    try:
        text: str = json.loads(raw[quote:end].decode())
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise HeaderError(f"a name in the header is no text ({error.reason})") from None
    except ValueError as error:
        raise _not_json(quote, f"a text in quotes (here {error})") from None
    return text, end


def _string_end(raw: bytearray, quote: int) -> int:
    at = quote + 1
    while True:
        found = _ESCAPE_OR_QUOTE.search(raw, at)
        if found is None:
            raise _not_json(quote, "a text that ends with a quote")
        if found[0] == b'"':
            return found.end()
        at = found.end() + 1


def _object_end(raw: bytearray, at: int) -> int:
    """Where the object that begins there has ended."""
    start, depth = at, 0
    while True:
        found = _QUOTE_OR_BRACE.search(raw, at, start + MAX_MEMBER)
        if found is None:
            raise _not_json(start, f"an entry that ends within {MAX_MEMBER} bytes")
        at = found.end()
        if found[0] == b'"':
            at = _string_end(raw, at - 1)
        else:
            depth += 1 if found[0] == b"{" else -1
            if not depth:
                return at


def _mark(raw: bytearray, at: int) -> tuple[bytes, int]:
    found = _MORE.match(raw, at)
    if found is None:
        raise _not_json(at, "a comma or the end of the object")
    return found[1], found.end()


def _behind(pattern: re.Pattern[bytes], raw: bytearray, at: int, what: str) -> int:
    found = pattern.match(raw, at)
    if found is None:
        raise _not_json(at, what)
    return found.end()


def _decoded(text: bytes, at: int) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise _not_json(at, f"a text in UTF-8 ({error.reason})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs) if pairs else {}  # an empty dict() takes four times as much in Python 3.9
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_entry(name: str, why: str) -> HeaderError:
    return HeaderError(f"header entry of {name[:99]!r} must have {_FORM} ({why[:99]})")


def _not_json(at: int, expected: str) -> HeaderError:
    return HeaderError(f"no JSON header of a safetensors file, which has {expected} at byte {8 + at}")
