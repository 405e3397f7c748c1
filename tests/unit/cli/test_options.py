"""cli/options.py"""

from __future__ import annotations

import argparse
import os

import pytest

from nbdshard.cli.grammar import Parser, UsageError
from nbdshard.cli.options import (
    ProgressChoice,
    ProgressKind,
    add_copy_options,
    add_operands,
    add_progress_options,
    add_ring_option,
    add_worker_count,
    job_options,
    parse_operands,
    worker_count,
)
from nbdshard.common.endpoints import CommandEndpoint, FileEndpoint, NullEndpoint, StreamEndpoint
from nbdshard.common.errors import UserError
from nbdshard.common.limits import MIB


def parse(*argv: str) -> argparse.Namespace:
    parser = Parser("nbdshard copy", "", "")
    add_copy_options(parser)
    add_progress_options(parser)
    add_ring_option(parser)
    add_worker_count(parser)
    add_operands(parser)
    return parser.parse_words([*argv, "a", "b"])


def test_the_defaults_are_nbdcopys_where_it_has_them() -> None:
    options = job_options(parse())
    assert (options.requests, options.queue_size, options.sparse_unit) == (64, 16 * MIB, None)
    assert (options.extents, options.flush, options.synchronous) == (True, True, False)
    assert (options.allocated, options.destination_is_zero) == (False, False)
    assert parse().connections == 4


def test_every_option_of_nbdcopy_reaches_the_job() -> None:
    args = parse(
        *("-C", "8", "--target-is-zero", "--no-extents", "--queue-size=33554432", "--request-size=262144"),
        *("-R", "16", "-S", "65536", "-T", "3", "-v", "--flush"),
    )
    options = job_options(args)
    assert (args.connections, args.verbose, worker_count(args)) == (8, True, 3)
    assert (options.queue_size, options.request_size, options.requests) == (32 * MIB, 262144, 16)
    assert (options.sparse_unit, options.extents, options.destination_is_zero) == (65536, False, True)


def test_times_and_tries_reach_the_job() -> None:
    options = job_options(parse())
    assert (options.connect_seconds, options.handshake_seconds, options.request_seconds) == (5.0, 10.0, 30.0)
    assert options.attempts == 5
    assert options.request_hinted
    words = [
        "--connect-timeout=0.5",
        "--handshake-timeout=1m",
        "--request-timeout=2h",
        "--reconnect-delay=1",
        "--retries=0",
    ]
    options = job_options(parse(*words))
    assert (options.connect_seconds, options.handshake_seconds, options.request_seconds) == (0.5, 60.0, 7200.0)
    assert (options.attempts, parse(*words).reconnect_delay) == (1, 1.0)
    assert not options.request_hinted


@pytest.mark.parametrize("text", ["0", "0.05", "2d", "-1", "soon", ""])
def test_a_time_for_an_answer_is_neither_nothing_nor_for_ever(text: str) -> None:
    with pytest.raises(UsageError, match=r"--request-timeout.*a number of seconds from 0.1 to 86400; 10m"):
        parse(f"--request-timeout={text}")


def test_a_wrong_time_is_told_what_a_right_one_is_in_plain_numbers() -> None:
    with pytest.raises(UsageError, match=r"--loss-timeout.*a number of seconds from 0 to 2592000; 10m"):
        parse("--loss-timeout=31d")


def test_sizes_take_suffixes() -> None:
    args = parse("--queue-size=64M", "--request-size=256k", "-S", "64k", "--range-size=1G")
    assert (args.queue_size, args.request_size, args.sparse, args.range_size) == (
        64 * MIB,
        1 << 18,
        1 << 16,
        1 << 30,
    )


def test_a_queue_smaller_than_one_request_is_raised_to_it() -> None:
    assert job_options(parse("--queue-size=4", "--request-size=2M")).queue_size == 2 * MIB


def test_allocated_turns_zero_detection_off() -> None:
    options = job_options(parse("--allocated", "-S", "4096"))
    assert (options.allocated, options.sparse_unit) == (True, 0)


def test_synchronous_means_one_worker_and_one_request() -> None:
    args = parse("--synchronous", "--workers", "8", "-R", "64")
    assert (worker_count(args), job_options(args).requests) == (1, 1)


def test_no_worker_count_means_the_cores_this_process_may_use() -> None:
    cores = len(os.sched_getaffinity(0))
    assert (worker_count(parse()), worker_count(parse("--threads=0"))) == (cores, cores)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--request-size=3"], "argument --request-size: '3' is not a power of two from 4k to 32M"),
        (["--request-size=64M"], "argument --request-size: '64M' is not a power of two from 4k to 32M"),
        (["--request-size=12k"], "argument --request-size: '12k' is not a power of two from 4k to 32M"),
        (["--request-size=0"], "argument --request-size: '0' is not a power of two from 4k to 32M"),
        (["-S", "256"], "argument -S/--sparse: '256' is not 0 or a power of two from 512 to 32M"),
        (["-S", "768"], "argument -S/--sparse: '768' is not 0 or a power of two from 512 to 32M"),
        (["-S", "-1"], "argument -S/--sparse: '-1' is not 0 or a power of two from 512 to 32M"),
        (["--queue-size=2G"], "argument --queue-size: '2G' is not a size from 0 to 1G"),
        (["--queue-size=much"], "argument --queue-size: 'much' is not a size from 0 to 1G"),
        (["-C", "0"], "argument -C/--connections: '0' is not a whole number from 1 to 1024"),
        (["-C", "1025"], "argument -C/--connections: '1025' is not a whole number from 1 to 1024"),
        (["-C", "4k"], "argument -C/--connections: '4k' is not a whole number from 1 to 1024"),
        (["-R", "0"], "argument -R/--requests: '0' is not a whole number from 1 to 1024"),
        (["-T", "x"], "argument -T/--threads/--workers: 'x' is not a whole number from 0 to 1024"),
        (["--range-size=100k"], "argument --range-size: '100k' is not a multiple of 64k, at most 1T"),
        (["--range-size=0"], "argument --range-size: '0' is not a multiple of 64k, at most 1T"),
        (
            ["--ring=uring"],
            "argument --ring: invalid choice: 'uring' (choose from 'auto', 'io_uring', 'epoll')",
        ),
        (
            ["--progress=loud"],
            "argument --progress: 'loud' is not 'bar', 'json' or the number of an open descriptor",
        ),
        (["--progress=987654"], "argument --progress: '987654' is not an open descriptor"),
        (["--progress=99999999999999"], "argument --progress: '99999999999999' is not an open descriptor"),
        (["--reque=5"], "ambiguous option: --reque=5 could match --request-size, --requests, --request-timeout"),
    ],
)
def test_a_bad_value_is_one_line_with_option_value_and_range(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert str(caught.value) == f"{line}; try 'nbdshard copy --help'"


def test_flush_and_no_flush_together_are_refused() -> None:
    with pytest.raises(UsageError, match="contradict"):
        job_options(parse("--flush", "--no-flush"))


def test_progress_may_go_to_a_descriptor_open_for_writing() -> None:
    reader, writer = os.pipe()
    try:
        assert parse(f"--progress={writer}").progress == ProgressChoice(ProgressKind.DESCRIPTOR, writer)
        with pytest.raises(UsageError, match="is not a descriptor open for writing"):
            parse(f"--progress={reader}")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], ProgressKind.AUTO),
        (["-p"], ProgressKind.BAR),
        (["--progress"], ProgressKind.BAR),
        (["--progress=bar"], ProgressKind.BAR),
        (["--progress=json"], ProgressKind.JSON),
    ],
)
def test_progress_kinds(words: list[str], kind: ProgressKind) -> None:
    assert parse(*words).progress.kind is kind


def operands(*argv: str) -> tuple[object, object]:
    parser = Parser("nbdshard copy", "", "")
    add_copy_options(parser)
    add_operands(parser)
    return parse_operands(parser.parse_words(argv))


def test_operands_become_endpoints() -> None:
    assert operands("disk.img", "-C", "2", "-") == (FileEndpoint("disk.img"), StreamEndpoint())
    assert operands("[", "nbdkit", "-r", "null", "]", "null:") == (
        CommandEndpoint(("nbdkit", "-r", "null")),
        NullEndpoint(),
    )


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "source and destination are missing; see --help for what can stand there"),
        (["a"], "the destination is missing; see --help for what can stand there"),
        (["a", "b", "c"], "one word too many: 'c'; a copy has one source and one destination"),
        (
            ["a", "b", "[", "x", "y", "]"],
            "one word too many: '[ x y ]'; a copy has one source and one destination",
        ),
    ],
)
def test_a_wrong_number_of_operands_is_a_usage_error(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        operands(*argv)
    assert str(caught.value) == line


def test_empty_brackets_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        operands("[", "]", "null:")
    assert str(caught.value) == "the source [ ] holds no command; write [ CMD ARGS ... ]"
