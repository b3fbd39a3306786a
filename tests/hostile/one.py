"""One parser, fed for some seconds: `python -m tests.hostile.one NAME SECONDS SEED ENGINE FOLDER`, by `__main__`.

Prints a line of JSON at the end: how many inputs were tried, and what was found. Every finding leaves its input in
FOLDER. libFuzzer tells what was reached on standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, Callable


class Search:
    """What is tried, counted; and what was found, each once."""

    def __init__(self, name: str, seconds: float, seed: int, folder: Path) -> None:
        from ms_ckpt_ext.errors import CheckpointError
        from tests.hostile.judge import limit_memory
        from tests.hostile.parsers import PARSERS

        self.name, self.folder, self.seed = name, folder, seed
        self.parser = PARSERS[name]
        self.seeds = self.parser.seeds()
        self.chance = random.Random(seed)
        self.tried = 0
        self.found: dict[str, str] = {}
        for data in self.seeds:
            with contextlib.suppress(CheckpointError):
                self.parser.read(data)  # with all that it imports
        limit_memory()
        self.ends = time.monotonic() + seconds

    def try_(self, data: bytes) -> None:
        """One input."""
        from tests.hostile.judge import judge

        self.tried += 1
        finding = judge(self.parser, data)
        if finding is not None and finding.where not in self.found:
            self.found[finding.where] = finding.what
            (self.folder / f"{self.name}-{len(self.found)}").write_bytes(data)
        if time.monotonic() > self.ends:
            self.leave()

    def changed(self, data: bytes, else_: Callable[[bytes], bytes]) -> bytes:
        """An input out of another: half of them keep its form."""
        if self.parser.mutator is None or self.chance.random() < 0.5:
            return else_(data)
        return self.parser.mutator(data, self.chance)

    def leave(self) -> None:
        """End the process, and say what came of it; libFuzzer ends it without running Python's exit handlers."""
        import shutil

        from tests.hostile.seeds import folder

        shutil.rmtree(folder(), ignore_errors=True)
        print("\n" + json.dumps({"tried": self.tried, "found": self.found}), flush=True)
        os._exit(0)


def guided(search: Search, atheris: Any, corpus: Path) -> None:
    """By coverage, as libFuzzer does it."""
    for number, data in enumerate(search.seeds):
        (corpus / f"seed-{number}").write_bytes(data)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        search.chance.seed(seed)
        return search.changed(data, lambda raw: bytes(atheris.Mutate(raw, longest)))[:longest]

    limits = ["-max_len=65536", "-len_control=10", "-timeout=60", "-rss_limit_mb=0", f"-seed={search.seed or 1}"]
    atheris.Setup(["fuzz", *limits, "-verbosity=1", str(corpus)], search.try_, custom_mutator=mutate)
    atheris.Fuzz()


def blind(search: Search) -> None:
    """At random, where atheris is not installed."""
    from tests.support.damage import random_edits

    while True:
        data = search.chance.choice(search.seeds)
        for _ in range(search.chance.randint(1, 3)):
            data = search.changed(data, lambda raw: random_edits(raw, search.chance))
        search.try_(data)


def main() -> None:
    name, seconds, seed, engine, folder = sys.argv[1:]
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["ms_ckpt_ext"]):
            import tests.hostile.parsers  # noqa: F401 - and the package with it
    search = Search(name, float(seconds), int(seed), Path(folder))
    if engine == "atheris":
        corpus = Path(folder) / f"corpus-{name}"
        corpus.mkdir(exist_ok=True)
        guided(search, atheris, corpus)
    blind(search)


if __name__ == "__main__":
    main()
