"""A job of ranks as threads over a control plane with real sockets."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any, Callable

from ms_ckpt_ext.transport.control import ControlPlane
from ms_ckpt_ext.transport.local import LocalTransport, LocalWorld
from tests.support.waiting import SOON


def job(size: int, fn: Callable[[ControlPlane], Any], timeout: float = 60.0) -> list[Any]:
    """Run `fn` on every rank of a control plane and give what each returned or raised."""

    def work(t: LocalTransport) -> Any:
        plane = ControlPlane(t.rank, size, timeout)
        plane.enter(t.share)
        t.share(b"")  # nobody dies before everybody is connected
        try:
            return fn(plane)
        except Exception as error:
            return error
        finally:
            t.share(b"")  # nobody leaves before everybody is through
            plane.close()
            plane.close()

    began = time.monotonic()
    results = LocalWorld(size).run(work)
    assert time.monotonic() - began < SOON, "somebody hung"
    return results


def die(plane: ControlPlane) -> None:
    """What the kernel does to the connection of a killed process."""
    plane._socket.shutdown(socket.SHUT_RDWR)


def forever() -> None:
    """Wait for longer than a test lasts."""
    threading.Event().wait(100)
