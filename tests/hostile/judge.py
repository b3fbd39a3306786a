"""What may happen to input, whatever it is: an answer, or one of the package's errors, in little memory and time."""

from __future__ import annotations

import resource
import time
import traceback
from typing import NamedTuple, Optional

from ms_ckpt_ext.errors import CheckpointError
from tests.hostile.parsers import Parser

SECONDS = 2.0
"""Seconds of the processor for one input of at most `LONGEST` bytes; a parser takes milliseconds."""
MEMORY = 768 << 20
"""Bytes of address space beyond what the process has when it begins."""
LONGEST = 1 << 16


class Finding(NamedTuple):
    """What should not have happened; `where` tells findings apart."""

    what: str
    where: str


def limit_memory(nbytes: int = MEMORY) -> None:
    """From now on this process gets no more than so many bytes beyond what it has: more is a MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + nbytes, resource.RLIM_INFINITY))


def judge(parser: Parser, data: bytes) -> Optional[Finding]:
    """What is wrong with how a parser takes some input; None when nothing is."""
    begin = time.process_time()
    try:
        parser.read(data)
        found = None
    except (CheckpointError, *parser.errors) as error:
        found = _message(str(error), len(data))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = Finding(f"{type(error).__name__}: {error!s:.200}", _where(error))
    took = time.process_time() - begin
    if found is None and took > SECONDS:
        return Finding(f"{took:.1f} s of the processor", "slow")
    return found


def _message(text: str, length: int) -> Optional[Finding]:
    if len(text) < 10:
        return Finding(f"an error that says nothing: {text!r}", "silent")
    if len(text) > 4096 + 2 * length:
        return Finding(f"an error of {len(text)} characters", f"long: {text[:60]!r}")
    return None


def _where(error: BaseException) -> str:
    """The last lines of the package on the way to an error."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "ms_ckpt_ext/" in each.filename]
    return " < ".join(f"{each.filename.rpartition('ms_ckpt_ext/')[2]}:{each.lineno}" for each in reversed(frames[-3:]))
