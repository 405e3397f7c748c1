"""server/stores/clouds.py: where volumes are, who is let in, and what objects may be called."""

from __future__ import annotations

import msgspec
import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.ranges import Range
from nbdshard.server.credentials import Credentials
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.clouds import open_bucket, parse_place
from support.s3 import PASSWORD, S3, content, keys
from support.s3_proxy import proxied


def test_who_is_let_in(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a login in the CONN, else by the environment; and by one of them only."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    opening = msgspec.structs.replace(s3.opening("x"), credentials=Credentials())
    with pytest.raises(UserError, match="no credentials are given; AWS_ACCESS_KEY_ID and"):
        open_bucket("s3", opening)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    with pytest.raises(UserError, match="there is one of a key's id and its secret"):
        open_bucket("s3", opening)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    bucket = open_bucket("s3", opening)
    assert bucket.get("nothing", Range(0, 1)) is None
    bucket.close()


def test_what_the_environment_says_of_another_store_is_not_for_this_one(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    with proxied(s3) as store:
        bucket = store.s3.bucket("x")
        assert bucket.get("nothing", Range(0, 1)) is None
        bucket.close()
        (asked,) = store.asked
    assert "authorization" in asked.headers and "x-amz-security-token" not in asked.headers


@pytest.mark.parametrize("name", ["a b", "ü", "a%2Fb", "..", "a?b#c", "a\\b", "a+b&c=d", "{<*~:", "é" * 100])
def test_any_name_of_an_export_can_be_part_of_a_key(bucket: Bucket, name: str) -> None:
    key = f"{name}.0.chunk"
    bucket.put(key, b"x")
    assert (content(bucket, key), keys(bucket)) == (b"x", [key])
    bucket.delete(key)
    assert keys(bucket) == []


def test_a_name_that_no_object_can_have_is_told_on_one_line(bucket: Bucket) -> None:
    with pytest.raises(OSError, match=r"writing a\\nb\.0\.chunk: an object cannot have this name"):
        bucket.put("a\nb.0.chunk", b"x")


@pytest.mark.parametrize("seconds", ["0s", "31s", "1h"])
def test_a_time_out_that_leaves_no_time_for_a_lock_is_refused(s3: S3, seconds: str) -> None:
    with pytest.raises(UserError, match="1s to 30s is expected"):
        open_bucket("s3", s3.opening("x", timeout=seconds))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("http://host:9000/bucket/a/b", ("http://host:9000", "bucket", "a/b")),
        ("https://host/bucket", ("https://host", "bucket", "")),
        ("bucket/a//b/", ("", "bucket", "a/b")),
        ("bucket", ("", "bucket", "")),
    ],
)
def test_where_a_volume_is(place: str, expected: tuple[str, str, str]) -> None:
    found = parse_place(place)
    assert (found.endpoint, found.bucket, found.prefix) == expected


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("", "no bucket is named"),
        ("http://host:9000", "no bucket is named"),
        ("http:///bucket", "http://HOST:PORT/BUCKET/PREFIX is expected"),
        ("ftp://host/bucket", "http://HOST:PORT/BUCKET/PREFIX is expected"),
        ("bucket/a/../b", "a prefix with . or .. in it"),
    ],
)
def test_where_no_volume_can_be(place: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        parse_place(place)
