"""Clients that mean the server no good: none crashes it, leaks, takes memory without end, or holds up others."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from fuzz.fuzz_server import CASES
from fuzz.mutations import spoil

from nbdshard.common.limits import (
    CREW_CALLS_MAX,
    CREW_FLUSHES_MAX,
    NEGOTIATION_SECONDS_MAX,
    OPTIONS_MAX,
    SERVER_BYTES_MAX,
    SERVER_BYTES_RESERVE,
)
from nbdshard.common.nbd.connecter import Wishes
from nbdshard.common.nbd.constants import Command, Errno, Option
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.nbd.wire_options import (
    pack_option,
)
from nbdshard.common.ranges import Range
from support import processes
from support.by_the_byte import FIXED, GO, OLD, PLAIN, asked, connected_by_tcp
from support.images import MIB
from support.nbd_blocking import SECONDS, Connection, connect, negotiate, received, reset
from support.served import NAME, Served, serving, still_serves
from support.waiting import wait_for

KEPT_THREADS = 2 * CREW_CALLS_MAX + CREW_FLUSHES_MAX  # of an export, once they were needed
CLIENTS = KEPT_THREADS + 12  # of each kind that may leave something behind
LEAVING = 4  # descriptors and threads of clients that are about to go
FUZZED = 300
MEMORY_BYTES_MAX = SERVER_BYTES_MAX + SERVER_BYTES_RESERVE + 64 * MIB  # and an interpreter


# -- nothing is left of those that went


def held(served: Served) -> tuple[int, int]:
    """Descriptors and threads of the server, just after a client was served."""
    still_serves(served)
    return len(processes.descriptors(served.run.pid)), len(os.listdir(f"/proc/{served.run.pid}/task"))


def burdened(served: Served) -> tuple[int, int]:
    """What the server holds once it has had much to do: what it keeps for later is there then."""
    connections = [Connection(served.socket, Wishes(NAME), handles=64) for _ in range(4)]
    for connection in connections:
        for handle in range(64):
            connection.client.read(handle, Range.of(handle * 4096, 4096), memoryview(bytearray(4096)))
        connection.push([])
    for connection in connections:
        connection.run()
        connection.close()
    found = [held(served) for _ in range(20)]
    return max(descriptors for descriptors, _ in found[10:]), max(threads for _, threads in found[10:])


@contextlib.contextmanager
def leaving_nothing(served: Served) -> Iterator[None]:
    """What comes and goes in the block leaves no descriptor and no thread behind. One client may just be leaving."""
    before = burdened(served)
    yield

    def is_gone() -> bool:
        descriptors, threads = held(served)
        return descriptors <= before[0] + LEAVING and threads <= max(before[1], KEPT_THREADS) + LEAVING

    try:
        wait_for("descriptors and threads to be given back", is_gone)
    except TimeoutError:
        raise AssertionError(f"{held(served)} descriptors and threads, {before} before") from None
    assert "internal error" not in served.run.err()


READ = asked(Command.READ, 0, 8 * MIB)
WRITE = asked(Command.WRITE, 0, 8 * MIB)
STAGES = {
    "when it is greeted": b"",
    "in its flags": FIXED[:2],
    "between flags and options": FIXED,
    "in an option's header": FIXED + b"IHAVEOPT",
    "in an option's data": GO[:-3],
    "with an option's answers under way": FIXED + pack_option(Option.LIST) * 50,
    "with its choice's answer under way": GO,
    "in a request's header": GO + READ[:20],
    "with a read under way": GO + READ,
    "with many reads under way": GO + READ * 20,
    "before a payload": GO + WRITE,
    "in a payload": GO + WRITE + bytes(MIB),
    "with writes and reads under way": GO + (asked(Command.WRITE, 0, 4096) + bytes(4096) + READ) * 10,
    "with flushes under way": GO + asked(Command.FLUSH) * 100,
    "in the payload of what is refused": GO + asked(Command.WRITE, 64 * MIB, 8 * MIB) + bytes(MIB),
    "behind its DISC": GO + READ + asked(Command.DISC) + READ,
}
GOINGS: dict[str, Callable[[socket.socket], None]] = {"FIN": socket.socket.close, "RST": reset}


@pytest.mark.parametrize("going", GOINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_who_disconnects_leaves_nothing(memory: Served, stage: str, going: str) -> None:
    with leaving_nothing(memory):
        for _ in range(CLIENTS):
            peer = connected_by_tcp(memory)
            peer.sendall(STAGES[stage])
            if stage == "with many reads under way":
                peer.recv(1 << 16)
            GOINGS[going](peer)


def test_who_disconnects_while_a_slow_backend_works_leaves_nothing() -> None:
    conn = "delay:memory:64M?delay-read=300ms&delay-flush=300ms"
    with serving(conn, "--tcp", "127.0.0.1:0") as served, leaving_nothing(served):
        for going in GOINGS.values():
            for stream in (READ * 4, asked(Command.FLUSH) * 4, asked(Command.WRITE, 0, 4, 1) + b"data"):
                for _ in range(5):
                    peer = connected_by_tcp(served, PLAIN)
                    peer.sendall(stream)
                    going(peer)


def test_half_a_connection_that_is_closed_is_the_end_of_it(memory: Served) -> None:
    """It sends no more, but listens: what it asked before is answered or not, and then it is closed."""
    with leaving_nothing(memory):
        for _ in range(CLIENTS):
            with connected_by_tcp(memory, PLAIN) as peer:
                peer.sendall(READ)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(1 << 20):
                    pass


def test_spoilt_streams_of_clients_harm_nobody(memory: Served, seed: int) -> None:
    random = Random(seed)
    with leaving_nothing(memory):
        for number in range(FUZZED):
            case = random.choice(CASES)
            stream = spoil(case.negotiation.replace(b"other", b"disk\0") + case.requests, random)
            peer = connected_by_tcp(memory) if number % 2 else connect(memory.socket)
            with peer, contextlib.suppress(ConnectionError):  # it was cut off
                peer.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    peer.send(stream)
                if number % 3 == 0:
                    select.select([peer], [], [], SECONDS)
                    peer.recv(1 << 20)


# -- nobody else has to wait, and memory has an end


def takes(peer: socket.socket, data: bytes) -> bool:
    try:
        return peer.send(data) > 0
    except BlockingIOError:
        return False


def stuff(served: Served, peer: socket.socket, data: bytes) -> None:
    """Send until the server takes no more, while others are served."""
    peer.setblocking(False)
    in_vain = 0

    def is_full() -> bool:
        nonlocal in_vain
        while takes(peer, data):
            in_vain = 0
        still_serves(served)
        in_vain += 1
        return in_vain > 20

    wait_for("the server to take no more", is_full)


@pytest.mark.parametrize("length", [512, 1 << 20, 32 << 20])
def test_who_reads_nothing_is_not_listened_to(memory: Served, length: int) -> None:
    flood = b"".join(asked(Command.READ, 0, length, cookie=number) for number in range(2000))
    with leaving_nothing(memory):
        peers = [connected_by_tcp(memory, PLAIN) for _ in range(3)]
        for peer in peers:
            stuff(memory, peer, flood)
        assert processes.resident_peak_bytes(memory.run.pid) < MEMORY_BYTES_MAX
        for peer in peers:
            peer.close()


def test_who_reads_no_refusals_is_not_listened_to(memory: Served) -> None:
    """Refusals are made without a backend."""
    with leaving_nothing(memory), connected_by_tcp(memory, PLAIN) as peer:
        stuff(memory, peer, asked(99) * 10_000)
        assert processes.resident_peak_bytes(memory.run.pid) < MEMORY_BYTES_MAX


def test_who_reads_no_answers_to_options_is_not_listened_to() -> None:
    """Each LIST is answered with half a mebibyte; OPTIONS_MAX of them would be 128."""
    words = [word for n in range(127) for word in ("-e", f"{n:04000}", "raw", "memory:1M")]
    with serving("memory:1M", *words) as served:
        still_serves(served)
        before = processes.resident_peak_bytes(served.run.pid)
        with connect(served.socket) as peer:
            peer.sendall(FIXED)
            stuff(served, peer, pack_option(Option.LIST) * (OPTIONS_MAX - 1))
            assert processes.resident_peak_bytes(served.run.pid) < before + 16 * MIB


def test_a_machine_that_goes_without_a_word_is_noticed(memory: Served) -> None:
    """The kernel asks whether it is there: its timer is seen to run."""
    with connected_by_tcp(memory, PLAIN) as peer:
        ours, theirs = (f"{number:04X}" for number in (memory.address[1], peer.getsockname()[1]))

        def asks() -> bool:
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            (timer,) = (row[5] for row in rows if row[1].endswith(f":{ours}") and row[2].endswith(f":{theirs}"))
            return timer.startswith("02:")  # proc(5): keepalive

        wait_for("keepalive to run", asks)


def test_who_reads_a_byte_at_a_time_holds_up_nobody(memory: Served) -> None:
    with leaving_nothing(memory), connected_by_tcp(memory, PLAIN) as peer:
        peer.sendall(READ * 20)
        for _ in range(50):
            assert len(peer.recv(1)) == 1
            still_serves(memory)


def test_who_sends_a_byte_at_a_time_is_served_like_others(memory: Served) -> None:
    with connected_by_tcp(memory, OLD) as peer:

        def trickle(stream: bytes) -> None:
            for number in range(len(stream)):
                peer.sendall(stream[number : number + 1])
                if number % 10 == 0:
                    still_serves(memory)

        trickle(asked(Command.WRITE, 0, 16) + b"0123456789abcdef")
        assert received(peer, 16)[:8].hex() == "6744669800000000"
        trickle(asked(Command.READ, 0, 16) + asked(Command.DISC))
        assert received(peer, 32)[16:] == b"0123456789abcdef"
        assert peer.recv(1) == b""
    with connected_by_tcp(memory) as peer:
        trickle(GO)
        assert len(received(peer, 100)) == 100


def test_who_never_finishes_a_large_payload_leaves_memory_to_others(memory: Served) -> None:
    """Requests as large as all of it wait for their turn; smaller ones do not."""
    with leaving_nothing(memory):
        peers = [connected_by_tcp(memory, PLAIN) for _ in range(30)]
        for peer in peers:
            peer.sendall(asked(Command.WRITE, 0, 32 * MIB) + bytes(MIB))
        with Connection(memory.socket, Wishes(NAME)) as connection:
            for length in (4096, 1 << 16, 1 << 18, MIB):
                connection.client.write(0, Range(0, length), [b"x" * length])
                assert [done.error for done in connection.run()] == [None]
                assert connection.read(Range(0, length)) == b"x" * length
            connection.close()
        for peer in peers:
            peer.close()


@pytest.mark.long
def test_who_sends_a_large_payload_by_the_byte_is_cut_off_when_others_wait(memory: Served) -> None:
    with connected_by_tcp(memory, PLAIN) as peer, Connection(memory.socket, Wishes(NAME)) as connection:
        peer.sendall(asked(Command.WRITE, 0, 32 * MIB) + bytes(MIB))
        still_serves(memory)
        connection.socket.setblocking(False)
        connection.client.write(0, Range(0, 32 * MIB), [bytes(32 * MIB)])
        out = memoryview(b"".join(map(bytes, in_memory(connection.client.data_to_send()))))
        while out:  # a byte of one for each second of the other
            _, may_send, _ = select.select([], [connection.socket], [], 1)
            if may_send:
                out = out[connection.socket.send(out) :]
            with contextlib.suppress(ConnectionError):
                peer.send(b"x")
        connection.socket.settimeout(SECONDS)
        assert connection.socket.recv(1 << 16)
        assert "it is cut off" in memory.run.err()


def test_requests_that_wait_for_a_slow_backend_hold_up_no_other_export() -> None:
    words = ("-e", "slow", "raw", "delay:memory:64M?delay-read=10m&delay-flush=10m")
    with serving("memory:64M", *words) as served:
        peers = [connect(served.socket) for _ in range(10)]
        for peer in peers:
            negotiate(peer, Wishes("slow", extended=False))
            peer.sendall(asked(Command.READ, 0, 4096) * 100 + asked(Command.FLUSH) * 100)
        for _ in range(10):
            still_serves(served)
        for peer in peers:
            peer.close()


def test_a_thousand_idle_clients_leave_room_for_another(memory: Served) -> None:
    with leaving_nothing(memory):
        peers = [connect(memory.socket) for _ in range(500)]
        for number in range(500):
            peer = connect(memory.socket)
            peers.append(peer)
            negotiate(peer, PLAIN)
            if number % 2:
                peer.sendall(WRITE[:-4])
        still_serves(memory)
        assert processes.resident_peak_bytes(memory.run.pid) < MEMORY_BYTES_MAX
        for peer in peers:
            peer.close()


def test_a_flood_of_clients_is_served(memory: Served) -> None:
    with leaving_nothing(memory):
        for _ in range(1000):
            connected_by_tcp(memory).close()


def test_a_flood_of_requests_is_answered(memory: Served) -> None:
    number = 20_000
    flood = b"".join(asked(Command.FLUSH if cookie % 2 else 99, cookie=cookie) for cookie in range(number))
    with leaving_nothing(memory), connected_by_tcp(memory, OLD) as peer:
        cookies: list[int] = []
        said = bytearray()
        peer.setblocking(False)
        left = memoryview(flood)
        while len(cookies) < number:
            _, may_send, _ = select.select([peer], [peer] if left else [], [], SECONDS)
            if may_send:
                left = left[peer.send(left[: 1 << 16]) :]
            with contextlib.suppress(BlockingIOError):
                said += peer.recv(1 << 16)
            whole = len(said) // 16 * 16
            for magic, error, cookie in struct.iter_unpack(">IIQ", bytes(said[:whole])):
                assert (magic, error) == (0x67446698, 0 if cookie % 2 else Errno.EINVAL)
                cookies.append(cookie)
            del said[:whole]
        assert sorted(cookies) == list(range(number))


def test_a_write_that_did_not_come_whole_changes_nothing(served: Served) -> None:
    for going in GOINGS.values():
        peer = connected_by_tcp(served, PLAIN)
        peer.sendall(asked(Command.WRITE, 0, 8192) + b"x" * 4096)
        going(peer)
    with Connection(served.socket, Wishes(NAME)) as connection:
        assert connection.read(Range(0, 8192)) == bytes(8192)


@pytest.mark.long
def test_who_chooses_nothing_is_sent_away(memory: Served) -> None:
    """After NEGOTIATION_SECONDS_MAX, also if a byte comes now and then."""
    with connect(memory.socket) as silent:
        silent.settimeout(NEGOTIATION_SECONDS_MAX + SECONDS)
        while silent.recv(1 << 16):
            pass
    assert "it has not chosen an export" in memory.run.err()
