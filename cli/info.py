"""`nbdshard info`: what a server says about an export, or which exports it has."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Final

from nbdshard.cli.grammar import EXIT_OK, Parser
from nbdshard.cli.options import add_operands, parse_one_operand
from nbdshard.cli.standard_streams import tell
from nbdshard.common.blocking import Findings, inspect, list_exports
from nbdshard.common.endpoints import NbdEndpoint
from nbdshard.common.errors import UserError
from nbdshard.common.nbd.constants import TransmissionFlag
from nbdshard.common.nbd.export import Export
from nbdshard.common.nbd.hints import Hints
from nbdshard.common.units import format_bytes

# The name shown -> the flag, in the order shown. `df` is "may be asked not to fragment a read".
FLAGS: Final = {
    "read-only": TransmissionFlag.READ_ONLY,
    "rotational": TransmissionFlag.ROTATIONAL,
    "flush": TransmissionFlag.SEND_FLUSH,
    "fua": TransmissionFlag.SEND_FUA,
    "trim": TransmissionFlag.SEND_TRIM,
    "zeroes": TransmissionFlag.SEND_WRITE_ZEROES,
    "fast-zero": TransmissionFlag.SEND_FAST_ZERO,
    "multi-conn": TransmissionFlag.CAN_MULTI_CONN,
    "df": TransmissionFlag.SEND_DF,
    "cache": TransmissionFlag.SEND_CACHE,
    "resize": TransmissionFlag.SEND_RESIZE,
    "block-status-payload": TransmissionFlag.BLOCK_STATUS_PAYLOAD,
}
USAGE: Final = "nbdshard info [--json] [--list] URI"


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard info`."""
    parser = Parser(prog, "Show what an NBD server says about an export.", USAGE)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("-L", "--list", action="store_true", help="list the exports the server names instead")
    add_operands(parser)
    return parser


def run(args: Namespace) -> int:
    """Ask the server and print what it said; nothing is read from the export."""
    endpoint = parse_one_operand(args, "the URI")
    if not isinstance(endpoint, NbdEndpoint):
        raise UserError("info takes the URI of an NBD export", args.operands[0], "such as nbd://host/name")
    if args.list:
        _print_list(args, endpoint.text, list_exports(endpoint.uri, endpoint.text))
        return EXIT_OK
    findings = inspect(endpoint.uri, endpoint.text)
    if args.json:
        tell(json.dumps(as_json(endpoint.text, findings), indent=2))
    else:
        tell("\n".join(as_lines(endpoint.text, findings)))
    return EXIT_OK


def as_lines(uri: str, findings: Findings) -> list[str]:
    """`name: value` lines, always the same names in the same order."""
    export = findings.export
    sizes = export.block_sizes
    told = "" if sizes.advertised else " (assumed: the server named none)"
    return [
        f"uri: {uri}",
        f"export: {export.name}",
        *([f"canonical name: {export.canonical_name}"] if export.canonical_name else []),
        *([f"description: {export.description}"] if export.description else []),
        f"size: {export.size} ({format_bytes(export.size)})",
        f"protocol: {_protocol(findings)}",
        *(f"{name}: {'yes' if export.flags & flag else 'no'}" for name, flag in FLAGS.items()),
        f"block sizes: minimum {sizes.minimum}, preferred {sizes.preferred}, maximum {sizes.maximum}{told}",
        f"contexts: {', '.join(_contexts(findings)) or 'none'}",
        f"hints: {_hints_line(export.hints) or 'none'}",
    ]


def as_json(uri: str, findings: Findings) -> dict[str, object]:
    """The shape the manual page promises; keys may be added, never changed."""
    export: Export = findings.export
    sizes = export.block_sizes
    return {
        "uri": uri,
        "export": export.name,
        "canonical_name": export.canonical_name or export.name,
        "description": export.description,
        "size": export.size,
        "protocol": {"go": findings.go, "structured": export.structured, "extended": export.extended},
        "flags": {name: bool(export.flags & flag) for name, flag in FLAGS.items()},
        "block_sizes": {
            "minimum": sizes.minimum,
            "preferred": sizes.preferred,
            "maximum": sizes.maximum,
            "advertised": sizes.advertised,
        },
        "contexts": _contexts(findings),
        "hints": _hints(export.hints),
    }


def _protocol(findings: Findings) -> str:
    export = findings.export
    replies = "extended headers" if export.extended else "structured replies" if export.structured else "simple replies"
    if findings.go:
        return f"fixed newstyle, {replies}"
    return f"newstyle without NBD_OPT_GO, {replies}"


def _contexts(findings: Findings) -> list[str]:
    """What the server lists; a server that does not list still has what it let us select."""
    return sorted({*findings.contexts_listed, *findings.export.contexts})


def _hints_line(hints: Hints) -> str:
    parts = [
        f"request {hints.request:g} s" if hints.request is not None else "",
        f"loss {hints.loss:g} s" if hints.loss is not None else "",
        f"backoff {hints.backoff_min:g} to {hints.backoff_max:g} s" if hints.backoff_max is not None else "",
        f"instance {hints.instance}" if hints.instance else "",
    ]
    return ", ".join(part for part in parts if part)


def _hints(hints: Hints) -> dict[str, object]:
    """What the server says of itself, as far as it is believed: seconds, and which life of it this is."""
    shown = {
        "request_seconds": hints.request,
        "loss_seconds": hints.loss,
        "backoff_seconds_min": hints.backoff_min,
        "backoff_seconds_max": hints.backoff_max,
        "instance": hints.instance or None,
    }
    return {name: value for name, value in shown.items() if value is not None}


def _print_list(args: Namespace, uri: str, exports: Sequence[tuple[str, str]]) -> None:
    if args.json:
        entries = [{"name": name, "description": description} for name, description in exports]
        tell(json.dumps({"uri": uri, "exports": entries}, indent=2))
        return
    for name, description in exports:
        tell(f"{name}\t{description}" if description else name)
