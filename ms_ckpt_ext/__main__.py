"""`python -m ms_ckpt_ext` runs `ms-ckpt` where the console script is not on the path."""

from __future__ import annotations

import sys

from ms_ckpt_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
