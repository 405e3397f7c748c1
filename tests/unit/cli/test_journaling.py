"""cli/journaling.py: the command that is printed to go on with a copy is one that a shell understands."""

from __future__ import annotations

import shlex

import pytest

from nbdshard.cli.copy import build_parser
from nbdshard.cli.journaling import resume_command

OWN = ["nbdshard", "copy", "--resume", "--journal", "/tmp/j"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        (["-C", "2", "a file", "it's"], ["-C", "2", "a file", "it's"]),
        (["--journal", "j", "a", "b"], ["a", "b"]),
        (["--journal=j", "a", "--resume", "b"], ["a", "b"]),
        (["--jour", "j", "a", "b"], ["a", "b"]),
        (["a", "b", "--j=j", "--resum", "--forc"], ["a", "b"]),
        (["--request-size", "1M", "--requests=2", "a", "b"], ["--request-size", "1M", "--requests=2", "a", "b"]),
        (["[", "serve", "--journal", "x", "--resume", "]", "--journal", "j", "b"],
         ["[", "serve", "--journal", "x", "--resume", "]", "b"]),
        (["--journal", "j", "--", "--resume", "b"], ["--", "--resume", "b"]),
    ],
)  # fmt: skip
def test_the_command_is_that_of_the_copy_with_its_journal(words: list[str], expected: list[str]) -> None:
    command = resume_command(["copy", *words], "/tmp/j")
    assert shlex.split(command) == [*OWN, *expected]
    args = build_parser("nbdshard copy").parse_words(shlex.split(command)[2:])
    assert (args.resume, args.force_resume, args.journal, len(args.operands)) == (True, False, "/tmp/j", 2)
