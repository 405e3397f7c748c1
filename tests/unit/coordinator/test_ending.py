"""The lines a job ends with."""

from __future__ import annotations

from nbdshard.common.messages import ErrorReport
from nbdshard.coordinator.ending import error_line, one_line, stopped_line, unfenced_line


def test_a_text_from_another_machine_stays_on_one_line() -> None:
    assert one_line("EIO:\n\tdisk \x1b[31mred\x00  gone\r\n") == "EIO: disk [31mred gone"


def test_a_worker_s_own_line_is_the_user_s_line() -> None:
    report = ErrorReport("request", "source nbd://a: read of 512 bytes at offset 0 failed 5 times: EIO", "source")
    assert error_line(report) == "source nbd://a: read of 512 bytes at offset 0 failed 5 times: EIO"


def test_an_error_without_a_text_is_told_by_its_fields() -> None:
    report = ErrorReport("request", "", "destination", "nbd://b", 1024, 512, "ENOSPC")
    assert error_line(report) == "destination nbd://b: ENOSPC at offset 1024, 512 bytes"
    assert error_line(ErrorReport("bug", "")) == "a bug error without a text"


def test_a_stopped_job_tells_how_far_it_got() -> None:
    assert stopped_line(10, 100) == "stopped after 10 of 100 bytes"
    assert stopped_line(10, None) == "stopped after 10 bytes"


def test_workers_that_may_still_write_are_named() -> None:
    assert unfenced_line("", ["b/2"]) == (
        "every byte was copied, but b/2 was not heard to close its connections and may still write to the destination"
    )
    assert unfenced_line("read failed", ["b/2", "a/1"]) == (
        "read failed; a/1, b/2 were not heard to close their connections and may still write to the destination"
    )


def test_a_line_names_five_workers_and_counts_the_others() -> None:
    line = unfenced_line("read failed", [f"h/{number}" for number in range(7)])
    assert line.startswith("read failed; h/0, h/1, h/2, h/3, h/4 and 2 more were not heard")
