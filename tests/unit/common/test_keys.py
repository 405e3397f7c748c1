"""Key files: what is written, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.common.keys import (
    KeyPair,
    PublicKey,
    load_allow_list,
    load_key_pair,
    load_public_key,
    write_key_files,
)

ONE = "11" * 32
TWO = "22" * 32


def written(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_pair_written_is_the_pair_loaded(tmp_path: Path) -> None:
    pair = KeyPair.generate()
    secret, public = write_key_files(str(tmp_path), "alpha", pair)
    assert (secret, public) == (str(tmp_path / "alpha.key"), str(tmp_path / "alpha.pub"))
    assert load_key_pair(secret) == pair
    assert load_public_key(public) == pair.public


def test_two_pairs_are_never_the_same() -> None:
    assert KeyPair.generate().public != KeyPair.generate().public


def test_the_secret_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret, public = write_key_files(str(tmp_path), "alpha", KeyPair.generate())
    finally:
        os.umask(before)
    assert os.stat(secret).st_mode & 0o777 == 0o600
    assert os.stat(public).st_mode & 0o777 == 0o644


@pytest.mark.parametrize("existing", ["alpha.key", "alpha.pub"])
def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(UserError, match=f"{existing}: exists already; keys are never overwritten"):
        write_key_files(str(tmp_path), "alpha", KeyPair.generate())
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "precious"


def test_a_dangling_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "alpha.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="exists already"):
        write_key_files(str(tmp_path), "alpha", KeyPair.generate())
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "two words"])
def test_a_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="plain file name"):
        write_key_files(str(tmp_path), name, KeyPair.generate())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_key_files(str(tmp_path / "none"), "alpha", KeyPair.generate())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "alpha.key", f"nbdshard-secret {ONE} alpha\n", mode)
    with pytest.raises(UserError, match=rf"holds a secret key but its mode is {mode:04o}; make it private: chmod 600"):
        load_key_pair(path)


def test_a_public_key_may_be_readable_by_all(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pub", f"nbdshard-public {ONE} alpha\n", 0o644)
    assert load_public_key(path) == PublicKey(b"\x11" * 32)


def test_the_wrong_half_is_named(tmp_path: Path) -> None:
    secret = written(tmp_path / "a.key", f"nbdshard-secret {ONE} alpha\n")
    public = written(tmp_path / "a.pub", f"nbdshard-public {ONE} alpha\n")
    with pytest.raises(UserError, match=r"a\.pub, line 1: is a public key; a secret key is wanted here"):
        load_key_pair(public)
    with pytest.raises(UserError, match=r"a\.key, line 1: is a secret key; a public key is wanted here"):
        load_public_key(secret)


@pytest.mark.parametrize("digits", ["", "11", "zz" * 32, ONE + "11"])
def test_a_damaged_key_is_told_without_showing_it(tmp_path: Path, digits: str) -> None:
    path = written(tmp_path / "a.key", f"nbdshard-secret {digits}\n")
    with pytest.raises(UserError, match="line 1") as caught:
        load_key_pair(path)
    assert "zz" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.key", "-----BEGIN OPENSSH PRIVATE KEY-----\n")
    with pytest.raises(UserError, match="line 1: is not a line of the form 'nbdshard-secret KEY NAME'"):
        load_key_pair(path)


def test_a_file_without_or_with_two_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds 0 secret keys instead of one"):
        load_key_pair(written(tmp_path / "a", "# nothing\n"))
    with pytest.raises(UserError, match="holds 2 public keys instead of one"):
        load_public_key(written(tmp_path / "b", f"nbdshard-public {ONE}\nnbdshard-public {TWO}\n"))


def test_a_directory_and_a_fifo_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UserError, match="is not a regular file"):
        load_key_pair(str(tmp_path / "fifo"))
    with pytest.raises(UserError, match="is not a regular file"):
        load_key_pair(str(tmp_path))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: cannot be read: No such file or directory"):
        load_key_pair(str(tmp_path / "none"))


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file of keys"):
        load_public_key(written(tmp_path / "a", "#" * (2 << 20)))


def test_an_allow_list_is_a_file_of_public_keys(tmp_path: Path) -> None:
    text = f"# workers\n\nnbdshard-public {ONE} alpha\nnbdshard-public {TWO} beta with a remark\n"
    allowed = load_allow_list(written(tmp_path / "workers", text))
    assert allowed == {PublicKey(b"\x11" * 32), PublicKey(b"\x22" * 32)}


def test_an_allow_list_is_a_directory_of_pub_files(tmp_path: Path) -> None:
    written(tmp_path / "a.pub", f"nbdshard-public {ONE} alpha\n")
    written(tmp_path / "b.pub", f"nbdshard-public {TWO} beta\n")
    written(tmp_path / "README", "not a key\n")
    assert load_allow_list(str(tmp_path)) == {PublicKey(b"\x11" * 32), PublicKey(b"\x22" * 32)}


def test_an_allow_list_that_allows_nobody_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allows no key at all"):
        load_allow_list(str(tmp_path))


def test_a_secret_never_shows_in_a_repr() -> None:
    pair = KeyPair.generate()
    assert pair.secret.hex() not in repr(pair)
    assert repr(pair.secret) not in repr(pair)
