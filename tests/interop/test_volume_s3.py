"""`nbdshard volume` with an object store: the same as with a directory."""

from __future__ import annotations

import json
import signal

from support.command import nbdshard
from support.s3 import moto, new_prefix
from support.served import NAME, Served, serving, tool

MIB = 1 << 20


def volume(*words: str) -> str:
    return nbdshard("volume", *words).succeeded().out


def end(served: Served) -> None:
    """As users end it: who is killed has its volume until that is noticed."""
    served.run.process.send_signal(signal.SIGTERM)
    assert served.run.wait().code == 0


def test_a_volume_in_an_object_store_is_made_resized_listed_and_deleted() -> None:
    with moto() as s3:
        store = s3.conn(new_prefix())
        volume("create", NAME, store, "--size=10M", "--chunk=1M")
        nbdshard("volume", "create", NAME, store, "--size=10M").failed(1, saying=["there is such a volume already"])
        with serving(store, driver="sharded") as served:
            tool("qemu-io", "-f", "raw", "-c", "write -P 1 1M 2M", "-c", "write -P 2 9M 1M", served.uri())
            nbdshard("volume", "delete", NAME, store, "--yes").failed(1, saying=["disk.volume", "writes it"])
            end(served)
        volume("resize", NAME, store, "--size=1500K", "--shrink")
        volume("resize", NAME, store, "--size=20M")
        (listed,) = json.loads(volume("list", store, "--json"))
        assert listed == {"name": NAME, "size": 20 * MIB, "chunk_bytes": MIB, "stored_bytes": 476 * 1024}
        with serving(store, driver="sharded") as served:
            reads = ("read -P 1 1M 476k", "read -P 0 1500k 5M", "read -P 0 9M 2M")
            tool("qemu-io", "-f", "raw", *(word for each in reads for word in ("-c", each)), served.uri())
            end(served)
        volume("delete", NAME, store, "--yes")
        assert volume("list", store) == ""
