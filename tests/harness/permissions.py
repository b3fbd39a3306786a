"""Root may read and write every file, whatever its mode says: what fails for everyone else would pass here unseen."""

from __future__ import annotations

import ctypes
import os

_DROP = 24  # PR_CAPBSET_DROP
_OF_FILES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of effective, permitted, inheritable


def obey_modes() -> None:
    """From now on the modes of files hold for this process and all that it starts, even for root.

    Raises:
        OSError: the kernel does not let root give up what it may do.
    """
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, sets)
    for capability in _OF_FILES:
        failed |= libc.prctl(_DROP, capability, 0, 0, 0)  # what is started gets no more than this
        for each in range(3):
            sets[each] &= ~(1 << capability)
    if failed | libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "cannot let the modes of files hold for root")
