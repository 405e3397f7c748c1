"""The coordinator's end of a worker's channel: its words are the test's, and what the worker says is kept."""

from __future__ import annotations

from nbdshard.common.messages import FromCoordinator, FromWorker


class ScriptedChannel:
    """Has a descriptor for those that wait for one: it never becomes readable. Is what `worker.life.Channel` wants."""

    name = "a"

    def __init__(self, descriptor: int = -1) -> None:
        self.descriptor = descriptor
        self.to_worker: list[FromCoordinator] = []
        self.said: list[FromWorker] = []
        self.answered = True
        self.reads = 0  # at least one in each turn

    def receive(self) -> list[FromCoordinator]:
        self.reads += 1
        messages, self.to_worker = self.to_worker, []
        return messages

    def send(self, message: FromWorker) -> bool:
        self.said.append(message)
        return True

    def check(self, now: float) -> None: ...

    def heard(self, kind: type[FromWorker]) -> list[FromWorker]:
        """All of `kind` that the worker said so far."""
        return [message for message in self.said if isinstance(message, kind)]
