"""S3 for tests: moto, which keeps everything in memory, as a process; and buckets in it as the server sees them."""

from __future__ import annotations

import contextlib
import http.client
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

from nbdshard.common.ranges import Range
from nbdshard.server.backends.base import Backend
from nbdshard.server.credentials import Credentials
from nbdshard.server.device import Hole
from nbdshard.server.opening import Opening
from nbdshard.server.parameters import Parameters
from nbdshard.server.stores.bucket import Bucket
from nbdshard.server.stores.clouds import open_bucket
from support import processes
from support.servers import free_port, private_folder, running

BUCKET = "volumes"
USER, PASSWORD = "tester", "s3cr3t-word"
SIGNED = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
WHOLE = Range(0, 1 << 26)


@dataclass(frozen=True)
class S3:
    """A server at `endpoint` with the bucket BUCKET, and who may do everything there."""

    endpoint: str
    user: str = USER
    password: str = PASSWORD

    def place(self, prefix: str) -> str:
        """What stands behind `s3:` for things below `prefix`."""
        return f"{self.endpoint}/{BUCKET}/{prefix}"

    def conn(self, prefix: str, parameters: str = "") -> str:
        """A CONN with its login."""
        login = f"{quote(self.user, safe='')}:{self.password}"
        return f"s3:{self.place(prefix).replace('://', f'://{login}@')}{parameters}"

    def bucket(self, prefix: str) -> Bucket:
        """The objects below `prefix`."""
        return open_bucket("s3", self.opening(prefix))

    def opening(self, prefix: str, *, read_only: bool = False, **parameters: str) -> Opening:
        """What an opener is given for an export `disk` below `prefix`."""
        place = self.place(prefix)
        given = Parameters(parameters, f"s3:{place}")
        return Opening("disk", place, given, read_only, credentials=Credentials(self.user, self.password))


def new_prefix() -> str:
    """A place that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


def keys(bucket: Bucket) -> list[str]:
    """Of all objects, sorted."""
    return sorted(key for page in bucket.stored("", lambda _: True) for key, _ in page)


def content(bucket: Bucket, key: str) -> bytes:
    """Of an object that is there."""
    found = bucket.get(key, WHOLE)
    assert found is not None, key
    return bytes(found.data)


def write(image: Backend, start: int, data: bytes) -> None:
    """As a client would."""
    image.write(Range.of(start, len(data)), memoryview(data))


def read(image: Backend, start: int, length: int) -> bytes:
    """What a client would be told."""
    parts = image.read(Range.of(start, length))
    return b"".join(bytes(part.length) if isinstance(part, Hole) else bytes(part) for part in parts)


@contextlib.contextmanager
def moto() -> Iterator[S3]:
    """moto's server, until the block ends."""
    with private_folder() as folder:
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with running(
            command, f"http://127.0.0.1:{port}", lambda pid: port in processes.listening_tcp_ports(pid), folder
        ) as up:
            make_bucket(port)
            yield S3(up.uri)


def warmed(s3: S3) -> S3:
    """What obstore opens once for a process is no leak of whoever uses it first."""
    bucket = s3.bucket(new_prefix())
    bucket.put("x", b"x")
    bucket.close()
    return s3


def make_bucket(port: int) -> None:
    """In moto, which looks at no signature."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{BUCKET}", headers={"Authorization": SIGNED, "Content-Length": "0"})
    assert connection.getresponse().status == 200
    connection.close()
