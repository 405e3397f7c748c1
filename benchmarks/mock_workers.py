"""Many mock workers in one process: `python -m benchmarks.mock_workers URL WORKERS BYTES`.

Each has a DEALER socket of its own, made as common.channel makes a worker's, and a name of its own; they share one
ZeroMQ context and one thread, because their cost is not what is measured. Ends when all have been told to stop.
"""

from __future__ import annotations

import sys

import zmq

from benchmarks.mock_worker import MockWorker, mock_disk
from nbdshard.common.limits import MESSAGES_QUEUED_MAX
from nbdshard.common.machine import machine_id, new_worker_name
from nbdshard.common.messages import decode_from_coordinator, encode

SILENCE_SECONDS_MAX = 30.0  # without a word from the coordinator it is given up
LINGER_MILLISECONDS = 1000


def serve(url: str, count: int, size: int) -> None:
    """Be `count` workers of the coordinator at `url`, which find disks of `size` bytes, until they are stopped."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    poller = zmq.Poller()
    workers: dict[zmq.Socket[bytes], MockWorker] = {}
    try:
        for _ in range(count):
            name = new_worker_name()
            dealer = context.socket(zmq.DEALER)
            dealer.setsockopt(zmq.ROUTING_ID, bytes.fromhex(name))
            dealer.setsockopt(zmq.SNDHWM, MESSAGES_QUEUED_MAX)
            dealer.setsockopt(zmq.RCVHWM, MESSAGES_QUEUED_MAX)
            dealer.connect(url)
            worker = workers[dealer] = MockWorker(name, machine_id(), mock_disk(size))
            dealer.send(encode(worker.hello()))
            poller.register(dealer, zmq.POLLIN)
        while not all(worker.gone for worker in workers.values()):
            ready = poller.poll(int(SILENCE_SECONDS_MAX * 1000))
            if not ready:
                raise TimeoutError(f"the coordinator said nothing for {SILENCE_SECONDS_MAX:g} s")
            for end, _ in ready:
                assert isinstance(end, zmq.Socket)
                _answer(end, workers[end])
    finally:
        for dealer in workers:
            dealer.close(LINGER_MILLISECONDS)
        context.term()


def _answer(dealer: zmq.Socket[bytes], worker: MockWorker) -> None:
    """Answer everything that has arrived."""
    while True:
        try:
            frame = dealer.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
        for message in worker.answers(decode_from_coordinator(frame, "coordinator")):
            dealer.send(encode(message))


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
