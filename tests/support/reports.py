"""Reports of loads, as the log tells them."""

from __future__ import annotations

import logging

from ms_ckpt_ext import log
from ms_ckpt_ext.engine.load.options import LoadReport

REPORTS: list[LoadReport] = []
"""Of every load since it was cleared."""


class _Reports(logging.Handler):
    """Keeps the report of every load, which is logged at its end."""

    def emit(self, record: logging.LogRecord) -> None:
        REPORTS.extend(told for told in record.args or () if isinstance(told, LoadReport))


def keep_reports() -> None:
    """Keep reports from now on."""
    logging.getLogger(log.NAME).setLevel(logging.INFO)
    logging.getLogger(log.NAME).addHandler(_Reports())
