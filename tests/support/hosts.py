"""Hosts of a network of their own on this machine: Linux network namespaces on one bridge. Needs root.

    with Hosts("a", "b") as hosts:      # this thread, and what it starts, is now on the hub of that network
        subprocess.Popen([*hosts["a"].enter, "etcd", ...])
        hosts["a"].cut()                # its cable is out
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from typing import Any

CLONE_NEWNET = 0x40000000
HUB_ADDRESS = "10.77.0.1"


def ip(*words: str) -> None:
    """Run ip(8), which has to succeed."""
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def enter_network(path: str) -> None:
    """Put this thread into the network namespace of a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    finally:
        os.close(fd)


class Host:
    """One host. address: its IPv4 address; enter: words to put before a command that shall run on it."""

    def __init__(self, hub: str, name: str, number: int) -> None:
        self.hub, self.name, self.port = hub, name, f"v{number}"
        self.address, self.enter = f"10.77.0.{number + 10}", ("ip", "netns", "exec", name)

    def cut(self) -> None:
        """Pull its cable: no packet passes, nobody is told."""
        ip("-n", self.hub, "link", "set", self.port, "down")

    def heal(self) -> None:
        """Plug it in again."""
        ip("-n", self.hub, "link", "set", self.port, "up")


class Hosts:
    """Some hosts by name, and the hub between them, on which the caller is while the block runs."""

    def __init__(self, *names: str) -> None:
        self.hub = f"etcdinit-{os.getpid()}"
        self.hosts = {name: Host(self.hub, f"{self.hub}-{name}", index) for index, name in enumerate(names)}
        self.home = os.open(f"/proc/self/task/{os.getpid()}/ns/net", os.O_RDONLY)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def all(self) -> Sequence[Host]:
        return list(self.hosts.values())

    def __enter__(self) -> Hosts:
        try:
            ip("netns", "add", self.hub)
            ip("-n", self.hub, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", "bridge0", "type", "bridge")
            ip("-n", self.hub, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "bridge0")
            ip("-n", self.hub, "link", "set", "bridge0", "up")
            for host in self.all():
                ip("netns", "add", host.name)
                ip("-n", self.hub, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
                ip("-n", self.hub, "link", "set", host.port, "master", "bridge0", "up")
                ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    ip("-n", host.name, "link", "set", link, "up")
            enter_network(f"/run/netns/{self.hub}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        enter_network(f"/proc/self/fd/{self.home}")
        os.close(self.home)
        for name in (*(host.name for host in self.all()), self.hub):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
