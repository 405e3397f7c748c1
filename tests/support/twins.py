"""A connecter and a listener, a client and a device, talking to one another in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nbdshard.common.nbd import connecter as connecter_module
from nbdshard.common.nbd.client import Client, Done
from nbdshard.common.nbd.connecter import Connecter, Negotiated, Wishes
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.payload import in_memory
from nbdshard.server.device import Device
from nbdshard.server.listener import Entered, Listener
from nbdshard.server.offers import NamedOffers, Offer
from nbdshard.server.serving import Request

MIB = 1 << 20
FLAGS = TransmissionFlag(0x1FFF) & ~(
    TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_RESIZE | TransmissionFlag.BLOCK_STATUS_PAYLOAD
)
DISK = Offer("disk", MIB, FLAGS)
WHOLE = 1 << 30  # as much as fits


class Receives(Protocol):
    """What every machine has."""

    def receive_target(self) -> memoryview: ...


def offers(*exports: Offer) -> NamedOffers:
    return NamedOffers(exports or [DISK])


def feed_listener(listener: Listener, stream: bytes, piece: int = WHOLE) -> list[Entered]:
    """Until the stream is over or nothing more is wanted. Errors come through."""
    events: list[Entered] = []
    data = memoryview(stream)
    while data and not listener.done:
        target = listener.receive_target()
        count = min(len(target), len(data), piece)
        target[:count] = data[:count]
        events += listener.received(count)
        data = data[count:]
    return events


def feed_device(device: Device, stream: bytes, piece: int = WHOLE) -> tuple[list[Request], bytes]:
    """(requests, what it did not want any more). Errors come through."""
    requests: list[Request] = []
    data = memoryview(stream)
    while data and (target := device.receive_target()):
        count = min(len(target), len(data), piece)
        target[:count] = data[:count]
        requests += device.received(count)
        data = data[count:]
    return requests, bytes(data)


def said_by_listener(listener: Listener) -> bytes:
    return b"".join(listener.data_to_send())


def said_by_device(device: Device) -> bytes:
    """Everything queued, as sent."""
    data = b"".join(map(bytes, in_memory(device.data_to_send())))
    if data:
        device.sent(len(data))
    return data


def negotiate(
    wishes: Wishes, listener: Listener, piece: int = WHOLE
) -> tuple[list[connecter_module.Event], list[Entered]]:
    """Both sides until the client's is done."""
    connecter = Connecter(wishes, "server")
    heard: list[connecter_module.Event] = []
    entered: list[Entered] = []
    while not connecter.done:
        data = memoryview(said_by_listener(listener))
        assert data or not listener.done, "the listener has nothing more to say"
        while data:
            target = connecter.receive_target()
            count = min(len(target), len(data), piece)
            target[:count] = data[:count]
            heard += connecter.received(count)
            data = data[count:]
        entered += feed_listener(listener, b"".join(connecter.data_to_send()), piece)
    return heard, entered


@dataclass
class Pair:
    """A client and a device of one export, past their negotiation."""

    client: Client
    device: Device
    piece: int = WHOLE
    requests: list[Request] = field(default_factory=list)

    @staticmethod
    def of(wishes: Wishes, offer: Offer = DISK, *, piece: int = WHOLE) -> Pair:
        heard, entered = negotiate(wishes, Listener(offers(offer), "client"), piece)
        (negotiated,), (entry,) = heard, entered
        assert isinstance(negotiated, Negotiated)
        return Pair(Client(negotiated.export, "server", 64), Device(entry.export, "client"), piece)

    def ask(self) -> Sequence[Request]:
        """Carry over what the client has queued; the requests that the device hands out."""
        data = b"".join(map(bytes, in_memory(self.client.data_to_send())))
        if data:
            self.client.sent(len(data))
        requests, rest = feed_device(self.device, data, self.piece)
        assert not rest
        self.requests += requests
        return requests

    def answers(self) -> Sequence[Done]:
        """Carry over what the device says; how the client's requests ended."""
        return [event for event in self.hear(said_by_device(self.device)) if isinstance(event, Done)]

    def hear(self, stream: bytes) -> Iterable[object]:
        data = memoryview(stream)
        while data:
            target = self.client.receive_target()[0]
            count = min(len(target), len(data), self.piece)
            target[:count] = data[:count]
            yield from self.client.received(count)
            data = data[count:]
