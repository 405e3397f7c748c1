"""NBD URIs: what they mean, what is refused and with which advice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdshard.common.errors import UserError
from nbdshard.common.nbd.uri import NbdUri, parse_uri

# The table of doc/uri.md, and what RFC 3986 and RFC 6874 add.
VALID = [
    ("nbd://example.com/disk", NbdUri("tcp", host="example.com", export_name="disk"), "nbd://example.com/disk"),
    ("nbd://example.com/", NbdUri("tcp", host="example.com"), "nbd://example.com/"),
    ("nbd://example.com", NbdUri("tcp", host="example.com"), "nbd://example.com/"),
    ("nbd://example.com//disk", NbdUri("tcp", host="example.com", export_name="/disk"), "nbd://example.com//disk"),
    (
        "nbd://example.com/hello%20world",
        NbdUri("tcp", host="example.com", export_name="hello world"),
        "nbd://example.com/hello%20world",
    ),
    ("nbd+unix:///disk?socket=sock", NbdUri("unix", socket="sock", export_name="disk"), "nbd+unix:///disk?socket=sock"),
    ("nbd+unix://?socket=/a", NbdUri("unix", socket="/a"), "nbd+unix:///?socket=/a"),
    (
        "NBD+UNIX:////x?socket=/run/a%20b%26c",
        NbdUri("unix", socket="/run/a b&c", export_name="/x"),
        "nbd+unix:////x?socket=/run/a%20b%26c",
    ),
    ("nbd://h:10810/x", NbdUri("tcp", host="h", port=10810, export_name="x"), "nbd://h:10810/x"),
    ("nbd://h:10809/x", NbdUri("tcp", host="h", export_name="x"), "nbd://h/x"),
    ("nbd://h:/x", NbdUri("tcp", host="h", export_name="x"), "nbd://h/x"),
    ("nbd://", NbdUri("tcp", host="localhost"), "nbd://localhost/"),
    ("nbd:///x", NbdUri("tcp", host="localhost", export_name="x"), "nbd://localhost/x"),
    ("nbd://:10810", NbdUri("tcp", host="localhost", port=10810), "nbd://localhost:10810/"),
    ("nbd://[::1]:99/x", NbdUri("tcp", host="::1", port=99, export_name="x"), "nbd://[::1]:99/x"),
    ("nbd://[0:0:0:0:0:0:0:1]", NbdUri("tcp", host="::1"), "nbd://[::1]/"),
    ("nbd://[fe80::1%25eth0]/", NbdUri("tcp", host="fe80::1%eth0"), "nbd://[fe80::1%25eth0]/"),
    ("nbd://ex%61mple.com", NbdUri("tcp", host="example.com"), "nbd://example.com/"),
    ("nbd://h/a+b:c@d", NbdUri("tcp", host="h", export_name="a+b:c@d"), "nbd://h/a%2Bb%3Ac%40d"),
    ("nbd://h/gr%C3%B6%C3%9Fe", NbdUri("tcp", host="h", export_name="größe"), "nbd://h/gr%C3%B6%C3%9Fe"),
    ("nbd://h/größe", NbdUri("tcp", host="h", export_name="größe"), "nbd://h/gr%C3%B6%C3%9Fe"),
    ("nbd+unix:///?socket=%FF", NbdUri("unix", socket="\udcff"), "nbd+unix:///?socket=%FF"),
]


@pytest.mark.parametrize(("text", "uri", "canonical"), VALID)
def test_a_uri_says_where_the_server_is_and_which_export_is_meant(text: str, uri: NbdUri, canonical: str) -> None:
    assert parse_uri(text) == uri
    assert str(uri) == canonical


INVALID = [
    ("http://h", "http://h: unknown scheme 'http'; write nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH"),
    ("disk.img", "disk.img: not a URI; write nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH"),
    ("nbds://h", "nbds://h: nbds asks for TLS, which nbdshard does not support yet"),
    (
        "NBDS+unix:///?socket=a",
        "NBDS+unix:///?socket=a: NBDS+unix asks for TLS, which nbdshard does not support yet",
    ),
    ("nbd+vsock://3/", "nbd+vsock://3/: nbd+vsock is not supported; nbd:// and nbd+unix:// are"),
    ("nbds+vsock://3/", "nbds+vsock://3/: nbds+vsock asks for TLS, which nbdshard does not support yet"),
    ("nbd:h", "nbd:h: no // after the scheme; write nbd://HOST/EXPORT"),
    ("nbd://h/a b", "'nbd://h/a b': the character ' ' in a URI; write it as %20"),
    ("nbd://h/\x1b[2J", "'nbd://h/\\x1b[2J': the character '\\x1b' in a URI; write it as %1B"),
    ("nbd://h/\udcff", "'nbd://h/\\udcff': the character '\\udcff' in a URI; write it as %FF"),
    ("nbd://h/\u202e", "'nbd://h/\\u202e': the character '\\u202e' in a URI; write it as %E2%80%AE"),
    (
        "nbd://h/100%",
        "nbd://h/100%: '%' is no percent-encoding; write a percent sign itself as %25, also before the zone of an "
        "IPv6 address",
    ),
    ("nbd://h/#1", "nbd://h/#1: an NBD URI has no fragment; write # in a name as %23"),
    ("nbd://h/%00", "nbd://h/%00: the export name contains a NUL character"),
    ("nbd://h/%ff", "nbd://h/%ff: the export name is not UTF-8"),
    ("nbd://h:0", "nbd://h:0: not a port: '0'; ports are numbers from 1 to 65535"),
    ("nbd://h:65536", "nbd://h:65536: not a port: '65536'; ports are numbers from 1 to 65535"),
    ("nbd://h:x", "nbd://h:x: not a port: 'x'; ports are numbers from 1 to 65535"),
    ("nbd://h:-1", "nbd://h:-1: not a port: '-1'; ports are numbers from 1 to 65535"),
    ("nbd://h:²", "nbd://h:²: not a port: '²'; ports are numbers from 1 to 65535"),
    ("nbd://::1/", "nbd://::1/: not a host: '::1'; write an IPv6 address in brackets, as in nbd://[::1]/"),
    ("nbd://[::1/", "nbd://[::1/: not a host: '[::1'; write an IPv6 address in brackets, as in nbd://[::1]/"),
    ("nbd://[::1]x/", "nbd://[::1]x/: not a host: '[::1]x'; write an IPv6 address in brackets, as in nbd://[::1]/"),
    ("nbd://a%2Fb/", "nbd://a%2Fb/: not a host: 'a%2Fb'; write an IPv6 address in brackets, as in nbd://[::1]/"),
    ("nbd://a%00b/", "nbd://a%00b/: the host contains a NUL character"),
    ("nbd://[1.2.3.4]", "nbd://[1.2.3.4]: not an IPv6 address: At least 3 parts expected in '1.2.3.4'"),
    ("nbd://[fe80::1%25]", "nbd://[fe80::1%25]: not a zone of an IPv6 address: ''"),
    ("nbd://[fe80::1%25a%2Fb]", "nbd://[fe80::1%25a%2Fb]: not a zone of an IPv6 address: 'a/b'"),
    (
        "nbd://user:secret@h/",
        "nbd://...@h/: a user name is of use with TLS only, which nbdshard does not support yet",
    ),
    ("nbd+unix:///x", "nbd+unix:///x: no socket parameter; write nbd+unix:///EXPORT?socket=PATH"),
    ("nbd+unix:///x?socket", "nbd+unix:///x?socket: no socket parameter; write nbd+unix:///EXPORT?socket=PATH"),
    (
        "nbd+unix://h/x?socket=a",
        "nbd+unix://h/x?socket=a: a host (h) makes no sense with a unix socket; "
        "write nbd+unix:///EXPORT?socket=PATH, with three slashes",
    ),
    (
        "nbd+unix:///?socket=%00a",
        "nbd+unix:///?socket=%00a: the socket contains a NUL character; abstract sockets are not supported",
    ),
    ("nbd+unix:///?socket=a&socket=b", "nbd+unix:///?socket=a&socket=b: the parameter socket twice"),
    ("nbd://h?x=1", "nbd://h?x=1: unknown parameter 'x'"),
    ("nbd://h?x-a=1&b", "nbd://h?x-a=1&b: unknown parameters 'b', 'x-a'"),
    ("nbd+unix:///?socket=a&", "nbd+unix:///?socket=a&: unknown parameter ''"),
    ("nbd://h?socket=a", "nbd://h?socket=a: unknown parameter 'socket'; only nbd+unix:// takes a socket"),
    ("nbd://h?tls-type=psk", "nbd://h?tls-type=psk: tls-type: nbdshard does not support TLS yet"),
]


@pytest.mark.parametrize(("text", "message"), INVALID)
def test_a_uri_that_is_wrong_is_refused_with_what_to_write_instead(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_uri(text)
    assert str(caught.value) == message


def test_lengths_are_bounded_where_the_protocol_and_the_system_bound_them() -> None:
    assert len(parse_uri(f"nbd://h/{'a' * 4096}").export_name) == 4096
    with pytest.raises(UserError, match=r"an export name of 4097 bytes; the protocol allows 4096$"):
        parse_uri(f"nbd://h/{'a' * 4097}")
    assert len(parse_uri(f"nbd+unix:///?socket={'a' * 107}").socket or "") == 107
    with pytest.raises(UserError, match=r"a socket path of 108 bytes; the system allows 107$"):
        parse_uri(f"nbd+unix:///?socket={'a' * 108}")


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
HOSTS = st.from_regex(r"[a-zA-Z0-9._~-]{1,20}", fullmatch=True) | st.ip_addresses().map(str)
PATHS = st.binary(min_size=1, max_size=30).filter(lambda path: b"\0" not in path)
URIS = st.builds(
    lambda host, port, name: NbdUri("tcp", host=host, port=port, export_name=name), HOSTS, st.integers(1, 65535), NAMES
) | st.builds(
    lambda path, name: NbdUri("unix", socket=path.decode("utf-8", "surrogateescape"), export_name=name), PATHS, NAMES
)


@given(URIS)
def test_the_canonical_uri_means_the_same(uri: NbdUri) -> None:
    assert parse_uri(str(uri)) == uri


@given(st.text(max_size=30).map("nbd".__add__) | st.text(max_size=40).map("nbd://".__add__) | st.text(max_size=40))
def test_any_text_is_a_uri_or_refused(text: str) -> None:
    try:
        uri = parse_uri(text)
    except UserError:
        return
    assert parse_uri(str(uri)) == uri
