"""Where the journal of a copy is, and how the job starts: anew, or where an earlier run ended.

What is only needed once there is something to write down, or to resume, is imported then: most copies are short.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Final

import msgspec

from nbdshard.cli.grammar import UsageError
from nbdshard.cli.setting import Setting
from nbdshard.common.errors import UserError
from nbdshard.common.logins import without_logins
from nbdshard.common.messages import EndpointDescription
from nbdshard.common.ranges import Range
from nbdshard.coordinator.job import EarlierLeaves
from nbdshard.coordinator.journal_paths import default_path
from nbdshard.coordinator.keeping import Keeper

if TYPE_CHECKING:
    from nbdshard.coordinator.journal_facts import JobFacts

PROGRAM: Final = "nbdshard"
_OWN: Final = ("--journal", "--resume", "--force-resume")  # a resumed copy is given its own


class Start(msgspec.Struct, frozen=True):
    """How a job starts: anew, or where an earlier run of it ended."""

    uuid: str
    keeper: Keeper | None  # None: nothing of it can be resumed
    epoch: int = 1
    durable: tuple[Range, ...] = ()
    unreadable: tuple[Range, ...] = ()  # of them; zeroes are there
    earlier: EarlierLeaves | None = None  # the digests of them
    expected: tuple[EndpointDescription, EndpointDescription] | None = None
    differs: str = ""  # what of `durable` is known not to be true, and was forced


def start(setting: Setting, stack: ExitStack) -> Start:
    """Open the journal to resume from, or say where a new one will be. `stack` closes it.

    Call after the first workers were forked: the journal's lock is this process's.
    Raises UsageError, UserError: there is no such journal, or it is in use, damaged, or that of another copy.
    """
    args = setting.args
    if args.salvage and setting.ends.source.kind == "stream":
        raise UserError("what a stream cannot deliver cannot be left out: --salvage needs a source with offsets", "-")
    is_copy = setting.options.mode == "copy"
    keeps_nothing = setting.ends.has_stream or setting.ends.destination.kind == "null"
    if keeps_nothing and args.verify:
        advice = "leave --verify out"
        raise UserError("what goes through a stream, or to null:, cannot be read back", args.operands[1], advice)
    if keeps_nothing and args.journal is not None:
        raise UserError("a copy from or to a stream, or to null:, cannot be resumed: it has no journal", args.journal)
    if args.resume or args.force_resume:
        if args.journal is None:
            raise UsageError("--resume needs --journal", advice="`nbdshard jobs` lists journals")
        from nbdshard.cli.resuming import resumed

        return resumed(setting, stack)
    uuid = _new_uuid()
    if keeps_nothing or not is_copy:
        return Start(uuid, None)
    if args.journal is not None:
        _check_new(args.journal)

    def locate() -> str:
        return default_path(uuid) if args.journal is None else str(args.journal)

    def describe(source: EndpointDescription, destination: EndpointDescription, size: int) -> JobFacts:
        from nbdshard.cli.facts import facts_of

        return facts_of(setting, uuid, source, destination, size)

    is_wanted = args.journal is not None or args.keep_journal
    return Start(uuid, Keeper(locate, describe, keeps=args.keep_journal, is_wanted=is_wanted, has_leaves=args.checksum))


def _check_new(path: str) -> None:
    """Raise UserError where a journal cannot be made. It is made later, when much was copied already."""
    if not path or path.endswith("/"):
        raise UsageError(f"--journal is to name a file, not {path!r}")
    if os.path.lexists(path):
        raise UserError("there is a file already", path, "go on with that job by --resume, or name another")
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):  # what is missing is made with it
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f"the journal cannot be made: {folder} is not a folder", path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"the journal cannot be made: {folder} cannot be written", path)


def resume_command(words: Sequence[str], journal: str, *, forced: bool = False) -> str:
    """The command that goes on where the one of `words` (without the program's name) ended, without passwords.

    `forced`: that one was; what it was not stopped by is not as it was the next time either.
    """
    import shlex

    own = ["--force-resume" if forced else "--resume", "--journal", os.path.abspath(journal)]
    return shlex.join([*_program(), words[0], *own, *map(without_logins, _without_journal(words[1:]))])


def export_command(journal: str) -> str:
    """The command that lists what could not be read."""
    import shlex

    return shlex.join([*_program(), "jobs", "export", os.path.abspath(journal)])


def _program() -> list[str]:
    """The words by which a shell finds this program: its path where its name leads nowhere, or elsewhere."""
    import shutil

    path = os.path.abspath(sys.argv[0])
    if path.endswith(".py"):  # python -m
        return [sys.executable, "-m", "nbdshard.cli.main"]
    found = shutil.which(PROGRAM)
    with suppress(OSError):
        if found is not None and os.path.samefile(found, path):
            return [PROGRAM]
    return [path if os.access(path, os.X_OK) else PROGRAM]


def _without_journal(words: Sequence[str]) -> Iterator[str]:
    """`words` without these options. What is in `[ CMD ]` or behind `--` are no options of ours."""
    pending = iter(words)
    for word in pending:
        if word == "--":
            yield word
            yield from pending
        elif word == "[":
            yield word
            for inner in pending:
                yield inner
                if inner == "]":
                    break
        else:
            name, equals, _ = word.partition("=")
            # A beginning that is understood is that of one option only.
            option = next((own for own in _OWN if len(name) > 2 and own.startswith(name)), None)
            if option is None:
                yield word
            elif option == "--journal" and not equals:
                next(pending, None)


def _new_uuid() -> str:
    """RFC 9562, version 4; the uuid module takes a tenth of a small copy to load."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    text = data.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
