"""Checks the emulator through MindSpore's public API. Run with any number of ranks >= 2:

    source env.sh; msrun --worker_num=4 --local_worker_num=4 --join=True selftest.py

Every check compares real bytes; each prints "OK <name>" or "FAIL <name> <why>" and the script
exits non-zero if any failed.
"""

import importlib
import sys

from checking import rank, run

for part in ("selftest_collectives", "selftest_operators"):
    importlib.import_module(part)  # it adds its cases
failed = run()
print(f"RESULT rank {rank}: {'all OK' if not failed else 'FAILED ' + ' '.join(failed)}", flush=True)
sys.exit(1 if failed else 0)
