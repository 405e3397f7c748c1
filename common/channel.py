"""The control channel: control messages over ZeroMQ, a ROUTER in the coordinator and a DEALER in each worker.

One frame a message (common.messages packs them). Neither side ever blocks. A worker's name is its ZeroMQ
routing id in hexadecimal, chosen at random by whoever starts it, so it stays the same when a connection is
made again; a new connection takes the name over (ROUTER_HANDOVER), because the old one may be half dead.

Each channel has a ZeroMQ context of its own, closed with it.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import zmq

from nbdshard.common import logs
from nbdshard.common.control_url import ControlUrl, parse_control_url, unmapped
from nbdshard.common.errors import ProtocolError, UserError
from nbdshard.common.limits import (
    BAD_MESSAGES_LOGGED_MAX,
    CHANNEL_LINGER_SECONDS,
    CONNECT_SECONDS,
    CONTROL_HANDSHAKE_SECONDS,
    COORDINATOR_ANSWER_SECONDS,
    COORDINATOR_DESCRIPTORS,
    MESSAGE_BYTES_MAX,
    MESSAGES_PER_TURN_MAX,
    MESSAGES_QUEUED_MAX,
    RECONNECT_SECONDS_MAX,
    RECONNECT_SECONDS_MIN,
    WORKERS_MAX,
)
from nbdshard.common.machine import new_worker_name
from nbdshard.common.messages import (
    PROTOCOL_VERSION,
    FromCoordinator,
    FromWorker,
    Hello,
    Message,
    Refused,
    decode_from_coordinator,
    decode_from_worker,
    encode,
    foreign_version,
)

if TYPE_CHECKING:  # keys are for networks; a local job does not pay for their import
    from nbdshard.common.keys import CoordinatorKeys, WorkerKeys
    from nbdshard.common.monitor import Monitor
    from nbdshard.common.zap import Doorkeeper

# As numbers: pyzmq's flags are enumerations, and joining two of them costs as much as sending.
_NOW: Final = int(zmq.NOBLOCK)
_READABLE: Final = int(zmq.POLLIN)
_NOW_AND_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)


class CoordinatorChannel:
    """The coordinator's end. Poll `sockets` for reading; call `receive` when one is ready. Close it when
    done.
    """

    def __init__(self, url: ControlUrl, keys: CoordinatorKeys | None = None) -> None:
        """Listen at `url`; `keys` turns CURVE on. Raises UserError when the address cannot be had."""
        _check_socket_path(url)
        if url.scheme == "tcp":
            _make_room()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._doorkeeper: Doorkeeper | None = None
        self._bound_path = ""
        self._bad_messages = 0
        self._router = self._context.socket(zmq.ROUTER)
        try:
            _set_common_options(self._router)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._router.setsockopt(zmq.BACKLOG, WORKERS_MAX)  # who finds it full over TCP tries again a second later
            if keys is not None:
                from nbdshard.common.zap import DOMAIN, Doorkeeper

                self._doorkeeper = Doorkeeper(self._context, keys.allowed)  # before bind: see common.zap
                self._router.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
                self._router.setsockopt(zmq.CURVE_SERVER, 1)
                self._router.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
            self._bind(url)
        except BaseException:
            self.close(0)
            raise
        self.sockets = [self._router] + ([self._doorkeeper.socket] if self._doorkeeper else [])

    def _bind(self, url: ControlUrl) -> None:
        host = f"[{url.host}]" if ":" in url.host else url.host
        endpoint = str(url) if url.scheme == "ipc" else f"tcp://{host}:{url.port or '*'}"
        umask = os.umask(0o077)  # only our user may connect to a unix socket
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            raise UserError(f"cannot listen: {zmq.strerror(error.errno or 0)}", str(url)) from None
        finally:
            os.umask(umask)
        self._bound_path = url.path
        self.url = parse_control_url(unmapped(self._router.getsockopt_string(zmq.LAST_ENDPOINT)))

    def receive(self) -> list[tuple[str, FromWorker]]:
        """What arrived: (worker, message) pairs, at most MESSAGES_PER_TURN_MAX of them. Never blocks.

        A malformed message is dropped with a log line; a worker of another protocol version is sent
        `Refused`.
        """
        if self._doorkeeper is not None:
            self._doorkeeper.answer()
        messages: list[tuple[str, FromWorker]] = []
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                worker = self._router.recv(_NOW).hex()
            except zmq.Again:
                break
            frame = self._router.recv(_NOW, copy=False)  # a message's frames arrive together
            message = self._decode(worker, frame)
            if message is not None:
                messages.append((worker, message))
        return messages

    def _decode(self, worker: str, frame: zmq.Frame) -> FromWorker | None:
        try:
            if frame.more:
                raise ProtocolError(worker, "control message", f"{1 + self._skip_frames()} frames instead of one")
            message = decode_from_worker(frame.bytes, worker)
        except ProtocolError as error:
            self._decline(worker, frame, error)
            return None
        if isinstance(message, Hello) and message.version != PROTOCOL_VERSION:
            self._refuse_version(worker, frame, message.version)
            return None
        return message

    def _skip_frames(self) -> int:
        """Drop what is left of a message; return how many frames that was."""
        count, is_more = 0, True
        while is_more:
            is_more = self._router.recv(_NOW, copy=False).more
            count += 1
        return count

    def _decline(self, worker: str, frame: zmq.Frame, error: ProtocolError) -> None:
        """Another version's Hello may have other fields than ours: it is refused; what else is malformed is dropped."""
        version = None if frame.more else foreign_version(frame.bytes)
        if version is not None:
            self._refuse_version(worker, frame, version)
            return
        self._bad_messages += 1
        if self._bad_messages <= BAD_MESSAGES_LOGGED_MAX:
            logs.warning(f"dropped a message: {ProtocolError(_peer(worker, frame), error.stage, error.what)}")

    def _refuse_version(self, worker: str, frame: zmq.Frame, version: int) -> None:
        reason = f"the worker speaks control protocol {version}, the coordinator {PROTOCOL_VERSION}"
        logs.warning(f"refused {_peer(worker, frame)}: {reason}")
        self.send(worker, Refused(version=PROTOCOL_VERSION, reason=reason))

    def send(self, worker: str, message: Message) -> bool:
        """Send `message` to `worker`. False, and a log line, if it is not connected or its queue is full."""
        frame = encode(message)
        try:
            self._router.send(bytes.fromhex(worker), _NOW_AND_MORE)
            self._router.send(frame, _NOW)
        except zmq.ZMQError as error:  # EHOSTUNREACH: not connected; EAGAIN: MESSAGES_QUEUED_MAX are waiting
            name = type(message).__name__
            logs.debug(f"{name} did not reach worker {worker[:8]}: {zmq.strerror(error.errno or 0)}")
            return False
        return True

    def close(self, linger_seconds: float = CHANNEL_LINGER_SECONDS) -> None:
        """Give the last messages `linger_seconds` to leave, then close. Idempotent."""
        self._router.close(int(linger_seconds * 1000))
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
        if self._bound_path:  # libzmq leaves it
            with suppress(OSError):
                os.unlink(self._bound_path)
            self._bound_path = ""


class WorkerChannel:
    """A worker's end. `name` is the worker's name, to be said in its Hello.

    `descriptor` is EDGE-triggered: before each wait for it, call `receive` until it returns nothing. `check`
    says what is wrong when no coordinator answers.
    """

    def __init__(self, url: str, now: float, *, name: str = "", keys: WorkerKeys | None = None) -> None:
        """Start to connect to `url`, at the monotonic time `now`. Raises UserError for a wrong address."""
        self.url = parse_control_url(url)
        self.name = name or new_worker_name()
        self._keys = keys
        self._deadline = now + COORDINATOR_ANSWER_SECONDS
        self._answered = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._dealer = self._context.socket(zmq.DEALER)
        self._monitor: Monitor | None = None
        try:
            self._connect(keys)
        except BaseException:
            self.close(0)
            raise
        self.descriptor = int(self._dealer.getsockopt(zmq.FD))

    def _connect(self, keys: WorkerKeys | None) -> None:
        dealer = self._dealer
        _set_common_options(dealer)
        dealer.setsockopt(zmq.ROUTING_ID, bytes.fromhex(self.name))
        dealer.setsockopt(zmq.RECONNECT_IVL, int(RECONNECT_SECONDS_MIN * 1000))
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, int(RECONNECT_SECONDS_MAX * 1000))
        dealer.setsockopt(zmq.CONNECT_TIMEOUT, int(CONNECT_SECONDS * 1000))
        if keys is not None:
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.own.public.raw)
            dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.own.secret)
            dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.coordinator.raw)
        from nbdshard.common.monitor import Monitor

        self._monitor = Monitor(dealer)
        try:
            dealer.connect(str(self.url))
        except zmq.ZMQError as error:
            raise UserError(f"cannot connect: {zmq.strerror(error.errno or 0)}", str(self.url)) from None

    @property
    def answered(self) -> bool:
        """Whether the coordinator has said anything yet."""
        return self._answered

    def receive(self) -> list[FromCoordinator]:
        """What arrived, at most MESSAGES_PER_TURN_MAX messages. Never blocks.

        Raises ProtocolError for a malformed message: a coordinator that sends one is not to be worked for.
        """
        if not int(self._dealer.getsockopt(zmq.EVENTS)) & _READABLE:  # cheaper than an exception, and mostly so
            return []
        messages: list[FromCoordinator] = []
        for _ in range(MESSAGES_PER_TURN_MAX):
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            messages.append(self._decode(frames))
            self._answered = True
        return messages

    def _decode(self, frames: list[bytes]) -> FromCoordinator:
        peer = f"coordinator {self.url}"
        if len(frames) != 1:
            raise ProtocolError(peer, "control message", f"{len(frames)} frames instead of one")
        return decode_from_coordinator(frames[0], peer)

    def send(self, message: Message) -> bool:
        """Queue `message`. False when the queue is full: the coordinator has not read for a long time."""
        try:
            self._dealer.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def check(self, now: float) -> None:
        """Call a few times a second until `answered`. Never blocks.

        Raises UserError, with the best reason that can be known, when the coordinator will not have this
        worker or has not answered within COORDINATOR_ANSWER_SECONDS.
        """
        if self._monitor is None:
            return
        self._monitor.read()
        if self._answered:
            return
        final = self._monitor.final_reason(self._keys)
        if final:
            raise UserError(final, f"coordinator {self.url}")
        if now >= self._deadline:
            likely = self._monitor.likely_reason(self._keys)
            raise UserError(f"no answer within {COORDINATOR_ANSWER_SECONDS:g} s: {likely}", f"coordinator {self.url}")

    def close(self, linger_seconds: float = CHANNEL_LINGER_SECONDS) -> None:
        """Give the last messages `linger_seconds` to leave, then close. Idempotent."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._dealer.close(int(linger_seconds * 1000))
        self._context.term()


def _set_common_options(end: zmq.Socket[bytes]) -> None:
    end.setsockopt(zmq.LINGER, 0)
    end.setsockopt(zmq.SNDHWM, MESSAGES_QUEUED_MAX)
    end.setsockopt(zmq.RCVHWM, MESSAGES_QUEUED_MAX)
    end.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
    end.setsockopt(zmq.HANDSHAKE_IVL, int(CONTROL_HANDSHAKE_SECONDS * 1000))
    end.setsockopt(zmq.IPV6, 1)


def _make_room() -> None:
    """Have descriptors for all the workers that may come, if we may: libzmq spins on a connection it has none for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(COORDINATOR_DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _peer(worker: str, frame: zmq.Frame) -> str:
    """A worker as log lines name it: its short name, and over a network its address."""
    try:
        address = frame.get("Peer-Address")
    except zmq.ZMQError:
        address = ""  # a unix socket has none
    return f"worker {worker[:8]} at {address}" if address else f"worker {worker[:8]}"


def _check_socket_path(url: ControlUrl) -> None:
    """libzmq unlinks whatever stands where it binds a unix socket: let that only be a socket nobody listens
    at.
    """
    if url.scheme != "ipc":
        return
    try:
        mode = os.lstat(url.path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        raise UserError("cannot listen: something else than a socket is there already", str(url))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(url.path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError:
            pass
    raise UserError("cannot listen: another process listens there", str(url))
