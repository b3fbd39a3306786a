"""A log record names its caller, and costs nothing where nobody listens."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from ms_ckpt_ext import log


def test_a_record_names_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log.warning("%d apples", 3)
    log.info("and %s", "pears")
    log.error("no %s", "plums")
    told = [(record.name, record.funcName, record.levelname, record.getMessage()) for record in caplog.records]
    here = ("ms_ckpt_ext", "test_a_record_names_the_caller")
    assert told == [(*here, "WARNING", "3 apples"), (*here, "INFO", "and pears"), (*here, "ERROR", "no plums")]


def test_information_for_nobody_imports_nothing() -> None:
    code = "import sys; from ms_ckpt_ext import log; log.info('x'); print('logging' in sys.modules); log.warning('y')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("False\n", "y\n")
