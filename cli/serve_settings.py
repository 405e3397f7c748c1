"""What `nbdshard serve` is to do: of its command line, and of a file that says the same in TOML.

Exports of both are served. Anything else that the command line says takes the place of what the file says.
"""

from __future__ import annotations

import tomllib
from argparse import Namespace
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from nbdshard.cli.grammar import UsageError
from nbdshard.common import logs
from nbdshard.common.errors import UserError
from nbdshard.common.limits import CONFIG_BYTES_MAX, SERVED_CONNECTIONS_MAX, SERVER_PROCESSES_MAX
from nbdshard.common.logins import without_logins
from nbdshard.common.nbd.constants import PORT_DEFAULT
from nbdshard.common.secret_files import check_private, read_text
from nbdshard.server.chain import Wanted
from nbdshard.server.credentials import Credentials, credentials_of, load_credentials, of_environment, take_login
from nbdshard.server.extensions import NOTHING, Extensions

Place = tuple[str, int]  # host ("": every address) and port
_Table = TypeVar("_Table", bound=msgspec.Struct)
_Value = str | int | bool


class _Hints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    request: str | None = None
    loss: str | None = None
    backoff: str | None = None


class _Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    name: str
    driver: str
    conn: str
    read_only: bool | None = None
    description: str | None = None
    hints: _Hints = _Hints()
    parameters: dict[str, _Value] = {}
    credentials: dict[str, str] = {}
    credentials_file: str | None = None


class _Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tcp: list[str] = []
    unix: list[str] = []


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    export: list[dict[str, Any]] = []
    listen: _Listen = _Listen()
    max_connections: Annotated[int, msgspec.Meta(ge=1, le=SERVED_CONNECTIONS_MAX)] | None = None
    processes: Annotated[int, msgspec.Meta(ge=1, le=SERVER_PROCESSES_MAX)] | None = None
    credentials: dict[str, str] = {}
    credentials_file: str | None = None


class Settings(msgspec.Struct, frozen=True):
    """What is to be served, and how. `tcp` and `unix` are empty where nothing was said of them."""

    exports: list[Wanted]
    tcp: list[Place]
    unix: list[str]
    max_connections: int | None
    processes: int
    pid_file: str | None
    level: logs.Level
    extensions: Extensions = NOTHING


def settings_of(args: Namespace) -> Settings:
    """What the command line `args` says, and the file it names. Raises UsageError and UserError."""
    file, tables = _load(args.config) if args.config else (_File(), [])
    common = _credentials(args.config, file)
    if args.credentials:
        common = load_credentials(args.credentials)
    if common is None:
        common = of_environment()
    exports = [_wanted(args.config, table, common) for table in tables]
    exports += [Wanted(name, driver, conn, credentials=common) for name, driver, conn in args.exports]
    exports = _read_only(_distinct(exports), args.read_only)
    if not exports:
        raise UsageError("no export is given", advice="-e NAME DRIVER CONN, or --config FILE; see --help")
    is_told = bool(args.tcp or args.unix)
    tcp = [place_of(text, "argument --tcp") for text in args.tcp]
    if not is_told:
        tcp = [place_of(text, f"{args.config}: listen.tcp") for text in file.listen.tcp]
    return Settings(
        exports,
        tcp,
        args.unix if is_told else file.listen.unix,
        args.max_connections or file.max_connections,
        args.processes or file.processes or 1,
        args.pid_file,
        logs.Level.DEBUG if args.verbose else logs.Level.WARNING,
    )


def place_of(text: str, where: str) -> Place:
    """The host and port that HOST:PORT means. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, str(PORT_DEFAULT)
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{without_logins(text)!r}: a port from 0 to 65535 is expected", where, "HOST:PORT")
    host = host.removeprefix("[").removesuffix("]")
    return ("" if host == "*" else host), int(port)


def _load(path: str) -> tuple[_File, list[_Export]]:
    text, facts = read_text(path, CONFIG_BYTES_MAX, "a file of settings")
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"is not TOML: {error}", path) from None
    file = _converted(content, _File, path)
    tables = []
    for number, table in enumerate(file.export, start=1):
        tables.append(_converted(table, _Export, f"{path}: export {number}"))
    if file.credentials or any(table.credentials or _has_login(table.conn) for table in tables):
        check_private(path, facts, "credentials")
    return file, tables


def _has_login(conn: str) -> bool:
    try:
        return take_login(conn)[1] is not None
    except UserError:  # told when the export is opened; what there is of a login is not for others
        return True


def _converted(content: dict[str, Any], kind: type[_Table], where: str) -> _Table:
    """`content` as a `kind`. Raises UserError with every key that is unknown, or the first value that is wrong."""
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    if unknown := sorted(content.keys() - known):
        what = f"{', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} unknown"
        raise UserError(what, where, f"known are {', '.join(sorted(known))}")
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        raise UserError(what, f"{where}: {place.rstrip('`')}" if place else where) from None


def _wanted(path: str, table: _Export, common: Credentials) -> Wanted:
    where = f"{path}: export {table.name!r}"
    parameters = {name: _text(value) for name, value in table.parameters.items()}
    hints = {f"hint-{name}": text for name, text in msgspec.structs.asdict(table.hints).items() if text is not None}
    more: dict[str, str] = {**hints}
    if table.read_only is not None:
        more["read-only"] = _text(table.read_only)
    if table.description is not None:
        more["description"] = table.description
    if twice := parameters.keys() & more.keys():
        raise UserError(f"{min(twice)} twice, among the parameters and beside them", where)
    credentials = _credentials(where, table) or common
    return Wanted(table.name, table.driver, table.conn, {**parameters, **more}, credentials)


def _text(value: _Value) -> str:
    """A value as it would stand after `?`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _credentials(where: str, table: _File | _Export) -> Credentials | None:
    if table.credentials and table.credentials_file:
        raise UserError("credentials and credentials-file: one of them is enough", where)
    if table.credentials_file:
        return load_credentials(table.credentials_file)
    return credentials_of(table.credentials, f"{where}: credentials") if table.credentials else None


def _distinct(exports: list[Wanted]) -> list[Wanted]:
    names = [each.name for each in exports]
    if len(set(names)) < len(names):
        raise UsageError(f"two exports are called {next(name for name in names if names.count(name) > 1)!r}")
    return exports


def _read_only(exports: list[Wanted], names: Sequence[str]) -> list[Wanted]:
    """`exports`, of which those with `names` are read-only, whatever else is said of them."""
    if unknown := set(names) - {each.name for each in exports}:
        raise UsageError(f"argument -r/--read-only: no export is called {min(unknown)!r}")
    return [
        msgspec.structs.replace(each, parameters={**each.parameters, "read-only": "yes"})
        if each.name in names
        else each
        for each in exports
    ]
