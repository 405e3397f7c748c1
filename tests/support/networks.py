"""Two machines and a router between them, as network namespaces: where packets can be lost without anybody being told.

```
   client 10.231.1.2 ---- 10.231.1.1 router 10.231.2.1 ---- 10.231.2.2 server
```
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

SERVER_ADDRESS = "10.231.2.2"
CLIENT_ADDRESS = "10.231.1.2"
COMMAND_SECONDS = 20.0


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

    def lose(self, percent: float, delay_ms: float) -> None:
        """The router loses so many of the packets in either direction, and holds up the others."""
        for link in ("to-client", "to-server"):
            netem = ("netem", "loss", f"{percent}%", "delay", f"{delay_ms}ms")
            _run("tc", "-n", self.router, "qdisc", "add", "dev", link, "root", *netem)

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
