"""`nbdshard map`: which parts of an export are data, holes and zeroes, in the columns of `nbdinfo --map`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from nbdshard.cli.grammar import EXIT_OK, Parser
from nbdshard.cli.options import add_operands, parse_one_operand
from nbdshard.cli.standard_streams import tell
from nbdshard.common.blocking import BlockingClient
from nbdshard.common.dial import cause_of
from nbdshard.common.endpoints import FileEndpoint, NbdEndpoint
from nbdshard.common.errors import RequestError, UserError
from nbdshard.common.limits import EXTENTS_QUERY_BYTES_MAX
from nbdshard.common.logs import warning
from nbdshard.common.nbd.constants import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO
from nbdshard.common.ranges import Range

Extent: TypeAlias = tuple[Range, int]  # where, and the flags of base:allocation there

DATA: Final = 0
DESCRIPTIONS: Final = {
    DATA: "data",
    STATE_HOLE: "hole",
    STATE_ZERO: "zero",
    STATE_HOLE | STATE_ZERO: "hole,zero",
}
USAGE: Final = "nbdshard map [--json] [--totals] URI | FILE"
EPILOG: Final = """\
Columns: offset, length, type (the number in the NBD protocol), description. Neighbours of one type are merged.
What the server cannot or does not tell counts as data, with a note on standard error."""


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard map`."""
    about = "Show which parts of an export or of a local file are data, holes and zeroes."
    parser = Parser(prog, about, USAGE, EPILOG)
    parser.add_argument("--json", action="store_true", help="print a JSON array, one object a line")
    parser.add_argument("--totals", action="store_true", help="print bytes and percent of each type instead")
    add_operands(parser)
    return parser


def run(args: Namespace) -> int:
    """Print the map of the operand, as it comes in: a huge export takes no memory."""
    match parse_one_operand(args, "the URI"):
        case NbdEndpoint(uri=uri, text=text):
            with BlockingClient.open(uri, peer=text) as client:
                _show(args, merged(extents_of_export(client, text)), client.export.size)
        case FileEndpoint(path=path):
            with _opened(path) as (descriptor, size):
                _show(args, merged(extents_of_file(descriptor, size)), size)
        case _:
            raise UserError("map takes the URI of an NBD export, or a file", args.operands[0])
    return EXIT_OK


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """`extents`, which follow one another without gaps, with neighbours of the same flags made one."""
    pending: Extent | None = None
    for where, flags in extents:
        if pending is not None and pending[1] == flags:
            pending = Range(pending[0].start, where.end), flags
            continue
        if pending is not None:
            yield pending
        pending = where, flags
    if pending is not None:
        yield pending


def totals(extents: Iterable[Extent]) -> dict[int, int]:
    """Bytes of each type, by its flags, in ascending order of the flags."""
    sums: dict[int, int] = {}
    for where, flags in extents:
        sums[flags] = sums.get(flags, 0) + where.length
    return dict(sorted(sums.items()))


def extents_of_export(client: BlockingClient, peer: str) -> Iterator[Extent]:
    """What the server says about every byte of the export, in order. What it does not tell is data.

    A query that fails ends the asking: a server that fails one fails the next, and slowly perhaps.
    """
    export = client.export
    start, unit = 0, export.block_sizes.minimum
    reachable = export.size // unit * unit  # an odd tail cannot be asked about
    if BASE_ALLOCATION not in export.contexts:
        warning(f"{peer}: no block status: all is shown as data")
        reachable = 0
    while start < reachable:
        asked = start // unit * unit
        try:
            answer = client.extents(Range(asked, min(reachable, asked + EXTENTS_QUERY_BYTES_MAX)))
        except RequestError as error:
            warning(f"{peer}: no block status from offset {start} on: {error}: the rest is shown as data")
            break
        told = max(start, answer[-1][0].end)
        yield from _clipped(answer, start)
        if told == start:
            warning(f"{peer}: no block status from offset {start} on: the rest is shown as data")
            break
        start = told
    if start < export.size:
        yield Range(start, export.size), DATA


def _clipped(extents: Iterable[Extent], start: int) -> Iterator[Extent]:
    """`extents` without what lies before `start`; an extent that ended inside a block is asked about twice."""
    for where, flags in extents:
        if where.end > start:
            yield Range(max(where.start, start), where.end), flags


def extents_of_file(descriptor: int, size: int) -> Iterator[Extent]:
    """SEEK_DATA and SEEK_HOLE's view of a file; a block device, or a file system without them, is all data."""
    offset = 0
    while offset < size:
        try:
            data = min(os.lseek(descriptor, offset, os.SEEK_DATA), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here to the end
                data = size
            elif error.errno == errno.EINVAL:
                data = offset
            else:
                raise
        if data > offset:
            yield Range(offset, data), STATE_HOLE | STATE_ZERO
        if data == size:
            return
        offset = _end_of_data(descriptor, data, size)
        yield Range(data, offset), DATA


def _end_of_data(descriptor: int, offset: int, size: int) -> int:
    try:
        return max(min(os.lseek(descriptor, offset, os.SEEK_HOLE), size), offset + 1)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO):
            return size
        raise


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, int]]:
    """The descriptor and the size of a file or block device. Raises UserError for what is neither."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(cause_of(error), path) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UserError("neither a file nor a block device", path)
        yield descriptor, os.lseek(descriptor, 0, os.SEEK_END)
    finally:
        os.close(descriptor)


def _show(args: Namespace, extents: Iterable[Extent], size: int) -> None:
    if args.totals:
        sums = totals(extents)
        _show_totals_json(sums, size) if args.json else _show_totals(sums, size)
    elif args.json:
        _print_json({"offset": where.start, "length": where.length, **_kind(flags)} for where, flags in extents)
    else:
        for where, flags in extents:
            tell(f"{where.start:>10} {where.length:>11} {flags:>4}  {DESCRIPTIONS[flags]}")


def _show_totals(sums: dict[int, int], size: int) -> None:
    for flags, count in sums.items():
        tell(f"{count:>10} {100 * count / size:>5.1f}% {flags:>3} {DESCRIPTIONS[flags]}")


def _show_totals_json(sums: dict[int, int], size: int) -> None:
    _print_json(
        {"size": count, "percent": round(100 * count / size, 4), **_kind(flags)} for flags, count in sums.items()
    )


def _kind(flags: int) -> dict[str, object]:
    return {"type": flags, "description": DESCRIPTIONS[flags]}


def _print_json(objects: Iterable[dict[str, object]]) -> None:
    """An array with one object a line, written as it comes."""
    separator = "["
    for entry in objects:
        tell(f"{separator}\n{json.dumps(entry)}", end="")
        separator = ","
    tell("[]" if separator == "[" else "\n]")
