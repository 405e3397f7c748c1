"""Mock workers against the real scheduler, without a channel between them."""

from __future__ import annotations

import pytest

from benchmarks.control_job import RANGE_BYTES, Stopwatch, mock_job
from benchmarks.mock_worker import MockWorker, mock_disk
from benchmarks.scheduler_cost import MACHINE, run_alone
from nbdshard.common.messages import Flush, Flushed, Goodbye, Stop, Wanted, Written
from support.schedules import lease
from support.statuses import done


def worker() -> MockWorker:
    return MockWorker("a", MACHINE, mock_disk(RANGE_BYTES))


def test_a_lease_is_written_at_once_and_another_one_wanted() -> None:
    written, wanted = worker().answers(lease(7, 0, RANGE_BYTES))
    assert isinstance(written, Written) and written.lease == 7 and written.done.copied == RANGE_BYTES
    assert isinstance(wanted, Wanted) and wanted.leases == 1


def test_a_flush_covers_what_was_written_since_the_last_one() -> None:
    mock = worker()
    mock.answers(lease(1, 0, 4096))
    mock.answers(lease(2, 4096, 8192))
    assert mock.answers(Flush("job", 1, 5)) == [Flushed("job", 1, 5, [1, 2], durable=True)]
    assert mock.answers(Flush("job", 1, 6)) == [Flushed("job", 1, 6, [], durable=True)]


def test_told_to_stop_it_leaves() -> None:
    mock = worker()
    (said,) = mock.answers(Stop("job", 1, "the copy is complete"))
    assert isinstance(said, Goodbye) and mock.gone


def test_the_scheduler_completes_a_job_with_mock_workers() -> None:
    cost = run_alone(workers=5, ranges=1000)
    assert cost.events >= 2 * 1000  # each range was written and another one wanted
    assert cost.cpu > 0 and cost.resident_peak > 0


def test_ranges_are_of_one_length_so_that_leases_can_be_counted() -> None:
    job = mock_job(10, MACHINE)
    assert (job.range_size, job.workers, job.connections, job.local_workers) == (RANGE_BYTES, 10, 10, False)


def test_the_stopwatch_runs_from_the_first_news_to_the_last() -> None:
    watch = Stopwatch()
    for ranges in (0, 2, 2, 5, 9, 9):
        watch.show(done(ranges * RANGE_BYTES), now=0.0)
    rate = watch.rate(workers=3, transport="ipc")
    assert (rate.leases, rate.workers, rate.transport) == (7, 3, "ipc")
    assert rate.wall > 0 and rate.per_second == 7 / rate.wall


def test_a_job_that_was_over_at_once_has_no_rate() -> None:
    watch = Stopwatch()
    watch.show(done(RANGE_BYTES), now=0.0)
    with pytest.raises(RuntimeError, match="ended before anything could be measured"):
        watch.rate(workers=1, transport="ipc")
