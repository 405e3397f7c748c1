"""What is read about the machine, from texts as the kernel and the programs write them."""

from __future__ import annotations

import os

from benchmarks.machine import cpu_model, cpu_ticks, meminfo, system_name, version_in

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC 7B13\nprocessor\t: 1\nmodel name\t: AMD EPYC 7B13\n"
MEMINFO = "MemTotal:       24683116 kB\nMemAvailable:   23000000 kB\n"


def test_the_processor_is_named_as_the_kernel_names_it() -> None:
    assert cpu_model(CPUINFO) == "AMD EPYC 7B13"


def test_a_processor_without_a_name_is_its_architecture() -> None:
    assert cpu_model("processor : 0\n") == os.uname().machine


def test_memory_is_counted_in_bytes() -> None:
    assert meminfo(MEMINFO, "MemAvailable") == 23000000 * 1024
    assert meminfo(MEMINFO, "MemMissing") == 0


def test_the_distribution_says_its_own_name() -> None:
    assert system_name('ID=debian\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n') == "Debian GNU/Linux 12 (bookworm)"
    assert system_name("") == "unknown"


def test_a_version_is_the_first_number_with_a_dot() -> None:
    assert version_in("nbdcopy 1.14.2\nlibnbd 1.14.3\n") == "1.14.2"
    assert version_in("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\n") == "7.2.22"
    assert version_in("") == "unknown"


def test_stolen_ticks_are_the_eighth_number() -> None:
    assert cpu_ticks("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 0 0 0 0 0 0 0 0 0 0\n") == (8, 36)
