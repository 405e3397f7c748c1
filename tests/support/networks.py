"""Two machines and a router between them, as network namespaces: where packets can be lost without anybody being told.

```
   client 10.231.1.2 ---- 10.231.1.1 router 10.231.2.1 ---- 10.231.2.2 server
```
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import secrets
import select
import struct
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

SERVER_ADDRESS = "10.231.2.2"
CLIENT_ADDRESS = "10.231.1.2"
COMMAND_SECONDS = 60.0
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_BYTES_MAX = 65_536


class CannotHere(Exception):
    """The kernel, or our rights, do not allow it; the text says what."""


@dataclass(frozen=True, slots=True)
class Network:
    """Names of the namespaces. `inside_*`: how a command is run there."""

    client: str
    router: str
    server: str

    @property
    def inside_client(self) -> list[str]:
        return ["ip", "netns", "exec", self.client]

    @property
    def inside_server(self) -> list[str]:
        return ["ip", "netns", "exec", self.server]

    def black_hole(self) -> None:
        """From now on the router drops every packet of either direction, without a word."""
        for address in (SERVER_ADDRESS, CLIENT_ADDRESS):
            _run("ip", "-n", self.router, "route", "add", "blackhole", address)

    def mend(self) -> None:
        """The end of `black_hole`."""
        for address in (SERVER_ADDRESS, CLIENT_ADDRESS):
            _run("ip", "-n", self.router, "route", "del", "blackhole", address)

    def unplug_server(self) -> None:
        """The server's machine is gone, and can tell nobody: what it sends from now on reaches no one."""
        _run("ip", "-n", self.router, "link", "delete", "to-server")

    def plug_in_server(self) -> None:
        """It is there again, at the same address, and knows of no connection."""
        _link(self.router, "to-server", "10.231.2.1", self.server, SERVER_ADDRESS)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """The network, without anything running in it; skips the test where it cannot be made."""
    mark = secrets.token_hex(3)
    net = Network(*(f"nbdt-{mark}-{name}" for name in ("client", "router", "server")))
    with contextlib.ExitStack() as stack:
        if os.geteuid() != 0:
            pytest.skip("only root makes network namespaces")
        try:
            for name in (net.client, net.router, net.server):
                _run("ip", "netns", "add", name)
                stack.callback(_run, "ip", "netns", "delete", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _link(net.router, "to-client", "10.231.1.1", net.client, CLIENT_ADDRESS)
            _link(net.router, "to-server", "10.231.2.1", net.server, SERVER_ADDRESS)
            _run("ip", "netns", "exec", net.router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        except CannotHere as error:
            pytest.skip(f"no network namespaces: {error}")
        yield net


@contextlib.contextmanager
def lossy_network(share: float, seed: int) -> Iterator[tuple[Network, LossyCable]]:
    """Two machines, and between them a cable that loses so many of the packets."""
    mark = secrets.token_hex(3)
    net = Network(f"nbdt-{mark}-client", "", f"nbdt-{mark}-server")
    with contextlib.ExitStack() as stack:
        if os.geteuid() != 0:
            pytest.skip("only root makes network namespaces")
        try:
            cable = stack.enter_context(contextlib.closing(LossyCable(share, random.Random(seed))))
            for name in (net.client, net.server):
                _run("ip", "netns", "add", name)
                stack.callback(_run, "ip", "netns", "delete", name)
            cable.plug_in(0, net.client, "10.231.2.1")
            cable.plug_in(1, net.server, SERVER_ADDRESS)
        except CannotHere as error:
            pytest.skip(f"no network namespaces: {error}")
        stack.callback(cable.unplug)
        cable.start()
        yield net, cable


class LossyCable(threading.Thread):
    """Carries packets between two TUN devices, and loses `share` of them. Needs no help of the kernel's (netem)."""

    def __init__(self, share: float, chance: random.Random) -> None:
        super().__init__(name="lossy cable")
        self.carried = 0
        self.lost = 0
        self._share = share
        self._chance = chance
        self._wanted = os.eventfd(0, os.EFD_CLOEXEC)
        self._ends: list[tuple[int, str]] = []
        try:
            self._ends = [_open_tun(), _open_tun()]
        except OSError as error:
            os.close(self._wanted)
            raise CannotHere(f"/dev/net/tun: {error.strerror}") from None

    def plug_in(self, end: int, machine: str, address: str) -> None:
        device = self._ends[end][1]
        _run("ip", "link", "set", device, "netns", machine)
        _run("ip", "-n", machine, "address", "add", f"{address}/24", "dev", device)
        _run("ip", "-n", machine, "link", "set", device, "up")

    def run(self) -> None:
        (one, _), (other, _) = self._ends
        while True:
            ready, _, _ = select.select([one, other, self._wanted], [], [])
            if self._wanted in ready:
                return
            for end in ready:
                packet = os.read(end, PACKET_BYTES_MAX)
                if self._chance.random() < self._share:
                    self.lost += 1
                    continue
                self.carried += 1
                with contextlib.suppress(OSError):  # the machine is gone
                    os.write(other if end == one else one, packet)

    def unplug(self) -> None:
        os.eventfd_write(self._wanted, 1)
        self.join()

    def close(self) -> None:
        for number in (self._wanted, *(end for end, _ in self._ends)):
            os.close(number)


def _open_tun() -> tuple[int, str]:
    """A new TUN device: its descriptor, and the kernel's name for it (include/uapi/linux/if_tun.h)."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    request = struct.pack("16sH14x", b"nbdt%d", IFF_TUN | IFF_NO_PI)
    name = fcntl.ioctl(descriptor, TUNSETIFF, request)[:16].rstrip(b"\0").decode()
    return descriptor, name


def _link(router: str, link: str, router_address: str, machine: str, address: str) -> None:
    """A cable between the router and a machine, whose way to everywhere it is."""
    _run("ip", "-n", router, "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", machine)
    _run("ip", "-n", router, "address", "add", f"{router_address}/24", "dev", link)
    _run("ip", "-n", router, "link", "set", link, "up")
    _run("ip", "-n", machine, "address", "add", f"{address}/24", "dev", "eth0")
    _run("ip", "-n", machine, "link", "set", "eth0", "up")
    _run("ip", "-n", machine, "route", "add", "default", "via", router_address)


def _run(*command: str) -> None:
    """Raises CannotHere with what the command said."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except FileNotFoundError:
        raise CannotHere(f"there is no {command[0]} here") from None
    if ended.returncode != 0:
        raise CannotHere(f"`{' '.join(command)}`: {ended.stderr.strip()}")
