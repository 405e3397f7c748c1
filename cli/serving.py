"""`nbdshard serve` at work: what it needs is opened here, in this process or in several, and released at its end."""

from __future__ import annotations

import functools
import os
import socket
import threading
import uuid
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from nbdshard.cli.serve_settings import Settings
from nbdshard.common import logs
from nbdshard.common.child import can_fork
from nbdshard.common.descriptors import raise_descriptors
from nbdshard.common.errors import BugError, UserError
from nbdshard.common.limits import SERVED_CONNECTIONS_MAX
from nbdshard.common.nbd.constants import PORT_DEFAULT
from nbdshard.common.signals import SignalWatch
from nbdshard.server import claims
from nbdshard.server.chain import not_shared, open_exports
from nbdshard.server.exports import Exported, Exports
from nbdshard.server.listening import addresses, identity_of, inherited, listen_tcp, listen_unix, remove_unix
from nbdshard.server.notifying import notify
from nbdshard.server.orders import Orders, SignalOrders
from nbdshard.server.peers import Peers
from nbdshard.server.places import Places, places_for
from nbdshard.server.processes import Processes, Ready, Serve
from nbdshard.server.service import Service


class _Sockets(msgspec.Struct, frozen=True):
    """What listens: for each process its sockets, some of which are those of all. `are_told`: the user knows where."""

    of_processes: list[list[socket.socket]]
    addresses: list[str]
    are_told: bool


def serve(settings: Settings) -> int:
    """Until a signal comes; the exit code. Raises UserError."""
    with SignalWatch() as watch, ExitStack() as stack:
        places = Places(_connections_max(settings))
        if settings.processes > 1:
            return _serve_in_processes(settings, watch, stack, places)
        ending = threading.Event()
        opened = _open(settings, ending)
        try:
            sockets = _listen(settings, stack)
            _be_ready(settings, stack, sockets)
        except BaseException:
            for exported in opened.values():
                exported.backend.close()
            raise
        exports = Exports(opened, uuid.uuid4())
        protocol = settings.extensions.protocol
        return Service(exports, sockets.of_processes[0], places, SignalOrders(watch), ending, protocol=protocol).run()


def _serve_in_processes(settings: Settings, watch: SignalWatch, stack: ExitStack, places: Places) -> int:
    for wanted in settings.exports:
        if parts := not_shared(wanted, settings.extensions.drivers, settings.extensions.layers):
            where, advice = f"export {wanted.name!r}", "--processes is for raw files and what keeps nothing"
            raise UserError(f"processes cannot share {', '.join(parts)}", where, advice)
    claimed = _open(settings, threading.Event())  # what is wrong is told here, once; and all have the claims together
    sockets = _listen(settings, stack)
    if not can_fork():
        raise BugError("there are threads before the processes are made")
    life, peers = uuid.uuid4(), Peers(settings.processes)
    bodies: list[tuple[Serve, Collection[int]]] = []
    for index, ours in enumerate(sockets.of_processes):
        body = functools.partial(_be_one_of_several, settings, index, ours, places, peers, life)
        keep = [
            *claims.descriptors(),
            *places.descriptors,
            *peers.descriptors(index),
            *(sock.fileno() for sock in ours),
        ]
        bodies.append((body, keep))
    processes = Processes(bodies)
    peers.close()
    for sock in {sock for ours in sockets.of_processes for sock in ours}:
        sock.close()
    status = processes.run(SignalOrders(watch), functools.partial(_be_ready, settings, stack, sockets))
    del claimed  # nothing is asked of them here: not even to be closed, which a layer may have something to say about
    return status


def _be_one_of_several(
    settings: Settings,
    index: int,
    listeners: Sequence[socket.socket],
    places: Places,
    peers: Peers,
    life: uuid.UUID,
    orders: Orders,
    ready: Ready,
) -> int:
    logs.set_up(f"serve {index + 1}", settings.level)
    claims.inherit()
    ending = threading.Event()
    exports = Exports(_open(settings, ending), life)
    ready()
    protocol, peer = settings.extensions.protocol, peers.peer(index)
    return Service(exports, listeners, places, orders, ending, protocol=protocol, peer=peer).run()


def _open(settings: Settings, ending: threading.Event) -> dict[str, Exported]:
    return open_exports(settings.exports, ending, settings.extensions.drivers, settings.extensions.layers)


def _connections_max(settings: Settings) -> int:
    descriptors = raise_descriptors()
    possible = places_for(descriptors, len(settings.exports))
    if settings.max_connections is None:
        return min(possible, SERVED_CONNECTIONS_MAX)
    if settings.max_connections > possible:
        what = f"{settings.max_connections} connections, and {descriptors} open files are enough for {possible}"
        raise UserError(what, "this process", "raise the limit: ulimit -n")
    return settings.max_connections


def _listen(settings: Settings, stack: ExitStack) -> _Sockets:
    found: list[list[socket.socket]] = [[] for _ in range(settings.processes)]
    handed_over = inherited()
    places = settings.tcp
    if not (places or settings.unix or handed_over):
        places = [("", PORT_DEFAULT)]
    for host, port in places:
        for ours, more in zip(found, listen_tcp(host, port, settings.processes), strict=True):
            ours += more
    shared = list(handed_over)
    for path in map(Path, settings.unix):
        shared.append(listen_unix(path))
        stack.callback(remove_unix, path, identity_of(path))
    for ours in found:
        ours += shared
    return _Sockets(found, addresses(found[0]), are_told=not (places or settings.unix))


def _be_ready(settings: Settings, stack: ExitStack, sockets: _Sockets) -> None:
    """Tell the user, and who started us, that clients are let in. Raises UserError."""
    if settings.pid_file is not None:
        path = Path(settings.pid_file)
        try:
            path.write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", settings.pid_file or "--pid-file") from None
        stack.callback(path.unlink, missing_ok=True)
    for address in sockets.addresses:
        (logs.info if sockets.are_told else logs.say)(f"listens on {address}")
    notify("READY=1", f"STATUS=listens on {' '.join(sockets.addresses)}")
