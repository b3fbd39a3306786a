"""What is reported on the way: to the logger `ms_ckpt_ext`, by a progress bar on terminals, and in a trace.

`logging` is imported only when there is something to report, as importing it takes 10 ms. If it was never imported, no
handler can want INFO records.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable, Optional

from ms_ckpt_ext.errors import spelled

NAME = "ms_ckpt_ext"
_prepare: Optional[Callable[[], None]] = None


def prepared_by(prepare: Callable[[], None]) -> None:
    """Have handlers set up when there is first something to report, so a program need not import `logging` earlier."""
    global _prepare
    _prepare = prepare


def _logger() -> Any:
    global _prepare
    import logging

    prepare, _prepare = _prepare, None
    if prepare is not None:
        prepare()
    logger = logging.getLogger(NAME)
    logger.addFilter(_spell)  # once, however often
    return logger


def _spell(record: Any) -> bool:
    """A filter, which lets everything pass: of names that look alike a message shows how each is spelled."""
    told = record.getMessage()
    shown = spelled(told)
    if shown != told:
        record.msg, record.args = shown, ()
    return True


def info(message: str, *values: object) -> None:
    """Report what was done. Arguments as for `logging.Logger.info`."""
    if "logging" in sys.modules:
        _logger().info(message, *values, stacklevel=2)


def error(message: str, *values: object) -> None:
    """Report what went wrong and is not raised. Arguments as for `logging.Logger.error`."""
    _logger().error(message, *values, stacklevel=2)


def warning(message: str, *values: object) -> None:
    """Report what may not be intended. Arguments as for `logging.Logger.warning`."""
    _logger().warning(message, *values, stacklevel=2)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A callable that takes the bytes done since its last call, from any thread.

    On a terminal they show as a bar with rate and time left, unless `TQDM_DISABLE=1`; elsewhere nothing shows.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    import threading

    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=title, dynamic_ncols=True) as shown:

        def advance(nbytes: int) -> None:
            with lock:
                shown.update(nbytes)

        yield advance


class Trace:
    """What happened when: spans of work by thread, in microseconds since the trace began.

    A Chrome trace: open it in chrome://tracing or Perfetto.
    """

    def __init__(self, rank: int = 0, recording: bool = False) -> None:
        self._rank, self._recording = rank, recording
        self._start = time.perf_counter_ns()
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str, **details: Any) -> Iterator[None]:
        """Record one piece of work."""
        if not self._recording:
            yield
            return
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            import threading

            now = time.perf_counter_ns()
            thread = threading.current_thread().name
            self._events.append(
                {"name": name, "ph": "X", "pid": self._rank, "tid": thread, "args": details}
                | {"ts": (begin - self._start) / 1e3, "dur": (now - begin) / 1e3}
            )

    @property
    def events(self) -> list[dict[str, Any]]:
        """The spans so far, in order of their ends."""
        return list(self._events)

    @staticmethod
    def save_all(by_rank: Sequence[list[dict[str, Any]]], path: str) -> None:
        """Write the events of all ranks as one trace; a rank is shown as a process."""
        import json

        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": [event for events in by_rank for event in events]}, file)
