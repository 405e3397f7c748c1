"""What a block device calls itself, from folders as the kernel has them in sysfs, and from a real loop device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdshard.coordinator.device_identity import device_identity
from support.devices import loop_device

NUMBER = os.makedev(8, 16)


def disk(sysfs: Path, attributes: dict[str, str | bytes], number: str = "8:16", folder: str = "devices/sdb") -> Path:
    """A device with these attributes, and its link under its number."""
    whole = sysfs / folder
    for name, content in attributes.items():
        path = whole / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    whole.mkdir(parents=True, exist_ok=True)
    (sysfs / number).symlink_to(whole)
    return whole


@pytest.mark.parametrize(
    ("attributes", "identity"),
    [
        ({"device/wwid": "naa.5000c500a1b2c3d4\n"}, "wwid naa.5000c500a1b2c3d4"),
        ({"device/wwid": "t10.ATA     SAMSUNG MZ7    S1XYZ \n"}, "wwid t10.ATA SAMSUNG MZ7 S1XYZ"),
        ({"wwid": "eui.0025385b71b0e0a1\n"}, "wwid eui.0025385b71b0e0a1"),
        ({"dm/uuid": "LVM-abc123\n", "dm/name": "vg-root\n"}, "dm uuid LVM-abc123"),
        ({"dm/uuid": "\n", "dm/name": "mine\n"}, "dm name mine"),
        ({"serial": "disk-7"}, "serial disk-7"),
        ({"serial": ""}, ""),
        ({"serial": "  \n"}, ""),
        ({"loop/backing_file": "/images/a.img\n", "loop/offset": "512\n"}, "loop /images/a.img from 512"),
        ({"wwid": b"eui.\xff\0\0"}, "wwid eui.\\xff"),
        ({"wwid": "x" * 5000}, "wwid " + "x" * 512),
        ({"size": "2048\n"}, ""),
    ],
)
def test_a_device_is_called_what_the_kernel_knows_best(
    tmp_path: Path, attributes: dict[str, str | bytes], identity: str
) -> None:
    disk(tmp_path, attributes)
    assert device_identity(NUMBER, str(tmp_path)) == identity


def test_a_partition_is_that_of_its_disk(tmp_path: Path) -> None:
    disk(tmp_path, {"device/wwid": "naa.1\n"}, "8:0", "devices/sda")
    disk(tmp_path, {"partition": "2\n", "start": "4096\n"}, "8:16", "devices/sda/sda2")
    assert device_identity(NUMBER, str(tmp_path)) == "wwid naa.1 partition 2 from 4096"


def test_a_partition_of_a_disk_without_a_name_has_none(tmp_path: Path) -> None:
    disk(tmp_path, {"size": "1\n"}, "8:0", "devices/sda")
    disk(tmp_path, {"partition": "2\n", "start": "4096\n"}, "8:16", "devices/sda/sda2")
    assert device_identity(NUMBER, str(tmp_path)) == ""


def test_a_device_that_is_gone_has_none(tmp_path: Path) -> None:
    assert device_identity(NUMBER, str(tmp_path)) == ""


def test_a_loop_device_is_its_file(tmp_path: Path) -> None:
    backing = tmp_path / "image"
    backing.write_bytes(bytes(1 << 20))
    with loop_device(backing) as device:
        assert device_identity(device.stat().st_rdev) == f"loop {backing} from 0"
