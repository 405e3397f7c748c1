"""What one operation of the ring costs, for both rings: `python benchmarks/ring_cost.py [repeats]`.

Prints medians, in microseconds of wall time and of this process's CPU for each operation:

- ready: a RECEIVE and a SEND of 64 bytes on a socketpair, both ready when they are started; no waiting at all.
- batch: the same for 64 socketpairs in one turn of the loop.
- ping-pong: a SEND to another process and the RECEIVE of its echo; most of the wall time is the other process.
- stream: 1 MiB RECEIVEs and SENDs over a unix socket to and from the same loop, with the rate; short counts included.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable

from nbdshard.common.errors import UserError
from nbdshard.common.ring import Descriptor, Kind, Operation, Ring, open_ring

SECONDS_MAX = 60.0
MIB = 1 << 20


def pair(ring: Ring) -> tuple[Descriptor, Descriptor]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    first, second = ends
    return ring.attach(first.detach(), is_socket=True), ring.attach(second.detach(), is_socket=True)


def until(ring: Ring, count: int) -> list[Operation]:
    """Wait for `count` completions."""
    done: list[Operation] = []
    while len(done) < count:
        done += ring.wait(SECONDS_MAX)
    return done


def exchange(ring: Ring, pairs: int, turns: int) -> int:
    operations = []
    for _ in range(pairs):
        left, right = pair(ring)
        operations.append(Operation(Kind.SEND, left, buffers=[memoryview(bytes(64))]))
        operations.append(Operation(Kind.RECEIVE, right, buffers=[memoryview(bytearray(64))]))
    for _ in range(turns):
        for operation in operations:
            ring.submit(operation)
        until(ring, len(operations))
    return turns * len(operations)


def ready(ring: Ring) -> int:
    return exchange(ring, 1, 20_000)


def batch(ring: Ring) -> int:
    return exchange(ring, 64, 500)


def ping_pong(ring: Ring) -> int:
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        while ball := theirs.recv(64):
            theirs.send(ball)
        os._exit(0)
    theirs.close()
    ours.setblocking(False)
    descriptor = ring.attach(ours.detach(), is_socket=True)
    turns = 10_000
    send = Operation(Kind.SEND, descriptor, buffers=[memoryview(bytes(64))])
    receive = Operation(Kind.RECEIVE, descriptor, buffers=[memoryview(bytearray(64))])
    for _ in range(turns):
        ring.submit(receive)
        ring.submit(send)
        until(ring, 2)
    ring.submit(Operation(Kind.CLOSE, descriptor))
    until(ring, 1)
    os.waitpid(child, 0)
    return 2 * turns


def stream(ring: Ring) -> int:
    left, right = pair(ring)
    source, target = memoryview(bytearray(MIB)), memoryview(bytearray(MIB))
    send, receive = Operation(Kind.SEND, left), Operation(Kind.RECEIVE, right)
    total, sent, received, operations = 2048 * MIB, 0, 0, 0
    send.buffers, receive.buffers = [source], [target]
    ring.submit(send)
    ring.submit(receive)
    while received < total:
        for operation in ring.wait(SECONDS_MAX):
            operations += 1
            if operation is send:
                sent += operation.result
                if sent < total:
                    send.buffers = [source[sent % MIB :]]
                    ring.submit(send)
            else:
                received += operation.result
                if received < total:
                    receive.buffers = [target[received % MIB :]]
                    ring.submit(receive)
    return operations


def measure(name: str, run: Callable[[Ring], int], wish: str, repeats: int) -> None:
    wall, cpu, rate = [], [], []
    for _ in range(repeats):
        ring, _ = open_ring(wish)
        started, burnt = time.perf_counter(), time.process_time()
        operations = run(ring)
        seconds = time.perf_counter() - started
        wall.append(seconds / operations * 1e6)
        cpu.append((time.process_time() - burnt) / operations * 1e6)
        rate.append(2048 / seconds)
        ring.close()
    tail = f"  {statistics.median(rate):6.0f} MiB/s" if run is stream else ""
    print(
        f"{wish:9} {name:10} {statistics.median(wall):7.2f} us  {statistics.median(cpu):7.2f} us CPU{tail}", flush=True
    )


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for wish in ("io_uring", "epoll"):
        try:
            open_ring(wish)[0].close()
        except UserError as error:
            print(error)
            continue
        for name, run in (("ready", ready), ("batch", batch), ("ping-pong", ping_pong), ("stream", stream)):
            measure(name, run, wish, repeats)


if __name__ == "__main__":
    main()
