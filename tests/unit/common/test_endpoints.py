"""common/endpoints.py"""

from __future__ import annotations

import pytest

from nbdshard.common.endpoints import (
    CommandEndpoint,
    FileEndpoint,
    NbdEndpoint,
    NullEndpoint,
    StreamEndpoint,
    describe,
    is_loopback_host,
    is_remote_reachable,
    parse_endpoint,
)
from nbdshard.common.errors import UserError
from nbdshard.common.messages import EndpointAddress


@pytest.mark.parametrize("path", ["disk.img", "/dev/sdb", "./nbd://x", "a:b", "C:/x", "-x", "null:x", "[", "./-"])
def test_what_has_no_scheme_is_a_local_path(path: str) -> None:
    assert parse_endpoint(path, "source") == FileEndpoint(path)


def test_a_dash_is_a_stream_and_null_a_destination() -> None:
    assert parse_endpoint("-", "source") == StreamEndpoint()
    assert parse_endpoint("null:", "destination") == NullEndpoint()


def test_a_list_of_words_is_a_command() -> None:
    assert parse_endpoint(["nbdkit", "-"], "source") == CommandEndpoint(("nbdkit", "-"))


def test_a_uri_is_parsed() -> None:
    endpoint = parse_endpoint("nbd://server:10810/disk", "source")
    assert isinstance(endpoint, NbdEndpoint)
    assert (endpoint.uri.host, endpoint.uri.port, endpoint.uri.export_name) == ("server", 10810, "disk")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "http://host/disk.img",
            "http://host/disk.img: unknown scheme 'http'; known are nbd://, nbd+unix://; "
            "for a local file of that name write ./http://host/disk.img",
        ),
        ("null:", "null: can only be a destination; there is nothing to read from it"),
        ("", "the source is an empty word; name a URI, a file, '-' or '[ CMD ARGS ... ]'"),
        ("a\0b", "'a\\x00b': the source has a NUL byte in it"),
    ],
)
def test_what_cannot_be_an_endpoint_is_said_in_one_line(word: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_endpoint(word, "source")
    assert str(caught.value) == line


@pytest.mark.parametrize("word", ["nbds://host/", "nbds+unix:///x?socket=/s", "nbd://host:99999/", "nbd:host"])
def test_what_starts_like_an_nbd_uri_is_never_taken_for_a_file(word: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_endpoint(word, "source")
    assert word in str(caught.value)


def test_endpoints_are_described_as_the_user_wrote_them() -> None:
    assert describe(parse_endpoint("nbd://h/x", "source"), "source") == "nbd://h/x"
    assert describe(FileEndpoint("a b"), "source") == "a b"
    assert describe(StreamEndpoint(), "source") == "standard input"
    assert describe(StreamEndpoint(), "destination") == "standard output"
    assert describe(CommandEndpoint(("nbdkit", "null")), "source") == "[ nbdkit null ]"
    assert describe(NullEndpoint(), "destination") == "null:"


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            "localhost",
            "LOCALHOST.",
            "db.localhost",
            "127.0.0.1",
            "127.8.9.10",
            "127.1",
            "0x7f000001",
            "0",
        ),
        *("0.0.0.0", "::1", "[::1]", "::", "::ffff:127.0.0.1", "::1%lo", "localhost.localdomain"),
    ],
)
def test_every_spelling_of_this_machine_is_loopback(host: str) -> None:
    assert is_loopback_host(host)


@pytest.mark.parametrize("host", ["server", "10.0.0.1", "fe80::1%eth0", "localhost.example.org", "::ffff:10.0.0.1"])
def test_other_hosts_are_not_loopback(host: str) -> None:
    assert not is_loopback_host(host)


@pytest.mark.parametrize(
    ("address", "reachable"),
    [
        (EndpointAddress("nbd", "nbd://10.0.0.1/x"), True),
        (EndpointAddress("nbd", "nbd://server"), True),
        (EndpointAddress("nbd", "nbd://localhost/x"), False),
        (EndpointAddress("nbd", "nbd://[::1]/x"), False),
        (EndpointAddress("nbd", "nbd:///x"), False),
        (EndpointAddress("nbd", "nbd+unix:///x?socket=/run/s"), False),
        (EndpointAddress("file", "/dev/sda", "1:2"), False),
        (EndpointAddress("stream", "0"), False),
        (EndpointAddress("null", ""), True),
    ],
)
def test_only_tcp_servers_elsewhere_are_the_same_disk_for_a_remote_worker(
    address: EndpointAddress, reachable: bool
) -> None:
    assert is_remote_reachable(address) is reachable
