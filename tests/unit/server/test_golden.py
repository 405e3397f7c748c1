"""What goes over the wire, byte for byte as the spec has it, by hand: what both sides get wrong alike shows here.

Nobody else's client in Debian 12 speaks extended headers, so for those this is the only witness.
"""

from __future__ import annotations

import pytest

from nbdshard.common.nbd.constants import Command, Errno, TransmissionFlag
from nbdshard.common.nbd.export import BlockSizes
from nbdshard.common.nbd.hints import Hints
from nbdshard.common.nbd.payload import in_memory
from nbdshard.common.ranges import Range
from nbdshard.server.device import Hole
from nbdshard.server.offers import NamedOffers, Offer
from nbdshard.server.serving import Request
from nbdshard.server.session import Session

FLAGS = TransmissionFlag(0b1101_1110_1101)  # all but READ_ONLY, ROTATIONAL, RESIZE
DISK = Offer("disk", 0x123456, FLAGS, BlockSizes(1, 4096, 0x2000000), description="the first")
SMALL = Offer("ä", 512, TransmissionFlag(3), hints=Hints(instance="6f1c0000-0000-4000-8000-00000000000a"))


class Talk:
    """A session that hears and says hexadecimal digits; blanks and line breaks between them are for the reader."""

    def __init__(self) -> None:
        self.session = Session(NamedOffers([DISK, SMALL]), "client")
        self.says("4e42444d41474943 49484156454f5054 0003")

    def hears(self, digits: str) -> list[Request]:
        requests: list[Request] = []
        data = memoryview(bytes.fromhex(digits))
        while data:
            target = self.session.receive_target()
            count = min(len(target), len(data))
            assert count, "nothing more is wanted"
            target[:count] = data[:count]
            requests += self.session.received(count)
            data = data[count:]
        return requests

    def says(self, digits: str) -> None:
        said = b"".join(in_memory(self.session.data_to_send()))
        assert said.hex() == bytes.fromhex(digits).hex()
        if said:
            self.session.sent(len(said))

    def option(self, number: int, data: str, *replies: tuple[str, str]) -> None:
        """What is answered to an option: (type, payload) of each reply."""
        body = bytes.fromhex(data)
        self.hears(f"49484156454f5054 {number:08x} {len(body):08x}" + data)
        self.says(
            "".join(f"0003e889045565a9 {number:08x} {kind} {len(bytes.fromhex(p)):08x} {p}" for kind, p in replies)
        )


ACK = ("00000001", "")
SIZE = ("00000003", "0000 0000000000123456 0ded")
BLOCKS = ("00000003", "0003 00000001 00001000 02000000")
ALLOCATION = ("00000004", f"00000001 {b'base:allocation'.hex()}")


def text(words: str) -> str:
    return words.encode().hex()


def test_the_old_way_without_fixed_newstyle() -> None:
    talk = Talk()
    talk.hears("00000000 49484156454f5054 00000001 00000004 6469736b")
    talk.says("0000000000123456 0d6d" + "00" * 124)  # SEND_DF is not set without structured replies
    (read, write, disc) = talk.hears(
        "25609513 0000 0000 0000000000000007 0000000000000200 00000004"
        "25609513 0001 0001 0000000000000008 0000000000000000 00000002 6162"
        "25609513 0000 0003 0000000000000009 0000000000000000 00000000"
        "25609513 0000 0002 0000000000000000 0000000000000000 00000000"
    )
    assert (read.command, read.offset, read.length) == (Command.READ, 512, 4)
    assert (write.command, write.payload, write.fua) == (Command.WRITE, b"ab", True)
    device = talk.session.device
    assert device is not None
    device.done(write)
    device.content(read, [b"x", Hole(2), b"y"])
    device.failed(disc, Errno.ENOSPC, "which nobody hears")  # it is the flush
    talk.says(
        "67446698 00000000 0000000000000008"
        "67446698 00000000 0000000000000007 78000079"
        "67446698 0000001c 0000000000000009"
    )
    assert talk.session.finished


def test_options_one_by_one() -> None:
    talk = Talk()
    talk.hears("00000003")
    talk.option(3, "", ("00000002", f"00000004 6469736b {text('the first')}"), ("00000002", "00000002 c3a4"), ACK)
    talk.option(5, "", ("80000001", text("this server does not know it")))  # STARTTLS
    talk.option(6, "00000004 6e6f7065 0000", ("80000006", text("there is no such export")))
    talk.option(9, "00000004 6469736b 00000000", ("80000003", text("structured replies come first")))
    talk.option(8, "", ACK)
    talk.option(9, "00000004 6469736b 00000000", ("00000004", f"00000000 {text('base:allocation')}"), ACK)
    hints = text("x-nbdshard:hints;v=1;instance=6f1c0000-0000-4000-8000-00000000000a")
    query = f"00000010 {text('x-nbdshard:hints')}"
    talk.option(9, f"00000002 c3a4 00000001 {query}", ("00000004", f"00000000 {hints}"), ACK)
    allocation = f"0000000f {text('base:allocation')}"
    talk.option(
        10,
        f"00000004 6469736b 00000002 00000003 783a79 {allocation}",
        ALLOCATION,
        ACK,
    )
    talk.option(10, "00000004 6469736b 00000001 00000003 783a79", ACK)  # takes the one before away
    talk.option(
        6,
        "00000004 6469736b 0003 0001 0002 0003",
        SIZE,
        BLOCKS,
        ("00000003", "0001 6469736b"),
        ("00000003", f"0002 {text('the first')}"),
        ACK,
    )
    talk.option(
        7,
        "00000000 0000",
        SIZE,
        BLOCKS,
        ACK,
    )
    assert talk.session.device is not None
    assert not talk.session.device.export.contexts
    talk.hears("25609513 0000 0007 0000000000000001 0000000000000000 00000200")
    words = text("NBD_CMD_BLOCK_STATUS, and no metadata context was agreed on")
    talk.says(f"668e33ef 0001 8001 0000000000000001 {6 + len(words) // 2:08x} 00000016 {len(words) // 2:04x} {words}")


def structured() -> Talk:
    talk = Talk()
    talk.hears("00000003 49484156454f5054 00000008 00000000")
    talk.says("0003e889045565a9 00000008 00000001 00000000")
    _choose(talk)
    return talk


def extended() -> Talk:
    talk = Talk()
    talk.hears("00000003 49484156454f5054 0000000b 00000000")
    talk.says("0003e889045565a9 0000000b 00000001 00000000")
    talk.option(8, "", ("8000000a", text("extended headers, which include it, were agreed on")))
    _choose(talk)
    return talk


def _choose(talk: Talk) -> None:
    allocation = text("base:allocation")
    query = f"00000004 6469736b 00000001 0000000f {allocation}"
    talk.option(10, query, ALLOCATION, ACK)
    talk.option(7, "00000004 6469736b 0001 0003", SIZE, BLOCKS, ACK)


def test_structured_replies() -> None:
    talk = structured()
    read, whole, status, one, write, flush = talk.hears(
        "25609513 0000 0000 0000000000000001 0000000000001000 00000300"
        "25609513 0004 0000 0000000000000002 0000000000001000 00000003"
        "25609513 0000 0007 0000000000000003 0000000000000000 00123456"
        "25609513 0008 0007 0000000000000004 0000000000000200 00001000"
        "25609513 0000 0001 0000000000000005 0000000000000000 00000001 7a"
        "25609513 0000 0003 0000000000000006 0000000000000000 00000000"
    )
    device = talk.session.device
    assert device is not None
    device.content(read, [Hole(0x200), b"d" * 0x100])
    device.content(whole, [b"a", Hole(1), b"b"])
    device.extents(status, {"base:allocation": [(Range(0, 0x1000), 3), (Range(0x1000, 1 << 40), 0)]})
    device.extents(one, {"base:allocation": [(Range(0x200, 0x1000), 3), (Range(0x1000, 0x1200), 0)]})
    device.done(write)
    device.failed(flush, Errno.EIO, "worn out")
    talk.says(
        "668e33ef 0000 0002 0000000000000001 0000000c 0000000000001000 00000200"
        f"668e33ef 0001 0001 0000000000000001 00000108 0000000000001200 {'64' * 0x100}"
        "668e33ef 0001 0001 0000000000000002 0000000b 0000000000001000 610062"
        "668e33ef 0001 0005 0000000000000003 00000014 00000001 00001000 00000003 00122456 00000000"
        "668e33ef 0001 0005 0000000000000004 0000000c 00000001 00000e00 00000003"
        "67446698 00000000 0000000000000005"
        f"668e33ef 0001 8001 0000000000000006 0000000e 00000005 0008 {text('worn out')}"
    )


def test_extended_headers() -> None:
    talk = extended()
    read, status, write, zero, flush = talk.hears(
        "21e41c71 0000 0000 0000000000000001 0000000000001000 0000000000000300"
        "21e41c71 0000 0007 0000000000000003 0000000000000000 0000000000123456"
        "21e41c71 0021 0001 0000000000000005 0000000000000200 0000000000000002 7a7a"
        "21e41c71 0012 0006 0000000000000006 0000000000000001 0000000000123455"
        "21e41c71 0000 0003 0000000000000007 0000000000000000 0000000000000000"
    )
    assert (write.payload, write.fua) == (b"zz", True)
    device = talk.session.device
    assert device is not None
    device.content(read, [Hole(0x200), b"d" * 0x100])
    device.extents(status, {"base:allocation": [(Range(0, 0x1000), 3), (Range(0x1000, 1 << 40), 0)]})
    device.done(write)
    device.failed(zero, Errno.ENOTSUP, "")
    device.done(flush)
    talk.says(
        "6e8a278c 0000 0002 0000000000000001 0000000000001000 000000000000000c 0000000000001000 00000200"
        f"6e8a278c 0001 0001 0000000000000001 0000000000001000 0000000000000108 0000000000001200 {'64' * 0x100}"
        "6e8a278c 0001 0006 0000000000000003 0000000000000000 0000000000000028"
        "00000001 00000002 0000000000001000 0000000000000003 0000000000122456 0000000000000000"
        "6e8a278c 0001 0000 0000000000000005 0000000000000200 0000000000000000"
        "6e8a278c 0001 8001 0000000000000006 0000000000000001 0000000000000006 0000005f 0000"
        "6e8a278c 0001 0000 0000000000000007 0000000000000000 0000000000000000"
    )


REFUSED = {
    "READ behind the end": ("0000 0000", "0000000000123455 00000002", 22),
    "WRITE behind the end": ("0000 0001", "0000000000123456 00000001 7a", 28),
    "WRITE_ZEROES behind the end": ("0000 0006", "0000000000123455 00000002", 28),
    "TRIM behind the end": ("0000 0004", "0000000000123455 00000002", 22),
    "CACHE behind the end": ("0000 0005", "0000000000123455 00000002", 22),
    "BLOCK_STATUS behind the end": ("0000 0007", "0000000000123455 00000002", 22),
    "READ with NO_HOLE": ("0002 0000", "0000000000000000 00000200", 22),
    "READ with an unknown flag": ("8000 0000", "0000000000000000 00000200", 22),
    "WRITE with DF": ("0004 0001", "0000000000000000 00000001 7a", 22),
    "PAYLOAD_LEN without extended headers": ("0020 0001", "0000000000000000 00000001 7a", 22),
    "FLUSH of a range": ("0000 0003", "0000000000000000 00000200", 22),
    "RESIZE": ("0000 0008", "0000000000000000 00000200", 22),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_refused_with_the_error_of_the_spec(what: str) -> None:
    head, rest, expected = REFUSED[what]
    talk = structured()
    assert talk.hears(f"25609513 {head} 0000000000000001 {rest}") == []
    said = b"".join(in_memory(talk.session.data_to_send()))
    assert said[:16].hex() == "668e33ef0001800100000000" + "00000001"
    assert int.from_bytes(said[20:24], "big") == expected
    assert len(said) == 26 + int.from_bytes(said[24:26], "big")  # and nothing of the payload is left for later
    (flush,) = talk.hears("25609513 0000 0003 0000000000000002 0000000000000000 00000000")
    assert flush.cookie == 2
