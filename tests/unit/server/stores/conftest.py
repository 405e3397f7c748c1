"""What all tests of object stores have: a place of their own, seen through a proxy and directly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nbdshard.server.stores.bucket import Bucket
from support.s3 import S3, new_prefix
from support.s3_proxy import Proxied, proxied


@pytest.fixture
def store(s3: S3) -> Iterator[Proxied]:
    """The store with rules, which counts what it is asked."""
    with proxied(s3) as found:
        yield found


@pytest.fixture
def prefix() -> str:
    """What the names of this test's objects begin with."""
    return new_prefix()


@pytest.fixture
def bucket(s3: S3, prefix: str) -> Iterator[Bucket]:
    """The same objects, looked at directly."""
    found = s3.bucket(prefix)
    yield found
    found.close()
