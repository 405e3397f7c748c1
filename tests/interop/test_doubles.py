"""The doubles are NBD servers to other clients too; otherwise a test against them proves nothing."""

from __future__ import annotations

import json
import subprocess

import pytest

from support import images
from support.doubles import CMD_BLOCK_STATUS, CMD_FLUSH, Double, double

SIZE = 3 * images.MIB + 512


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("go", [True, False], ids=["go", "export-name"])
def test_nbdcopy_copies_from_and_to_a_double(structured: bool, go: bool) -> None:
    content = images.random_bytes(SIZE)
    source = Double(bytearray(content), structured=structured, go=go)
    target = Double(bytearray(SIZE), structured=structured, go=go)
    with double(source) as one, double(target, tcp=True) as two:
        subprocess.run(["nbdcopy", "--flush", one, two], timeout=30, check=True)
    assert target.content == content
    assert target.count(CMD_FLUSH) > 0
    assert (source.count(CMD_BLOCK_STATUS) > 0) == structured


def test_nbdinfo_reads_what_a_double_names() -> None:
    with double(Double(bytearray(SIZE), blocks=(512, 4096, 1 << 20))) as uri:
        ended = subprocess.run(
            ["nbdinfo", "--json", "--no-content", uri], capture_output=True, text=True, timeout=30, check=True
        )
    export = json.loads(ended.stdout)["exports"][0]
    assert (export["export-size"], export["block_size_minimum"], export["block_size_maximum"]) == (SIZE, 512, 1 << 20)
