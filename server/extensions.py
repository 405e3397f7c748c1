"""What a program adds to the server, or has in the place of what is there: tables, all in one."""

from __future__ import annotations

from typing import Final

import msgspec

from nbdshard.server.chain import DRIVERS, LAYERS, Drivers, Layers
from nbdshard.server.handling import NBD, Protocol


class Extensions(msgspec.Struct, frozen=True):
    """Drivers and layers that CONN may name, and options and commands that clients may use."""

    drivers: Drivers = DRIVERS
    layers: Layers = LAYERS
    protocol: Protocol = NBD


NOTHING: Final = Extensions()
