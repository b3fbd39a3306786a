"""Several hosts on one machine: network, mount, UTS and process namespaces, joined by a switch. Linux, as root.

    with Hosts(2) as (a, b):
        a.run(["ping", "-c1", b.ipv4])

Each host has an interface `eth0` that leads to a bridge, which lies in a namespace of its own, so that the machine's
network is not touched. A directory may be given to each as its disk: all see their own under one path.

Nothing outlives the test, even when that is killed: a host is the namespaces of one process, which ends when its
standard input, a pipe from the test, is closed. The kernel then kills what runs in the host, and removes interfaces and
mounts with the namespaces. Nothing has a name outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

import psutil
import pytest

_NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation=private"]
_READY = b"ready\n"
_SECONDS = 60.0


def hosts_or_skip() -> None:
    """Skip the calling test where hosts cannot be made, and say why."""
    if not sys.platform.startswith("linux"):
        pytest.skip("hosts are Linux namespaces")
    if os.geteuid() != 0:
        pytest.skip("hosts are namespaces, which only root can make")
    missing = [tool for tool in ("unshare", "nsenter", "ip", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"hosts are made by commands that are not here: {', '.join(missing)}")
    trial = "ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    tried = subprocess.run(["unshare", *_NAMESPACES, "sh", "-c", trial], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces, bridges or veth pairs cannot be made here: {tried.stderr.strip()}")


class _Namespaces:
    """Namespaces that live as long as their first process, which ends with this one."""

    def __init__(self, name: str) -> None:
        # A mount of /proc needs a process inside; `cat` is what waits for the end of its input.
        script = 'hostname "$0" && ip link set lo up && echo ready && exec cat'
        self._keeper = subprocess.Popen(
            ["unshare", *_NAMESPACES, "sh", "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != _READY:
            raise RuntimeError(f"namespaces for host {name!r} could not be made")
        (first,) = psutil.Process(self._keeper.pid).children()
        self.pid: int = first.pid
        """Number of the first process, as the machine sees it."""

    def enter(self, command: Sequence[object]) -> list[str]:
        """`command`, to be run inside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--pid", "--", *map(str, command)]

    def run(self, command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command inside and wait for it; it must succeed."""
        return subprocess.run(self.enter(command), text=True, check=True, timeout=_SECONDS, **options)

    def ip(self, *lines: str, family: str = "") -> None:
        """Commands of ip(8), without the first word."""
        subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", "--uts", "--", "ip", *filter(None, [family]), "-batch", "-"],
            input="\n".join(lines),
            text=True,
            check=True,
            timeout=_SECONDS,
        )

    def end(self) -> None:
        """Kill what runs inside; the rest the kernel does."""
        self._keeper.kill()
        self._keeper.communicate()


class Host(_Namespaces):
    """One host of `Hosts`.

    Attributes:
        number: from 0.
        name: what `hostname` says inside.
        ipv4, ipv6: addresses of eth0; "" where it has none.
    """

    def __init__(self, number: int, name: str, ipv4: str, ipv6: str) -> None:
        super().__init__(name)
        self.number = number
        self.name = name
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self._started: list[subprocess.Popen[str]] = []

    def start(
        self, command: Sequence[object], env: Optional[Mapping[str, str]] = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command inside; whatever is left of it is killed with the host."""
        self._started.append(subprocess.Popen(self.enter(command), env=env, text=True, **options))
        return self._started[-1]

    def end(self) -> None:
        """Kill what runs inside, and wait for what was started."""
        super().end()
        for process in self._started:
            process.wait(_SECONDS)
            for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                stream.close()

    def mount(self, disk: Path, at: Path) -> None:
        """Show `disk` under the path `at` inside."""
        disk.mkdir(parents=True, exist_ok=True)
        at.mkdir(parents=True, exist_ok=True)
        self.run(["mount", "--bind", disk, at])

    def open_only(self, port: int) -> None:
        """Drop all incoming TCP but to one port, as a firewall does; also answers to connections from this host."""
        for family in ("-4", "-6"):
            self.ip(
                "rule add pref 100 lookup local",
                "rule del pref 0",
                f"rule add pref 10 iif eth0 ipproto tcp dport {port} lookup local",
                "rule add pref 20 iif eth0 ipproto tcp blackhole",
                family=family,
            )


class Hosts:
    """`count` hosts; a context manager that gives them in a list.

    Args:
        names: what they are called; "host0", "host1", … by default.
        ipv4, ipv6: which addresses they have.
    """

    def __init__(self, count: int, names: Optional[Sequence[str]] = None, ipv4: bool = True, ipv6: bool = True) -> None:
        self._names = names or [f"host{number}" for number in range(count)]
        self._families = (ipv4, ipv6)
        self._stack = ExitStack()

    def __enter__(self) -> list[Host]:
        hosts_or_skip()
        with ExitStack() as stack:
            self._switch = _Namespaces("switch")
            stack.callback(self._switch.end)
            self._switch.ip("link add br0 type bridge", "link set br0 up")
            hosts = []
            for number, name in enumerate(self._names):
                addresses = [f"10.77.0.{number + 1}", f"fd00:77::{number + 1}"]
                shown = [address if has else "" for address, has in zip(addresses, self._families)]
                hosts.append(Host(number, name, *shown))
                stack.callback(hosts[-1].end)
                self._plug_in(hosts[-1])
            self._stack = stack.pop_all()
        return hosts

    def __exit__(
        self, kind: Optional[type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._stack.close()

    def cut(self, host: Host) -> None:
        """Take a host from the switch: its interface stays up, and nothing comes through any more."""
        self._switch.ip(f"link set {self._port(host)} nomaster")

    def link_down(self, host: Host) -> None:
        """Pull the cable: the host sees that its interface has no carrier."""
        self._switch.ip(f"link set {self._port(host)} down")

    def _plug_in(self, host: Host) -> None:
        port = self._port(host)
        self._switch.ip(
            f"link add {port} type veth peer name eth0 netns {host.pid}",
            f"link set {port} master br0",
            f"link set {port} up",
        )
        given = [f"addr add {host.ipv4}/24 dev eth0"] if host.ipv4 else []
        given += [f"addr add {host.ipv6}/64 dev eth0 nodad"] if host.ipv6 else []
        host.ip(*given, "link set eth0 up")

    @staticmethod
    def _port(host: Host) -> str:
        return f"port{host.number}"
