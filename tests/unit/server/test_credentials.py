"""What a store is given to log in with, and that nothing shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.limits import CREDENTIALS_BYTES_MAX
from nbdshard.server.backends.base import Backend
from nbdshard.server.backends.memory import MemoryBackend
from nbdshard.server.chain import Wanted, open_backend
from nbdshard.server.credentials import Credentials, load_credentials, of_environment, take_login
from nbdshard.server.opening import Opener, Opening


def secret_file(path: Path, text: str, mode: int = 0o600) -> str:
    path.touch(0o600)
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_file_has_a_line_for_each_name(tmp_path: Path) -> None:
    text = "# ours\n\nAWS_ACCESS_KEY_ID=me\n AWS_SECRET_ACCESS_KEY=\"a=b c\" \nAWS_REGION='x'\n"
    expected = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "a=b c", "AWS_REGION": "x"}
    assert load_credentials(secret_file(tmp_path / "s3.env", text)).variables == expected


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "holds no credentials"),
        ("AWS_REGION=x\nsecret word\n", "line 2: is not of the form NAME=VALUE"),
        ("PATH=/secret", "PATH is no name that a store knows; they begin with AWS_"),
        ("AWS_A=secret\nAWS_A=secret\n", "line 2: AWS_A twice"),
        ("#" * (CREDENTIALS_BYTES_MAX + 1), "not a file of credentials"),
    ],
)
def test_a_file_of_something_else_is_refused_and_not_shown(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        load_credentials(secret_file(tmp_path / "s3.env", text))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret_file(tmp_path / "s3.env", "AWS_REGION=x", mode)
    with pytest.raises(UserError, match=f"holds credentials but its mode is {mode:04o}; make it private: chmod 600"):
        load_credentials(path)


def test_of_the_environment_stores_get_what_is_theirs() -> None:
    environment = {"AWS_PROFILE": "x", "AZURE_STORAGE_ACCOUNT_KEY": "y", "GOOGLE_SERVICE_ACCOUNT": "z", "PATH": "/"}
    assert set(of_environment(environment).variables.values()) == {"x", "y", "z"}


@pytest.mark.parametrize(
    ("conn", "clean", "login"),
    [
        ("file:/a://b:c@d", "file:/a://b:c@d", None),
        ("s3:http://host:9000/bucket", "s3:http://host:9000/bucket", None),
        ("cache:s3:https://me:a%2Fb%40@host/b?dir=/x@y", "cache:s3:https://host/b?dir=/x@y", ("me", "a/b@")),
        ("s3:http://me:p@w@[::1]:9000/b", "s3:http://[::1]:9000/b", ("me", "p@w")),
        ("s3:http://[::1]:9000/b?dir=/x@y", "s3:http://[::1]:9000/b?dir=/x@y", None),
        ("s3:http://me:@host/b", "s3:http://host/b", ("me", "")),
    ],
)
def test_a_login_is_taken_out_of_a_conn(conn: str, clean: str, login: tuple[str, str] | None) -> None:
    assert take_login(conn) == (clean, None if login is None else Credentials(*login))


@pytest.mark.parametrize(
    "conn", ["s3:http://me:se/cret@host/b", "s3:http://me:12/secret@host/b", "s3:http://me:se?cret@host/b"]
)
def test_a_login_that_is_cut_short_is_refused_and_not_shown(conn: str) -> None:
    with pytest.raises(UserError, match="write / as %2F") as caught:
        take_login(conn)
    assert "cret" not in str(caught.value) and "me" not in str(caught.value).partition(";")[0].replace("elsewhere", "")


@pytest.mark.parametrize("conn", ["s3:http://secret@host/b", "s3:http://:secret@host/b"])
def test_half_a_login_is_refused_and_not_shown(conn: str) -> None:
    with pytest.raises(UserError, match="USER:PASSWORD is expected") as caught:
        take_login(conn)
    assert "secret" not in str(caught.value)


def test_a_store_is_given_the_login_and_nothing_else_sees_it() -> None:
    seen: list[Opening] = []

    def opened(opening: Opening) -> Backend:
        seen.append(opening)
        return MemoryBackend(1 << 20)

    drivers = {"raw": {"s3": Opener(opened)}}
    ours = Credentials(variables={"AWS_REGION": "x"})
    open_backend(Wanted("disk", "raw", "s3:http://host/b", credentials=ours), drivers).close()
    open_backend(Wanted("disk", "raw", "s3:http://me:secret@host/b", credentials=ours), drivers).close()
    assert [each.credentials for each in seen] == [ours, Credentials("me", "secret")]
    assert {each.place for each in seen} == {"http://host/b"}
    assert "secret" not in repr(seen)


@pytest.mark.parametrize("more", ["?colour=red", "?x", "?read-only=x"])
def test_no_error_shows_a_login(more: str) -> None:
    drivers = {"raw": {"s3": Opener(lambda _: MemoryBackend(1))}}
    with pytest.raises(UserError, match="s3:http") as caught:
        open_backend(Wanted("disk", "raw", f"s3:http://me:secret@host/b{more}"), drivers)
    assert "secret" not in str(caught.value)
