"""cli/grammar.py"""

from __future__ import annotations

import pytest

from nbdshard.cli.grammar import Parser, UsageError, take_out_commands


def small_parser() -> Parser:
    parser = Parser("tool", "A tool.", "tool [OPTIONS] WORD ...")
    parser.value_unless_given["--progress"] = "bar"
    parser.add_argument("-p", dest="progress", action="store_const", const="bar")
    parser.add_argument("--progress", dest="progress")
    parser.add_argument("-C", "--connections")
    parser.add_argument("operands", nargs="*")
    return parser


def test_bracketed_commands_are_taken_out_whole() -> None:
    words = take_out_commands(["-C", "2", "[", "nbdkit", "-v", "--", "memory", "1G", "]", "x"])
    assert words.rest[:2] == ["-C", "2"]
    assert words.rest[3:] == ["x"]
    assert words.commands == {words.rest[2]: ["nbdkit", "-v", "--", "memory", "1G"]}


def test_both_sides_may_be_commands() -> None:
    words = take_out_commands(["[", "a", "]", "[", "b", "[", "c", "]"])
    assert [words.commands[mark] for mark in words.rest] == [["a"], ["b", "[", "c"]]


def test_a_bracket_inside_a_word_is_only_a_letter() -> None:
    assert take_out_commands(["[a]", "nbd://[::1]/"]).rest == ["[a]", "nbd://[::1]/"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["[", "nbdkit", "memory", "1G"],
            "'[' without a ']' after it; brackets are words of their own: [ CMD ARGS ... ]",
        ),
        (["nbdkit", "]"], "']' without a '[' before it"),
        (["[", "a", "]", "]"], "']' without a '[' before it"),
    ],
)
def test_a_bracket_without_its_partner_is_a_usage_error(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        take_out_commands(argv)
    assert str(caught.value) == line


def test_options_may_stand_before_between_and_after_the_operands() -> None:
    args = small_parser().parse_words(["-p", "a", "-C", "2", "b", "--progress=json"])
    assert (args.operands, args.connections, args.progress) == (["a", "b"], "2", "json")


@pytest.mark.parametrize("word", ["--progress", "--prog", "--p", "-p"])
def test_progress_without_a_value_does_not_swallow_the_next_word(word: str) -> None:
    args = small_parser().parse_words([word, "a", "b"])
    assert (args.progress, args.operands) == ("bar", ["a", "b"])


def test_after_two_dashes_nothing_is_an_option() -> None:
    args = small_parser().parse_words(["-C", "2", "a", "--", "-p", "--"])
    assert (args.operands, args.connections, args.progress) == (["a", "-p", "--"], "2", None)


def test_a_single_dash_is_an_operand() -> None:
    assert small_parser().parse_words(["-", "-C", "1", "-"]).operands == ["-", "-"]


def test_two_dashes_inside_brackets_belong_to_the_command() -> None:
    args = small_parser().parse_words(["[", "a", "--", "-b", "]", "-C", "3", "c"])
    assert args.connections == "3"
    assert args.commands[args.operands[0]] == ["a", "--", "-b"]


def test_long_options_may_be_shortened_and_values_joined() -> None:
    args = small_parser().parse_words(["--conn=5", "a"])
    assert args.connections == "5"
    assert small_parser().parse_words(["-C7", "a"]).connections == "7"


def test_a_missing_value_is_one_line() -> None:
    with pytest.raises(UsageError) as caught:
        small_parser().parse_words(["a", "-C"])
    assert str(caught.value) == "argument -C/--connections: expected one argument; try 'tool --help'"


def test_an_unknown_option_is_one_line() -> None:
    with pytest.raises(UsageError) as caught:
        small_parser().parse_words(["--nosuch", "a"])
    assert str(caught.value) == "unrecognized arguments: --nosuch; try 'tool --help'"
