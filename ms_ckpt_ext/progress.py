"""A progress bar with rate and time left on terminals, silence elsewhere. `TQDM_DISABLE=1` silences it there, too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A callable that takes the bytes done since its last call, from any thread."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    lock = threading.Lock()
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=title, dynamic_ncols=True) as shown:

        def advance(nbytes: int) -> None:
            with lock:
                shown.update(nbytes)

        yield advance
