"""What a store is given to log in with: of a file, of the environment, or of `http://user:password@host` in a CONN.

A file has lines NAME=VALUE, with the names that the environment has for them, too::

    # lines that begin with # are comments
    AWS_ACCESS_KEY_ID=AKIA...
    AWS_SECRET_ACCESS_KEY="..."

Only one of the three is asked, whole: the key of one account is never combined with the session of another. None of
this is ever part of a message: what is shown of a CONN has no login in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

import msgspec

from nbdshard.common.errors import UserError
from nbdshard.common.limits import CREDENTIALS_BYTES_MAX
from nbdshard.common.secret_files import check_private, read_text

_PREFIXES: Final = ("AWS_", "AZURE_", "GOOGLE_")  # of the names that belong to stores
_LINE: Final = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")
_AUTHORITY: Final = re.compile(r"(?<=:)(https?://)([^/?#]*)")


class Credentials(msgspec.Struct, frozen=True):
    """Who asks. `user`, `password`: of the CONN; where they are "", `variables` by their names in the environment."""

    user: str = ""
    password: str = ""
    variables: Mapping[str, str] = msgspec.field(default_factory=dict)

    def __repr__(self) -> str:
        return "Credentials(...)"  # so that no log and no traceback shows them


NOBODY: Final = Credentials()


def of_environment(environment: Mapping[str, str] = os.environ) -> Credentials:
    """All that stores could want of `environment`, also where it is and which profile: AWS_REGION, AWS_PROFILE."""
    return Credentials(variables={name: text for name, text in environment.items() if name.startswith(_PREFIXES)})


def load_credentials(path: str) -> Credentials:
    """Those in the file `path`. Raises UserError, also where others than its owner can read it."""
    text, facts = read_text(path, CREDENTIALS_BYTES_MAX, "a file of credentials")
    check_private(path, facts, "credentials")
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"  # the line itself is never shown
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError("is not of the form NAME=VALUE", where, "AWS_ACCESS_KEY_ID=..., say")
        name, value = match.groups()
        _check_name(name, where)
        if name in found:
            raise UserError(f"{name} twice", where)
        found[name] = _unquoted(value)
    return credentials_of(found, path)


def credentials_of(variables: Mapping[str, str], where: str) -> Credentials:
    """Those by the names they have in the environment. Raises UserError, with `where`, for none and for others."""
    if not variables:
        raise UserError("holds no credentials", where)
    for name in variables:
        _check_name(name, where)
    return Credentials(variables=variables)


def _check_name(name: str, where: str) -> None:
    if not name.startswith(_PREFIXES):
        raise UserError(f"{name} is no name that a store knows", where, f"they begin with {', '.join(_PREFIXES)}")


def take_login(conn: str) -> tuple[str, Credentials | None]:
    """`conn` without `user:password@`, and that login if there is one. Raises UserError, which does not show it."""
    match = _AUTHORITY.search(conn)
    if match is None:
        return conn, None
    login, at, _ = match[2].rpartition("@")
    if not at:
        path, _, query = conn[match.end() :].partition("?")
        if "@" in path or ("@" in query and not _is_host(match[2])):
            what = "a character in it ends the login before @, or an @ stands elsewhere"
            raise UserError(what, conn[: match.end(1)] + "...", "write / as %2F, ? as %3F, # as %23, and that @ as %40")
        return conn, None
    user, colon, password = login.partition(":")
    if not user or not colon:
        raise UserError("before @ USER:PASSWORD is expected", conn[: match.end(1)] + "...")
    clean = conn[: match.end(1)] + conn[match.end(1) + len(login) + 1 :]
    return clean, Credentials(unquote(user), unquote(password))


def _is_host(text: str) -> bool:
    """Whether `text` can be HOST or HOST:PORT."""
    port = text.rpartition("]")[2].partition(":")[2]
    return not port or port.isdigit()


def _unquoted(value: str) -> str:
    value = value.strip()
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if is_quoted else value
