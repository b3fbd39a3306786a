"""What is told on the way, to the logger `ms_ckpt_ext`.

`logging` is imported when there is something to tell, for that takes 10 ms. Who has not imported it has no handler for
what is only for information.
"""

from __future__ import annotations

import sys

NAME = "ms_ckpt_ext"


def info(message: str, *values: object) -> None:
    """Tell what was done. Arguments as of `logging.Logger.info`."""
    if "logging" in sys.modules:
        import logging

        logging.getLogger(NAME).info(message, *values, stacklevel=2)


def error(message: str, *values: object) -> None:
    """Tell what went wrong and is not raised. Arguments as of `logging.Logger.error`."""
    import logging

    logging.getLogger(NAME).error(message, *values, stacklevel=2)


def warning(message: str, *values: object) -> None:
    """Tell what may not be what was meant. Arguments as of `logging.Logger.warning`."""
    import logging

    logging.getLogger(NAME).warning(message, *values, stacklevel=2)
