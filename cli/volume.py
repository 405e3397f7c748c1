"""`nbdshard volume`: make, resize, delete and list what `nbdshard serve` exports with the driver sharded."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from nbdshard.cli.grammar import EXIT_FAILURE, EXIT_OK, Parser, UsageError
from nbdshard.cli.standard_streams import tell
from nbdshard.cli.title import warn_of_logins
from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.logins import without_logins
from nbdshard.common.units import format_bytes, parse_size

if TYPE_CHECKING:
    from nbdshard.server.stores.base import Store
    from nbdshard.server.volume_changes import Listed

USAGE: Final = """\
nbdshard volume create NAME STORE --size SIZE [--chunk SIZE]
       nbdshard volume resize NAME STORE --size SIZE [--shrink]
       nbdshard volume delete NAME STORE --yes
       nbdshard volume list STORE [--json]"""
EPILOG: Final = """\
STORE is what stands behind a driver's layers in a CONN of `nbdshard serve`:
file:DIRECTORY, s3:http://HOST:PORT/BUCKET/PREFIX and the like. NAME is the
export's. A volume that is served is not changed."""


class _Action(msgspec.Struct, frozen=True):
    """What can be done. `operands`: their names; `needs`, `takes`: the options it must and may be given."""

    operands: tuple[str, ...]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    act: Callable[[Store, Namespace], int]


def build_parser(prog: str) -> Parser:
    """The options of `nbdshard volume`."""
    parser = Parser(prog, "Make, resize, delete and list volumes, images in chunks in a store.", USAGE, EPILOG)
    parser.add_argument("--size", metavar="SIZE", help="how large it is to be: 100G, say")
    parser.add_argument("--chunk", metavar="SIZE", help="how large its chunks are (4M), a power of two")
    parser.add_argument("--shrink", action="store_true", help="resize it although what is beyond the new end is lost")
    parser.add_argument("--yes", action="store_true", help="delete it: without this word nothing is deleted")
    parser.add_argument("--json", action="store_true", help="list as one JSON array")
    parser.add_argument("--credentials", metavar="FILE", help="what the store is given, in lines NAME=VALUE")
    parser.add_argument("operands", metavar="ACTION", nargs="*", help="create, resize, delete or list, and operands")
    return parser


def run(args: Namespace) -> int:
    """Do it. Raises UsageError and UserError."""
    action = _action(args)
    logs.set_up("", logs.Level.WARNING)
    warn_of_logins(args.command_line)
    from nbdshard.server.chain import open_store
    from nbdshard.server.credentials import load_credentials, of_environment

    credentials = of_environment() if args.credentials is None else load_credentials(args.credentials)
    with _told(args.store):
        store = open_store(args.store, credentials, read_only=action.act is _list)
        with contextlib.closing(store):
            return action.act(store, args)


def _action(args: Namespace) -> _Action:
    """What the command line asks for; its operands become `args.name` and `args.store`. Raises UsageError."""
    words: list[str] = args.operands
    if not words:
        raise UsageError(f"what is to be done is missing: {' or '.join(_ACTIONS)}", advice="see --help")
    word, operands = words[0], words[1:]
    action = _ACTIONS.get(word)
    if action is None:
        raise UsageError(f"volumes cannot be told to {word!r}", advice=f"known are {', '.join(_ACTIONS)}")
    if len(operands) != len(action.operands):
        given = f"{len(operands)} given" if operands else "none given"
        raise UsageError(f"volume {word} takes {' '.join(action.operands)}, and {given}", advice="see --help")
    for name in ("size", "chunk", "shrink", "yes", "json"):
        is_given = getattr(args, name) not in (None, False)
        if is_given and name not in (*action.needs, *action.takes):
            raise UsageError(f"volume {word} does not take --{name}", advice="see --help")
        if name in action.needs and not is_given:
            raise UsageError(_MISSING[name].format(word, *operands), advice="see --help")
    args.name, args.store = operands[0], operands[-1]
    args.size = None if args.size is None else _size(args.size, "--size")
    args.chunk = None if args.chunk is None else _size(args.chunk, "--chunk")
    return action


def _size(text: str, option: str) -> int:
    try:
        return parse_size(text)
    except UserError:
        raise UsageError(f"argument {option}: {text!r} is not a size", advice="100G, say") from None


@contextlib.contextmanager
def _told(store: str) -> Iterator[None]:
    """Errors inside name the store, without what is secret in its name."""
    where = without_logins(store)
    try:
        yield
    except UserError as error:
        line = str(error)
        raise (error if line.startswith(where) else UserError(line, where)) from None
    except OSError as error:
        raise UserError(error.strerror or str(error), where) from None


def _create(store: Store, args: Namespace) -> int:
    from nbdshard.server.volume_changes import create

    volume = create(store, args.name, args.size, args.chunk)
    tell(f"{args.name}: {format_bytes(volume.size)} in chunks of {format_bytes(volume.chunk_bytes)}")
    return EXIT_OK


def _resize(store: Store, args: Namespace) -> int:
    from nbdshard.server.volume_changes import resize

    before, gone = resize(store, args.name, args.size, may_shrink=args.shrink)
    deleted = f"; chunks deleted: {gone}" if gone else ""
    tell(f"{args.name}: {format_bytes(args.size)} instead of {format_bytes(before)}{deleted}")
    return EXIT_OK


def _delete(store: Store, args: Namespace) -> int:
    from nbdshard.server.volume_changes import delete

    tell(f"{args.name}: deleted; chunks deleted: {delete(store, args.name)}")
    return EXIT_OK


def _list(store: Store, args: Namespace) -> int:
    from nbdshard.server.volume_changes import listed

    found = list(listed(store))
    for each in found:
        if each.problem:
            logs.say(each.problem)
    if args.json:
        tell(json.dumps([_as_json(each) for each in found if not each.problem], indent=2))
    else:
        for each in found:
            if not each.problem:
                tell(_as_line(each))
    return EXIT_FAILURE if any(each.problem for each in found) else EXIT_OK


def _as_json(each: Listed) -> dict[str, object]:
    volume = each.volume
    return {
        "name": each.name,
        "size": None if volume is None else volume.size,
        "chunk_bytes": None if volume is None else volume.chunk_bytes,
        "stored_bytes": each.stored_bytes,
    }


def _as_line(each: Listed) -> str:
    name = "(any name)" if each.name is None else each.name
    stored = f"{format_bytes(each.stored_bytes)} stored"
    if each.volume is None:
        return f"{name}: chunks without a description, {stored}"
    size, chunk = format_bytes(each.volume.size), format_bytes(each.volume.chunk_bytes)
    return f"{name}: {size} in chunks of {chunk}, {stored}"


_MISSING: Final[Mapping[str, str]] = {
    "size": "volume {0} needs --size",
    "yes": "{1} and all that is in it would be deleted; --yes says that this is meant",
}
_ACTIONS: Final[Mapping[str, _Action]] = {
    "create": _Action(("NAME", "STORE"), ("size",), ("chunk",), _create),
    "resize": _Action(("NAME", "STORE"), ("size",), ("shrink",), _resize),
    "delete": _Action(("NAME", "STORE"), ("yes",), (), _delete),
    "list": _Action(("STORE",), (), ("json",), _list),
}
