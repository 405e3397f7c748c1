"""A worker's memory is bounded by its queues, whatever the size of the image."""

from __future__ import annotations

from support import images, processes
from support.command import started
from support.servers import nbdkit

RESIDENT_MAX = 64 * images.MIB
QUEUE = 16 * images.MIB  # in flight on each connection (the default of --queue-size)
CONNECTIONS = 4


def test_workers_copying_requests_of_1_mib_stay_under_64_mib_plus_their_queues(ring: str) -> None:
    """8 GiB with a GiB of data, and 2 GiB of nothing but data: neither makes a worker grow."""
    for plugin in (("sparse-random", "8G", "seed=1", "percent=12"), ("pattern", "2G")):
        with nbdkit(*plugin) as source, nbdkit("null", "8G") as destination:
            options = ("--workers", "2", "-C", str(CONNECTIONS), "--request-size", "1M", "--ring", ring)
            with started("copy", *options, source.uri, destination.uri) as run:
                peaks: dict[int, int] = {}
                while run.process.poll() is None:
                    for pid in run.workers():
                        peaks[pid] = max(peaks.get(pid, 0), processes.resident_peak_bytes(pid))
                run.wait().succeeded()
            assert len(peaks) == 2
            queues = CONNECTIONS * QUEUE // 2
            assert max(peaks.values()) < RESIDENT_MAX + queues, peaks


def test_a_small_queue_keeps_a_worker_small(ring: str) -> None:
    with nbdkit("pattern", "1G") as source, nbdkit("null", "1G") as destination:
        options = ("--workers", "1", "-C", "4", "--queue-size", "1M", "--request-size", "256k", "--ring", ring)
        with started("copy", *options, source.uri, destination.uri) as run:
            peak = 0
            while run.process.poll() is None:
                peak = max([peak, *(processes.resident_peak_bytes(pid) for pid in run.workers())])
            run.wait().succeeded()
    assert 0 < peak < RESIDENT_MAX + 4 * images.MIB, peak


def test_a_long_run_of_zeroes_written_in_small_requests_keeps_a_worker_small(ring: str) -> None:
    """A destination that cannot zero gets 131,072 writes for one run: they must not all be laid out beforehand."""
    with nbdkit("memory", "512M") as source, nbdkit("null", "512M", filters=["nozero"]) as destination:
        options = ("--workers", "1", "-C", "1", "--queue-size", "1M", "--request-size", "4k", "--range-size", "512M")
        with started("copy", *options, "--ring", ring, source.uri, destination.uri) as run:
            peak = 0
            while run.process.poll() is None:
                peak = max([peak, *(processes.resident_peak_bytes(pid) for pid in run.workers())])
            run.wait().succeeded()
    assert 0 < peak < RESIDENT_MAX + images.MIB, peak
