"""The parsers, the manual page and the completions name the same options."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbdshard.cli.main import SUBCOMMANDS, load

ROOT = Path(__file__).resolve().parents[3]
MANUAL = ROOT / "docs" / "nbdshard.1"
BASH = ROOT / "deploy" / "completions" / "nbdshard.bash"
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+|-[A-Za-z])(?![\w])")

NOT_COMPLETED = {"--short-options", "--long-options"}


def parser_options(subcommand: str) -> set[str]:
    """Every option the parser shows to users, and nbdcopy's two lists, which only their reader asks for."""
    actions = load(subcommand).build_parser(f"nbdshard {subcommand}")._actions
    return {
        name
        for action in actions
        for name in action.option_strings
        if action.help != argparse.SUPPRESS or name in NOT_COMPLETED
    }


def manual_section(subcommand: str) -> str:
    _, _, text = MANUAL.read_text().partition(f".SH OPTIONS OF {subcommand.upper()}\n")
    return text.partition("\n.SH ")[0]


def manual_options(subcommand: str) -> set[str]:
    """Options in the tags of the section's paragraphs."""
    tags = re.findall(r"^\.T[PQ]\n(.*)$", manual_section(subcommand), re.MULTILINE)
    plain = " ".join(tags).replace("\\-", "-").replace("\\~", " ").replace("\\fR", " ").replace("=", " ")
    return set(OPTION.findall(plain))


def completed_options(subcommand: str) -> set[str]:
    words = re.search(rf'^_nbdshard_{subcommand}="([^"]*)"', BASH.read_text(), re.MULTILINE)
    assert words is not None, subcommand
    return {word.partition("=")[0] for word in words[1].split()}


@pytest.mark.parametrize("subcommand", [name for name in SUBCOMMANDS if name != "coordinator"])
def test_the_manual_describes_exactly_the_options_there_are(subcommand: str) -> None:
    assert manual_options(subcommand) == parser_options(subcommand)


def test_the_manual_describes_the_coordinator_as_copy_and_its_own() -> None:
    not_there = {"--ring", "-V", "--version", *NOT_COMPLETED}
    assert manual_options("copy") - not_there | manual_options("coordinator") == parser_options("coordinator")


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_bash_completes_exactly_the_options_there_are(subcommand: str) -> None:
    assert completed_options(subcommand) == parser_options(subcommand) - NOT_COMPLETED


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_is_clean_for_groff() -> None:
    ended = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z", str(MANUAL)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def complete(*words: str) -> list[str]:
    """What the completion offers when the last of `words` is under the cursor."""
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"""
        compopt() {{ :; }}
        source '{BASH}'
        COMP_WORDS=({quoted}) COMP_CWORD={len(words) - 1}
        _nbdshard
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ended = subprocess.run(
        ["bash", "-uc", script], capture_output=True, text=True, timeout=60, check=True, cwd="/proc/self"
    )
    assert ended.stderr == ""
    return ended.stdout.split()


def test_completion_offers_subcommands_then_options() -> None:
    assert complete("nbdshard", "co") == ["copy", "coordinator"]
    assert complete("nbdshard", "copy", "--res") == ["--resume"]
    assert complete("nbdshard", "map", "--") == ["--help", "--json", "--totals"]
    assert complete("nbdshard", "nosuch", "--") == []


def test_completion_offers_the_values_of_options_with_few() -> None:
    assert complete("nbdshard", "copy", "--ring", "=", "e") == ["epoll"]
    assert complete("nbdshard", "copy", "--ring", "") == ["auto", "io_uring", "epoll"]
    assert complete("nbdshard", "copy", "--progress", "=") == ["bar", "json"]


def test_completion_leaves_bracketed_commands_alone() -> None:
    assert complete("nbdshard", "copy", "[", "nbdkit", "--re") == []
    assert complete("nbdshard", "copy", "[", "nbdkit", "]", "--res") == ["--resume"]


def test_completion_offers_the_kinds_of_endpoints() -> None:
    assert complete("nbdshard", "copy", "nbd") == ["nbd://", "nbd+unix:///"]
