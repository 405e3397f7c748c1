"""OpenStack Swift with its S3 middleware, on this machine: an object store that nobody here wrote.

Four processes with one disk, which is a folder, in a virtual environment of their own that `make test` sets up: what
they depend on would be in the way of the project's. There is no memcached; what is looked for there is then looked for
elsewhere.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import boto3

from support import processes
from support.s3 import BUCKET, S3
from support.servers import free_port, private_folder, running

VENV = Path(__file__).parents[2] / ".cache" / "swift"
USER, PASSWORD = "test:tester", "s3cr3t-word"
KINDS = ("account", "container", "object")

COMMON = """\
[swift-hash]
swift_hash_path_suffix = a
swift_hash_path_prefix = b
[storage-policy:0]
name = one
default = yes
"""
STORAGE = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = root
swift_dir = {folder}
devices = {folder}
mount_check = false
disable_fallocate = true
log_level = ERROR
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
PROXY = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = root
swift_dir = {folder}
log_level = ERROR
[pipeline:main]
pipeline = catch_errors cache listing_formats s3api tempauth bulk slo proxy-server
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {password} .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""
RINGS = """\
import sys
from swift.common.ring import RingBuilder
folder, *places = sys.argv[1:]
for place in places:
    kind, port = place.split(":")
    builder = RingBuilder(1, 1, 0)
    builder.add_dev(dict(region=1, zone=1, ip="127.0.0.1", port=int(port), device="disk", weight=1))
    builder.rebalance()
    builder.get_ring().save(f"{folder}/{kind}.ring.gz")
"""


def is_installed() -> bool:
    """Whether `make test`, or `make swift`, has been here."""
    return (VENV / "installed").exists()


@contextlib.contextmanager
def swift() -> Iterator[S3]:
    """A store of one's own, until the block ends."""
    with private_folder() as folder, contextlib.ExitStack() as stack:
        ports = {kind: free_port() for kind in (*KINDS, "proxy")}
        (folder / "disk").mkdir()
        (folder / "swift.conf").write_text(COMMON)
        for kind in KINDS:
            (folder / f"{kind}.conf").write_text(STORAGE.format(kind=kind, port=ports[kind], folder=folder))
        (folder / "proxy.conf").write_text(PROXY.format(port=ports["proxy"], folder=folder, password=PASSWORD))
        python = str(VENV / "bin" / "python")
        places = [f"{kind}:{ports[kind]}" for kind in KINDS]
        subprocess.run([python, "-c", RINGS, str(folder), *places], check=True, timeout=60)
        for kind, port in ports.items():
            stack.enter_context(_server(folder, kind, port))
        s3 = S3(f"http://127.0.0.1:{ports['proxy']}", USER, PASSWORD)
        _make_bucket(s3)
        yield s3


def _server(folder: Path, kind: str, port: int) -> contextlib.AbstractContextManager[object]:
    command = ["env", f"SWIFT_DIR={folder}", str(VENV / "bin" / f"swift-{kind}-server"), str(folder / f"{kind}.conf")]
    return running(command, "", lambda pid: port in processes.listening_tcp_ports(pid), folder)


def _make_bucket(s3: S3) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        aws_access_key_id=s3.user,
        aws_secret_access_key=s3.password,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
