"""Keys of the control channel: who may work for whom.

Each coordinator and each worker that talks over a network has a pair of Curve25519 keys, in two files that
`nbdshard keygen NAME` writes. One line each, hexadecimal, so that a key in a log can be searched for in a
file::

    NAME.key   nbdshard-secret 9f3a...64 digits...  NAME      mode 0600; never leaves its machine
    NAME.pub   nbdshard-public 41c0...64 digits...  NAME      handed to the other side

A coordinator's allow-list is a file of such public lines (blank lines and lines that start with `#` are
ignored), or a directory of `*.pub` files. Keys are never taken from a command line: other users can read
those.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from nbdshard.common.errors import UserError
from nbdshard.common.limits import KEY_FILE_BYTES_MAX, KEYS_ALLOWED_MAX
from nbdshard.common.secret_files import check_private, read_text

SECRET_WORD = "nbdshard-secret"
PUBLIC_WORD = "nbdshard-public"
KEY_BYTES = 32  # Curve25519
SECRET_SUFFIX = ".key"
PUBLIC_SUFFIX = ".pub"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The key others know somebody by: 32 bytes."""

    raw: bytes

    def __str__(self) -> str:
        return self.raw.hex()


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One's own keys. The secret is kept out of `repr` and so out of logs and tracebacks."""

    public: PublicKey
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        public, secret = zmq.curve_keypair()
        return cls(PublicKey(z85.decode(public)), z85.decode(secret))

    @classmethod
    def of_secret(cls, secret: bytes) -> KeyPair:
        return cls(PublicKey(z85.decode(zmq.curve_public(z85.encode(secret)))), secret)


@dataclass(frozen=True, slots=True)
class CoordinatorKeys:
    """What a coordinator needs to listen on a network: its own pair, and whom it admits."""

    own: KeyPair
    allowed: frozenset[PublicKey]


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """What a worker needs to connect over a network: its own pair, and the coordinator's public key."""

    own: KeyPair
    coordinator: PublicKey


def write_key_files(directory: str, name: str, pair: KeyPair) -> tuple[str, str]:
    """Write NAME.key and NAME.pub into `directory`; return both paths.

    Raises UserError when either is there already (nothing is ever overwritten) or cannot be written; then
    neither is left behind half-written.
    """
    if not name or name.startswith((".", "-")) or "/" in name or any(character.isspace() for character in name):
        raise UserError("a key's name is a plain file name without blanks", repr(name))
    secret_path = os.path.join(directory, name + SECRET_SUFFIX)
    public_path = os.path.join(directory, name + PUBLIC_SUFFIX)
    _write_new(secret_path, f"{SECRET_WORD} {pair.secret.hex()} {name}\n", 0o600)
    try:
        _write_new(public_path, f"{PUBLIC_WORD} {pair.public} {name}\n", 0o644)
    except UserError:
        os.unlink(secret_path)
        raise
    return secret_path, public_path


def _write_new(path: str, text: str, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise UserError("exists already; keys are never overwritten", path) from None
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", path) from None
    try:
        with open(descriptor, "w", encoding="ascii", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        os.unlink(path)
        raise UserError(f"cannot be written: {error.strerror}", path) from None


def load_key_pair(path: str) -> KeyPair:
    """The pair of the secret in `path` (NAME.key).

    Raises UserError when the file is not a secret, or when others than its owner can read it.
    """
    text, facts = _read(path)
    keys = list(_parse(path, text, SECRET_WORD, PUBLIC_WORD))
    check_private(path, facts, "a secret key")
    if len(keys) != 1:
        raise UserError(f"holds {len(keys)} secret keys instead of one", path)
    return KeyPair.of_secret(keys[0])


def load_public_key(path: str) -> PublicKey:
    """The one public key in `path` (NAME.pub). Raises UserError when there is none, or more than one."""
    keys = list(_parse(path, _read(path)[0], PUBLIC_WORD, SECRET_WORD))
    if len(keys) != 1:
        raise UserError(f"holds {len(keys)} public keys instead of one", path)
    return PublicKey(keys[0])


def load_allow_list(path: str) -> frozenset[PublicKey]:
    """The public keys in `path`, a file of them or a directory of `*.pub` files. Raises UserError; also for
    none.
    """
    if os.path.isdir(path):
        files = sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(PUBLIC_SUFFIX))
    else:
        files = [path]
    if len(files) > KEYS_ALLOWED_MAX:
        raise UserError(f"holds {len(files)} keys, at most {KEYS_ALLOWED_MAX} can be allowed", path)
    allowed = frozenset(
        PublicKey(raw) for file in files for raw in _parse(file, _read(file)[0], PUBLIC_WORD, SECRET_WORD)
    )
    if not allowed:
        raise UserError("allows no key at all", path, "put the workers' .pub files there")
    return allowed


def _read(path: str) -> tuple[str, os.stat_result]:
    return read_text(path, KEY_FILE_BYTES_MAX, "a file of keys")


def _parse(path: str, text: str, word: str, other: str) -> Iterator[bytes]:
    """The keys of lines `word HEX [NAME]`; never shows a line in an error, for it may hold a secret."""
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        if fields[0] == other:
            wanted, found = (kind.removeprefix("nbdshard-") for kind in (word, other))
            raise UserError(f"is a {found} key; a {wanted} key is wanted here", where)
        if fields[0] != word or len(fields) < 2:
            raise UserError(f"is not a line of the form '{word} KEY NAME'", where)
        yield _key_bytes(fields[1], where)


def _key_bytes(digits: str, where: str) -> bytes:
    try:
        raw = bytes.fromhex(digits)
    except ValueError:
        raw = b""
    if len(raw) != KEY_BYTES:
        raise UserError(f"the key is not {2 * KEY_BYTES} hexadecimal digits", where)
    return raw
