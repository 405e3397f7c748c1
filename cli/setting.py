"""What a job starts with, between the command line and the loop. Plain data; imports nothing that is slow to load."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import msgspec

from nbdshard.cli.ends import Ends
from nbdshard.common.control_url import ControlUrl
from nbdshard.common.messages import JobOptions
from nbdshard.common.signals import SignalWatch
from nbdshard.coordinator.launcher import Launcher

if TYPE_CHECKING:
    from nbdshard.common.keys import CoordinatorKeys


class Crew(msgspec.Struct, frozen=True):
    """Where the workers come from: `count` local processes, or whoever connects to `listen`."""

    count: int
    ring: str = "auto"
    listen: ControlUrl | None = None  # None: local workers over a private unix socket
    keys: CoordinatorKeys | None = None


class Setting(msgspec.Struct, frozen=True):
    """A checked command line, open ends, an address to listen at. `launcher` is None if workers come from elsewhere."""

    args: Namespace
    options: JobOptions
    crew: Crew
    ends: Ends
    url: ControlUrl
    launcher: Launcher | None
    signals: SignalWatch
