"""Every parser of outside data, fed some hundred inputs that are meant to hurt; more in `scripts/fuzz.sh parsers`."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.judge import LONGEST, judge
from tests.hostile.parsers import PARSERS, Parser
from tests.support.damage import HOPELESS, lies, memory_limit, random_edits, time_limit

ROUNDS = 40


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.filterwarnings("ignore")
def test_whatever_it_is_given(name: str) -> None:
    parser, chance = PARSERS[name], random.Random(name)
    seeds = parser.seeds()
    with time_limit(60), memory_limit(128 << 20):
        for data in (*seeds, *HOPELESS):
            assert judge(parser, data[:LONGEST]) is None
        for _ in range(ROUNDS):
            data = chance.choice(seeds)
            for _ in range(chance.randint(1, 3)):
                known = parser.mutator is not None and chance.random() < 0.7
                data = parser.mutator(data, chance) if known and parser.mutator else random_edits(data, chance)
            assert judge(parser, data[:LONGEST]) is None, data


@pytest.mark.parametrize("name", ["groups", "hub", "answer", "greeting", "kind"])
def test_huge_numbers_everywhere(name: str) -> None:
    """Of binary forms without a test of their own."""
    parser = PARSERS[name]
    with time_limit(60), memory_limit(64 << 20):
        for data in parser.seeds():
            for lie in lies(data[:64]):
                assert judge(parser, lie) is None, lie


def test_the_judge_sees_what_should_not_be() -> None:
    def raising(error: BaseException) -> Parser:
        def read(data: bytes) -> None:
            raise error

        return Parser(read, lambda: [b""])

    from ms_ckpt_ext.errors import FormatError

    assert judge(raising(FormatError("a header that is none")), b"") is None
    for error in (FormatError("bad"), FormatError("x" * 5000), KeyError("x"), RecursionError(), MemoryError()):
        assert judge(raising(error), b"") is not None


@pytest.mark.slow
def test_the_campaign_finds_what_there_is(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.hostile", "--blind", "--minutes", "0.03", "--only", "shapes"]
    told = subprocess.run([*words, "--keep", str(tmp_path)], capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "0 findings" in told.stdout, told.stdout + told.stderr
    again = [*words, "--input", str(Path(__file__))]
    assert subprocess.run(again, capture_output=True, text=True, check=False).stdout == "shapes: nothing wrong\n"
