"""What a server takes for payload is bounded for all of its clients together."""

from __future__ import annotations

from pathlib import Path

from nbdshard.common.limits import MIB, SERVER_BYTES_MAX, SERVER_BYTES_RESERVE
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.wire import Request, pack_request
from support import images, processes
from support.nbd_blocking import connect, negotiate
from support.served import NAME, serving, still_serves
from support.waiting import wait_for

CLIENTS = 60
BESIDE_PAYLOAD = 24 * MIB  # stacks of threads, and what the allocator keeps
PLAIN = Wishes(NAME, structured=False)


def test_sixty_clients_that_read_nothing_are_held_within_one_bound_and_others_are_served(tmp_path: Path) -> None:
    image = images.filled_image(tmp_path / "image", 32 * MIB, 7)
    with serving(f"delay:file:{image}?delay=1ms") as served:  # a layer: nothing goes through pipes
        still_serves(served)
        before = processes.resident_peak_bytes(served.run.pid)
        peers = []
        for number in range(CLIENTS):
            length = (65_536, 262_144, MIB, 8 * MIB, 32 * MIB)[number % 5]
            peer = connect(served.socket)
            negotiate(peer, PLAIN)
            peer.sendall(b"".join(pack_request(Request(0, 0, n, 0, length), extended=False) for n in range(100)))
            peers.append(peer)
        wait_for(
            "them to hold what they can",
            lambda: processes.resident_peak_bytes(served.run.pid) - before > SERVER_BYTES_MAX // 4,
        )
        for _ in range(5):
            still_serves(served)
        for peer in peers:
            peer.close()
        still_serves(served)
        taken = processes.resident_peak_bytes(served.run.pid) - before
        assert taken < SERVER_BYTES_MAX + SERVER_BYTES_RESERVE + BESIDE_PAYLOAD
