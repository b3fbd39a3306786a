"""Prints the directory of the plugins: `export REGISTER_PATH="$(python -m ms_ckpt_ext.plugins)"`."""

from __future__ import annotations

import os
import sys

sys.stdout.write(os.path.dirname(os.path.abspath(__file__)) + "\n")
