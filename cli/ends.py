"""Both ends of a copy: files and streams the coordinator opens, `[ CMD ]` it starts, URIs it leaves to the workers.

The order is that of the checks: what can be refused cheaply is refused first, and nothing of a destination changes
before its size is known and agreed to (`prepare`).
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from nbdshard.common.endpoints import (
    CommandEndpoint,
    Endpoint,
    FileEndpoint,
    NbdEndpoint,
    NullEndpoint,
    StreamEndpoint,
)
from nbdshard.common.messages import EndpointAddress, Side
from nbdshard.coordinator import local
from nbdshard.coordinator.command_server import CommandServer
from nbdshard.coordinator.private_directory import PrivateDirectory

if TYPE_CHECKING:
    from nbdshard.coordinator.job import Outcome


class Ends:
    """Both ends of the copy, opened as far as the coordinator opens them. `stack` closes what is opened."""

    def __init__(
        self,
        source: Endpoint,
        destination: Endpoint,
        stack: ExitStack,
        *,
        resumes: bool = False,
        writes: bool = True,
    ) -> None:
        """`resumes`: the destination holds what an earlier copy wrote. Not `writes`: it is opened as a source is."""
        self._stack = stack
        self._writes = writes
        self._resumes = resumes
        self._directory: PrivateDirectory | None = None
        self._keep_destination: bool | None = None  # not known before the job has ended
        self.servers: list[CommandServer] = []
        self._local_source = self._open_source(source)
        self._local_destination = self._open_destination(destination)
        stack.callback(self._remove_unwritten)
        # Servers last: whatever can be refused without them is refused before they run.
        self.source = self._address(source, "source", self._local_source)
        self.destination = self._address(destination, "destination", self._local_destination)

    @property
    def has_stream(self) -> bool:
        return "stream" in (self.source.kind, self.destination.kind)

    @property
    def destination_grows(self) -> bool:
        return self._writes and self._local_destination is not None and self._local_destination.grows

    def found(self, side: Side) -> os.stat_result | None:
        """What a local file or device was when it was opened, before anything of the copy; None for the others."""
        end = self._local_source if side == "source" else self._local_destination
        return end.facts if end is not None and end.address.kind == "file" else None

    def directory(self) -> PrivateDirectory:
        """The job's private directory, made when first needed."""
        if self._directory is None:
            self._directory = self._stack.enter_context(PrivateDirectory())
        return self._directory

    def prepare(self, size: int) -> None:
        """Give the destination its size. Raises UserError."""
        if self._local_destination is not None:
            self._local_destination.prepare(size)

    def in_users_words(self, line: str) -> str:
        """`line`, with a server of ours called by its command instead of a socket that is gone by then."""
        for server in self.servers:
            line = line.replace(server.uri, server.shown)
        return line

    def settle(self, outcome: Outcome, *, is_resumable: bool) -> None:
        """A destination file that this job created stays when it has content, or might still get some.

        That is also so where a journal is left: whoever resumes wants to find it.
        """
        from nbdshard.coordinator.job import Verdict

        unwritten = outcome.verdict in (Verdict.FAILED, Verdict.STOPPED) and not outcome.counters.total
        self._keep_destination = is_resumable or not unwritten

    def _remove_unwritten(self) -> None:
        end = self._local_destination
        if end is None or self._keep_destination:
            return
        if self._keep_destination is None and end.prepared:
            return  # a fault of ours in the middle of the copy: nobody knows what was written
        end.discard()

    def _open_source(self, endpoint: Endpoint) -> local.LocalEnd | None:
        match endpoint:
            case FileEndpoint(path):
                end = local.open_source(path)
            case StreamEndpoint():
                end = local.standard_input()
            case _:
                return None
        self._stack.callback(end.close)
        return end

    def _open_destination(self, endpoint: Endpoint) -> local.LocalEnd | None:
        match endpoint:
            case FileEndpoint(path) if not self._writes:
                end = local.open_source(path, "destination")
            case FileEndpoint(path):
                end = local.open_destination(path, self._local_source, resumes=self._resumes)
            case StreamEndpoint():
                end = local.standard_output(self._local_source, resumes=self._resumes)
            case _:
                return None
        self._stack.callback(end.close)
        return end

    def _address(self, endpoint: Endpoint, side: Side, end: local.LocalEnd | None) -> EndpointAddress:
        if end is not None:
            return end.address
        match endpoint:
            case NbdEndpoint():
                return EndpointAddress(kind="nbd", address=str(endpoint.uri))
            case CommandEndpoint(argv):
                server = CommandServer(argv, side, self.directory())
                self._stack.callback(server.close)
                self.servers.append(server)
                return EndpointAddress(kind="nbd", address=server.uri)
            case NullEndpoint() | FileEndpoint() | StreamEndpoint():
                return EndpointAddress(kind="null", address="null:")
