"""`nbdshard serve` and clients that nobody here wrote: what each can ask is asked, and what it prints is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import images
from support.command import nbdshard
from support.images import MIB
from support.served import NAME, NBDSH, SERVED_SIZE, Served, serving, tool

FIO_HAS_NBD = "nbd" in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return images.sparse_image(tmp_path / "source", SERVED_SIZE)


# -- nbdinfo, nbdcopy


def test_nbdinfo_tells_what_there_is(served: Served) -> None:
    (export,) = json.loads(tool("nbdinfo", "--json", served.uri()))["exports"]
    assert (export["export-name"], export["export-size"], export["contexts"]) == (
        NAME,
        SERVED_SIZE,
        ["base:allocation"],
    )
    assert export["block_size_minimum"] == 1
    assert export["block_size_maximum"] == 32 * MIB
    assert tool("nbdinfo", "--size", served.uri()).strip() == str(SERVED_SIZE)
    for can in ("flush", "fua", "trim", "zero", "fast-zero", "df", "cache", "multi-conn", "structured-reply"):
        tool("nbdinfo", "--can", can, served.uri())


def test_nbdinfo_lists_every_export_with_all_it_can() -> None:
    words = ["-e", "second", "raw", "memory:2M?read-only=yes", "-e", "größe", "raw", "memory:3M"]
    with serving("memory:1M", *words) as served:
        listed = json.loads(tool("nbdinfo", "--json", "--list", served.uri("")))["exports"]
        assert [(each["export-name"], each["export-size"]) for each in listed] == [
            (NAME, MIB),
            ("second", 2 * MIB),
            ("größe", 3 * MIB),
        ]
        assert [each["is_read_only"] for each in listed] == [False, True, False]


def test_nbdinfo_maps_what_was_written_and_what_was_not(served: Served) -> None:
    tool(*NBDSH, "-u", served.uri(), "-c", "h.pwrite(b'x' * 65536, 1 << 20); h.flush()")
    found = json.loads(tool("nbdinfo", "--json", "--map", served.uri()))
    assert [(each["offset"], each["length"], each["type"]) for each in found] == [
        (0, MIB, 3),
        (MIB, 65_536, 0),
        (MIB + 65_536, SERVED_SIZE - MIB - 65_536, 3),
    ]
    assert "99.6%" in tool("nbdinfo", "--map", "--totals", served.uri())


@pytest.mark.parametrize("options", [("--connections=8", "--requests=128"), ("--synchronous",), ("--allocated",)])
def test_nbdcopy_copies_both_ways(served: Served, source: Path, options: tuple[str, ...], tmp_path: Path) -> None:
    tool("nbdcopy", "--flush", *options, source, served.uri())
    tool("nbdcopy", *options, served.uri(), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_nbdcopy_copies_from_one_export_to_another(source: Path) -> None:
    with serving(f"file:{source}", "-e", "copy", "raw", f"memory:{SERVED_SIZE}") as served:
        tool("nbdcopy", served.uri(), served.uri("copy"))
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", source, served.uri("copy"))


# -- libnbd: every command with every flag, and what it would not send by itself

EVERY_COMMAND = f"""
import nbd, errno
assert (h.get_size(), h.get_block_size(nbd.SIZE_MAXIMUM)) == ({SERVED_SIZE}, 32 << 20)
h.pwrite(b'a' * 100_000, 0, nbd.CMD_FLAG_FUA)
h.pwrite(b'b' * 4096, 200_000)
h.flush()
assert h.pread(100_000, 0) == b'a' * 100_000
pieces = []
h.pread_structured(400_000, 0, lambda data, *_: pieces.append(len(data)), nbd.CMD_FLAG_DF)
assert pieces == [400_000], pieces
h.zero(4096, 0)
h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
try:
    h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as error:
    assert error.errno == 'ENOTSUP', error.errno
    h.zero(4096, 8192)
assert h.pread(16_384, 0) == bytes(12_288) + b'a' * 4096
h.trim(65_536, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)

chunks = []
whole = h.pread_structured(400_000, 0, lambda data, at, kind, error: chunks.append((at, len(data), kind)))
assert whole[200_000:204_096] == b'b' * 4096
assert sum(length for at, length, kind in chunks) == 400_000, chunks

found = []
def told(context, offset, entries, error):
    assert (context, offset) == ('base:allocation', 0)
    found.extend(zip(entries[::2], entries[1::2]))
h.block_status({SERVED_SIZE}, 0, told)
assert sum(length for length, _ in found) == {SERVED_SIZE}, found
assert all(flags in (0, 2, 3) for _, flags in found)
assert all(one[1] != other[1] for one, other in zip(found, found[1:])), found
found.clear()
h.block_status({SERVED_SIZE}, 0, told, nbd.CMD_FLAG_REQ_ONE)
assert len(found) == 1
"""


def test_libnbd_has_every_command_and_flag(served: Served) -> None:
    tool(*NBDSH, "--base-allocation", "-u", served.uri(), "-c", EVERY_COMMAND)


FOR_BAD_ONES = f"""
import nbd
h.set_strict_mode(0)
def fails(expected, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno == expected, (call, arguments, error.errno)
        assert 'command failed' in error.string, error.string  # by the server
    else:
        raise AssertionError((call, arguments))
SERVED_SIZE = {SERVED_SIZE}
"""
BAD_ONES = """
fails('EINVAL', h.pread, 0, 0)
fails('EINVAL', h.pread, 1, SERVED_SIZE)
fails('EINVAL', h.pread, 2, SERVED_SIZE - 1)
fails('EINVAL', h.pread, 512, (1 << 63) - 1)
fails('EINVAL', h.pread, (32 << 20) + 1, 0)
fails('ENOSPC', h.pwrite, b'xy', SERVED_SIZE - 1)
fails('ENOSPC', h.zero, 2, SERVED_SIZE - 1)
fails('EINVAL', h.trim, 2, SERVED_SIZE - 1)
fails('EINVAL', h.cache, 2, SERVED_SIZE - 1)
fails('EINVAL', h.block_status, 2, SERVED_SIZE - 1, lambda *_: 0)
fails('EINVAL', h.pwrite, b'', 0)
fails('EINVAL', h.zero, 0, 0)
for flag in (nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO, 1 << 5, 1 << 15):
    fails('EINVAL', h.pread, 512, 0, flag)
    assert h.pread(512, 0) == bytes(512)
for flag in (nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_NO_HOLE, 1 << 15):
    fails('EINVAL', h.pwrite, b'x' * 512, 0, flag)
fails('EINVAL', h.zero, 512, 0, nbd.CMD_FLAG_DF)
fails('EINVAL', h.block_status, 512, 0, lambda *_: 0, nbd.CMD_FLAG_NO_HOLE)
h.pread(512, 0, nbd.CMD_FLAG_FUA)  # has to be taken with every command
h.cache(512, 0, nbd.CMD_FLAG_FUA)
h.flush(nbd.CMD_FLAG_FUA)
assert h.pread(512, 0) == bytes(512)
"""


def test_what_libnbd_would_not_send_is_refused_and_the_connection_goes_on(served: Served) -> None:
    tool(*NBDSH, "--base-allocation", "-u", served.uri(), "-c", FOR_BAD_ONES, "-c", BAD_ONES)


def test_block_status_without_a_context_is_refused(served: Served) -> None:
    ask = "fails('EINVAL', h.block_status, 512, 0, lambda *_: 0); h.pread(512, 0)"
    tool(*NBDSH, "-u", served.uri(), "-c", FOR_BAD_ONES, "-c", ask)


def test_what_is_read_only_cannot_be_written_even_by_those_who_do_not_look() -> None:
    script = """
fails('EPERM', h.pwrite, b'x', 0)
fails('EPERM', h.zero, 1, 0)
fails('EPERM', h.trim, 1, 0)
h.flush()
assert h.pread(512, 0) == bytes(512)
"""
    with serving(f"memory:{SERVED_SIZE}?read-only=yes") as served:
        tool(*NBDSH, "-u", served.uri(), "-c", FOR_BAD_ONES, "-c", script)


NEGOTIATIONS = {
    "no structured replies": "h.set_request_structured_replies(False)",
    "no fixed newstyle": "h.set_handshake_flags(0)",
    "124 zeroes": "h.set_handshake_flags(nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)",
    "block sizes are not asked for": "h.set_request_block_size(False)",
    "all information": "h.set_full_info(True)",
    "TLS if there is some": "h.set_tls(nbd.TLS_ALLOW)",
}


@pytest.mark.parametrize("how", NEGOTIATIONS)
def test_libnbd_negotiates_in_every_way(served: Served, how: str) -> None:
    script = f"""
import nbd
{NEGOTIATIONS[how]}
h.connect_uri({served.uri()!r})
assert h.get_size() == {SERVED_SIZE}
h.pwrite(b'x' * 1000, 5)
assert h.pread(1001, 4) == bytes(1) + b'x' * 1000
h.shutdown()
"""
    tool(*NBDSH, "-c", script)


def test_libnbd_goes_through_its_options_one_by_one(served: Served) -> None:
    script = f"""
import nbd
h.set_opt_mode(True)
h.connect_uri({served.uri("")!r})
names = []
assert h.opt_list(lambda name, description: names.append(name)) == 1 and names == [{NAME!r}]
h.set_export_name('nothing')
for refused in (h.opt_info, h.opt_go):
    try:
        refused()
    except nbd.Error as error:
        assert error.errno == 'ENOENT'
    else:
        raise AssertionError
h.set_export_name({NAME!r})
h.add_meta_context('base:')
contexts = []
assert h.opt_list_meta_context(contexts.append) == 1 and contexts == ['base:allocation']
h.clear_meta_contexts()
contexts.clear()
assert h.opt_list_meta_context(contexts.append) == 1 and contexts == ['base:allocation']
h.opt_info()
assert h.get_size() == {SERVED_SIZE}
h.add_meta_context('base:allocation')
h.opt_go()
assert h.can_meta_context('base:allocation')
h.shutdown()
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri({served.uri()!r})
h.opt_abort()
"""
    tool(*NBDSH, "-c", script)


def test_libnbd_has_many_requests_under_way_on_many_connections(served: Served) -> None:
    script = f"""
import nbd
errors = []
def done(error):
    errors.append(error.value)
    return 1  # nobody asks for it any more
handles = [nbd.NBD() for _ in range(8)]
for each in handles:
    each.connect_uri({served.uri()!r})
for number, each in enumerate(handles):
    for block in range(32):
        at = (number * 32 + block) * 4096
        data = nbd.Buffer.from_bytearray(bytearray([number ^ block]) * 4096)
        each.aio_pwrite(data, at, completion=done)
for each in handles:
    while each.aio_in_flight():
        each.poll(-1)
assert errors == [0] * 256, errors
handles[0].flush()
for number in range(8):
    for block in range(32):
        found = handles[7 - number].pread(4096, (number * 32 + block) * 4096)
        assert found == bytes([number ^ block]) * 4096
"""
    tool(*NBDSH, "-c", script)


# -- qemu


def test_qemu_img_converts_compares_maps_and_tells(served: Served, source: Path, tmp_path: Path) -> None:
    raw = ("-f", "raw")
    tool("qemu-img", "convert", "-n", "-W", "-m", "16", *raw, "-O", "raw", source, served.uri())
    tool("qemu-img", "compare", *raw, "-F", "raw", source, served.uri())
    tool("qemu-img", "convert", *raw, "-O", "qcow2", served.uri(), tmp_path / "back.qcow2")
    tool("qemu-img", "compare", *raw, "-F", "qcow2", source, tmp_path / "back.qcow2")
    assert json.loads(tool("qemu-img", "info", "--output=json", *raw, served.uri()))["virtual-size"] == SERVED_SIZE
    extents = json.loads(tool("qemu-img", "map", "--output=json", *raw, served.uri()))
    assert sum(each["length"] for each in extents) == SERVED_SIZE
    image = source.read_bytes()
    assert any(each["zero"] for each in extents)
    for each in extents:
        if each["zero"]:
            assert not any(image[each["start"] : each["start"] + each["length"]])


@pytest.mark.parametrize("words", [(), ("-w",), ("-w", "--flush-interval=64")])
def test_qemu_img_has_many_requests_under_way(served: Served, words: tuple[str, ...]) -> None:
    said = tool("qemu-img", "bench", "-f", "raw", "-c", "1000", "-d", "32", "-s", "4k", *words, served.uri())
    assert "Run completed" in said


def test_qemu_io_writes_zeroes_discards_and_flushes(served: Served) -> None:
    commands = [
        "write -P 7 -f 64k 128k",
        "write -z -u 96k 32k",
        "write -z 128k 4k",
        "discard 160k 4k",
        "flush",
        "read -P 7 64k 32k",
        "read -P 0 96k 36k",
        "writev -P 9 512 1536 512",
        "read -P 9 512 2048",
        "aio_write -P 5 1M 64k",
        "aio_flush",
        "read -P 5 1M 64k",
    ]
    said = tool("qemu-io", "-f", "raw", *[word for each in commands for word in ("-c", each)], served.uri())
    assert "failed" not in said


# -- fio, nbd-client, nbdkit, our own


@pytest.mark.skipif(not FIO_HAS_NBD, reason="fio was built without its nbd engine")
@pytest.mark.parametrize("pattern", ["randwrite", "write"])
def test_fio_reads_back_what_it_wrote(served: Served, pattern: str, tmp_path: Path) -> None:
    words = [f"--rw={pattern}", "--bs=4k", "--size=2M", "--iodepth=16", "--verify=crc32c", "--fsync=64"]
    words += [f"--aux-path={tmp_path}"]
    said = tool("fio", "--name=x", "--ioengine=nbd", f"--uri={served.uri()}", "--output-format=json", *words)
    (job,) = json.loads(said[said.index("{") :])["jobs"]
    assert (job["error"], job["read"]["total_ios"], job["write"]["total_ios"]) == (0, 512, 512)


def nbd_client(*words: str) -> str:
    """What Debian keeps where an ordinary user does not look."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    program = shutil.which("nbd-client", path=path)
    assert program is not None, "nbd-client is not installed"
    return tool(program, *words)


def test_nbd_client_lists_the_exports() -> None:
    with serving("memory:1M", "-e", "other", "raw", "memory:1M", "--tcp", "127.0.0.1:0") as served:
        assert nbd_client("-l", *map(str, served.address)).split()[-2:] == [NAME, "other"]


@pytest.mark.skipif(not Path("/dev/nbd0").exists(), reason="this kernel has no nbd devices")
def test_the_kernel_is_a_client(served: Served) -> None:
    device = "/dev/nbd0"
    nbd_client("-unix", str(served.socket), device, "-N", NAME, "-b", "512")
    try:
        tool("dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=4", "oflag=direct", "conv=fsync")
        tool("blkdiscard", "--offset", str(2 * MIB), "--length", str(MIB), device)
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", device, served.uri())
    finally:
        nbd_client("-d", device)


def test_nbdkit_passes_it_on(served: Served, source: Path) -> None:
    script = f'nbdcopy --flush {source} "$uri" && qemu-img compare -f raw -F raw {source} "$uri"'
    tool("nbdkit", "--exit-with-parent", "-U", "-", "nbd", f"uri={served.uri()}", "--run", script)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", source, served.uri())


def test_nbdshard_itself_asks_maps_copies_and_verifies(served: Served, source: Path, tmp_path: Path) -> None:
    assert "instance" in nbdshard("info", served.uri()).succeeded().out
    assert nbdshard("map", served.uri()).succeeded().out.split()[:2] == ["0", str(SERVED_SIZE)]
    nbdshard("copy", source, served.uri()).succeeded()
    nbdshard("verify", source, served.uri()).succeeded()
    nbdshard("copy", served.uri(), tmp_path / "back").succeeded()
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
