"""What `nbdshard serve` is told: by options, by a file, by both."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nbdshard.cli import serve
from nbdshard.cli.grammar import UsageError
from nbdshard.cli.serve_settings import Settings, settings_of
from nbdshard.common.errors import UserError
from nbdshard.server.chain import Wanted, open_export

EXAMPLE = Path(__file__).parents[3] / "deploy" / "nbdshard-serve.toml"
DISK = '[[export]]\nname = "disk"\ndriver = "raw"\nconn = "memory:1M"\n'


def settings(*words: str | Path) -> Settings:
    return settings_of(serve.build_parser("nbdshard serve").parse_words([str(word) for word in words]))


def file_of(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def no_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)


def test_a_file_says_what_options_say(tmp_path: Path) -> None:
    (tmp_path / "env").touch(0o600)
    (tmp_path / "env").write_text("AWS_REGION=x\n")
    path = file_of(
        tmp_path,
        f"""
        max-connections = 7
        processes = 2
        credentials-file = "{tmp_path}/env"
        [listen]
        tcp = ["*:1", "[::1]:2", "host"]
        unix = ["/run/a b"]
        {DISK}
        read-only = true
        description = "what & ever?"
        hints = {{ request = "30s", loss = "2m", backoff = "200ms-5s" }}
        parameters = {{ size = "1G", depth = 3, fast = false }}
        """,
    )
    found = settings("--config", path)
    assert (found.max_connections, found.processes) == (7, 2)
    assert found.tcp == [("", 1), ("::1", 2), ("host", 10809)]
    assert found.unix == ["/run/a b"]
    (wanted,) = found.exports
    assert (wanted.name, wanted.driver, wanted.conn) == ("disk", "raw", "memory:1M")
    assert wanted.credentials.variables == {"AWS_REGION": "x"}
    assert wanted.parameters == {
        "size": "1G",
        "depth": "3",
        "fast": "no",
        "read-only": "yes",
        "description": "what & ever?",
        "hint-request": "30s",
        "hint-loss": "2m",
        "hint-backoff": "200ms-5s",
    }


def test_exports_add_up_and_other_options_win(tmp_path: Path) -> None:
    path = file_of(tmp_path, 'max-connections = 7\n[listen]\ntcp = ["a"]\nunix = ["b"]\n' + DISK + "read-only = false")
    found = settings(
        "--config", path, "-e", "more", "raw", "memory:2M", "--max-connections=9", "--unix=c", "-r", "disk"
    )
    assert [each.name for each in found.exports] == ["disk", "more"]
    assert found.exports[0].parameters == {"read-only": "yes"}
    assert (found.max_connections, found.tcp, found.unix) == (9, [], ["c"])


def test_the_example_says_everything_there_is_and_is_valid() -> None:
    found = settings("--config", EXAMPLE)
    assert [each.name for each in found.exports] == ["disk0", "disk1", "scratch"]
    text = EXAMPLE.read_text()
    assert all(
        word in text for word in ("read-only", "description", "hints", "parameters", "credentials-file", "processes")
    )


WRONG = {
    "this is": r"serve.toml: is not TOML: .*line 1",
    "processed = 2\ncolour = 1": r"serve.toml: 'colour', 'processed' are unknown; known are credentials, .*processes",
    "processes = 0": r"serve.toml: processes: Expected `int` >= 1",
    'processes = "two"': r"serve.toml: processes: Expected `int \| null`, got `str`",
    "[listen]\nudp = []": r"serve.toml: listen: Object contains unknown field `udp`",
    '[listen]\ntcp = ["host:http"]\n' + DISK: r"serve.toml: listen.tcp: 'host:http': a port from 0 to",
    '[[export]]\nname = "x"': r"serve.toml: export 1: Object missing required field `driver`",
    DISK + "readonly = true\nsize = 1": r"serve.toml: export 1: 'readonly', 'size' are unknown",
    DISK + DISK: "two exports are called 'disk'",
    DISK + 'read-only = "yes"': r"export 1: read-only: Expected `bool \| null`, got `str`",
    DISK + "parameters = { size = 1.5 }": r"export 1: parameters.*: Expected `bool \| int \| str`, got `float`",
    DISK + 'read-only = true\nparameters = { "read-only" = "no" }': r"export 'disk': read-only twice, among",
    DISK + 'hints = { patience = "1s" }': r"export 1: hints: Object contains unknown field `patience`",
    DISK + "credentials = { PATH = 'x' }": r"export 'disk': credentials: PATH is no name that a store knows",
    DISK + "credentials-file = '/nowhere'": r"/nowhere: cannot be read: No such file",
    DISK + "credentials = { AWS_A = 'x' }\ncredentials-file = 'y'": r"one of them is enough",
    "": "no export is given",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_in_a_file_is_told_with_its_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=WRONG[text]):
        settings("--config", file_of(tmp_path, text))


def test_a_file_with_credentials_in_it_is_for_its_owner_only(tmp_path: Path) -> None:
    table = DISK + "credentials = { AWS_ACCESS_KEY_ID = 'me' }"
    found = settings("--config", file_of(tmp_path, table))
    assert found.exports[0].credentials.variables == {"AWS_ACCESS_KEY_ID": "me"}
    login = DISK.replace("memory:1M", "s3:http://me:secret@host/bucket/x")
    assert settings("--config", file_of(tmp_path, login)).exports
    for text in table, login, login.replace("secret", "se/cret"):
        with pytest.raises(UserError, match="holds credentials but its mode is 0644"):
            settings("--config", file_of(tmp_path, text, 0o644))
    name = DISK.replace("memory:1M", "nbd:nbd://host/a@b")
    assert settings("--config", file_of(tmp_path, name, 0o644)).exports
    assert settings("--config", file_of(tmp_path, DISK, 0o644)).exports


def test_credentials_are_of_the_export_or_of_the_option_or_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "of the environment")
    (tmp_path / "env").touch(0o600)
    (tmp_path / "env").write_text("AWS_PROFILE=of the option\n")
    path = file_of(tmp_path, DISK + "credentials = { AWS_PROFILE = 'of the export' }")
    more = ["-e", "more", "raw", "memory:1M"]

    def seen(*words: str | Path) -> list[str]:
        return [each.credentials.variables["AWS_PROFILE"] for each in settings(*words).exports]

    assert seen("--config", path, *more) == ["of the export", "of the environment"]
    assert seen("--config", path, *more, "--credentials", tmp_path / "env") == ["of the export", "of the option"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("-e", "a", "raw", "memory:1M", "-e", "a", "raw", "memory:1M"), "two exports are called 'a'"),
        (("-e", "a", "raw", "memory:1M", "-r", "b"), "no export is called 'b'"),
        (
            ("-e", "a", "raw", "memory:1M", "--tcp", "host:99999"),
            "argument --tcp: 'host:99999': a port from 0",
        ),
        (("-e", "a", "raw", "memory:1M", "--processes", "0"), "'0' is not a whole number from 1 to 64"),
        (("-e", "a", "s3:http://me:secret@host/b"), r"expected 3 arguments"),
        (("-e", "a", "raw", "memory:1M", "--tcp=http://me:secret@host"), r"http://\*\*\*@host"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line_without_a_password(words: tuple[str, ...], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        settings(*words)
    assert "secret" not in str(caught.value)


def hinted(parameters: dict[str, str]) -> tuple[object, ...]:
    exported = open_export(Wanted("disk", "raw", "memory:1M", parameters), threading.Event())
    hints = exported.hints
    return exported.description, hints.request, hints.loss, hints.backoff_min, hints.backoff_max


def test_what_clients_are_advised_is_part_of_an_export() -> None:
    assert hinted({}) == ("", None, None, None, None)
    told = {"description": "x", "hint-request": "30s", "hint-loss": "2m", "hint-backoff": "200ms-5s"}
    assert hinted(told) == ("x", 30.0, 120.0, 0.2, 5.0)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("hint-request", "soon", "'soon' is not a span of time"),
        ("hint-request", "2h", "hint-request=2h: 1.00 s to 1 h 00 min is what clients believe"),
        ("hint-loss", "1ms", "hint-loss=1ms: 1.00 s to 1 d 00 h is what clients believe"),
        ("hint-backoff", "1s", "'1s' is not a shortest and a longest pause; 200ms-5s, say"),
        ("hint-backoff", "5s-1s", "the shortest pause is longer than the longest"),
        ("hint-backoff", "1s-1h", "hint-backoff=1s-1h: 0.05 s to 5 min 00 s"),
        ("description", "x" * 4097, "a description of at most 4096 bytes"),
    ],
)
def test_advice_that_no_client_would_follow_is_refused(name: str, value: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        hinted({name: value})
