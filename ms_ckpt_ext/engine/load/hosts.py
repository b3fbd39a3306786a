"""Which ranks see the same files: those of one host, which its name alone does not tell.

Containers on one machine may have one name and one network, and disks of their own; machines made from one image may
have one name. So the key of a host is its name and a digest of what the kernel says: the boot, the namespaces of mounts
and network, the root directory, the addresses. Ranks with equal keys see the same files, and one of them looks for
all. Ranks with different keys may as well: that a file is the same is then seen by its size, times and inode.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Sequence

from ms_ckpt_ext.transport.rendezvous.interfaces import network_identity

_SEPARATOR = "\0"


def host_key(named: str = "") -> str:
    """What this process's host is called among those of the job.

    Args:
        named: what the user calls it: ranks that give the same name see the same files.
    """
    return named or f"{socket.gethostname()}{_SEPARATOR}{_view()}"


def _view() -> str:
    told = [network_identity()]
    for path in ("/proc/self/ns/mnt", "/"):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            told += [str(status.st_dev), str(status.st_ino)]
    return hashlib.blake2b(" ".join(told).encode(), digest_size=8).hexdigest()


def told_apart(keys: Sequence[str]) -> list[str]:
    """Keys as names for messages, as different as the keys are: the second host of a name has its number with it.

    >>> told_apart(["a", "node\\0e1", "node\\0e2", "node\\0e1"])
    ['a', 'node', 'node (2)', 'node']
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    for key in dict.fromkeys(keys):
        name = shown = key.split(_SEPARATOR)[0]
        while shown in taken:
            numbers[name] = numbers.get(name, 1) + 1
            shown = f"{name} ({numbers[name]})"
        taken.add(shown)
        names[key] = shown
    return [names[key] for key in keys]
