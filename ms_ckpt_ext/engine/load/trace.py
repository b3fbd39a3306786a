"""What happened when, as a Chrome trace (open it in chrome://tracing or Perfetto)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Trace:
    """Spans of work by thread; times in microseconds since the trace began."""

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
        Path(path).write_text(json.dumps({"traceEvents": [event for events in by_rank for event in events]}))
