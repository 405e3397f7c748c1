"""Where journals are kept when nobody says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.coordinator.journal_paths import default_path, journals, state_directory
from support.journals import UUID


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/home/me"}, "/home/me/.local/state/nbdshard"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "/state"}, "/state/nbdshard"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "state"}, "/home/me/.local/state/nbdshard"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": ""}, "/home/me/.local/state/nbdshard"),
        ({"HOME": "/home/me", "XDG_STATE_HOME": "/state", "STATE_DIRECTORY": "/var/lib/shard"}, "/var/lib/shard"),
        ({"STATE_DIRECTORY": "/var/lib/shard:/var/lib/other"}, "/var/lib/shard"),
    ],
)
def test_journals_are_kept_where_the_unit_the_user_or_custom_says(environment: dict[str, str], folder: str) -> None:
    assert state_directory(environment) == folder
    assert default_path(UUID, environment) == f"{folder}/{UUID}.journal"


def test_without_any_home_directory_a_file_has_to_be_named() -> None:
    with pytest.raises(UserError) as caught:
        state_directory({"HOME": "relative"})
    assert str(caught.value) == "there is no home directory to keep the journal in; name a file with --journal"


@pytest.mark.parametrize("word", ["", "../../etc/passwd", UUID.upper(), UUID + "\n", UUID[:-1]])
def test_only_a_uuid_names_a_job(word: str) -> None:
    with pytest.raises(UserError) as caught:
        default_path(word, {"HOME": "/home/me"})
    assert caught.value.what == "is not the uuid of a job"


def test_the_journals_there_are_come_by_name_without_what_belongs_to_them(tmp_path: Path) -> None:
    environment = {"STATE_DIRECTORY": str(tmp_path / "state")}
    assert journals(environment) == []
    (tmp_path / "state").mkdir()
    for name in ("b.journal", "a.journal", "a.journal-wal", "notes"):
        (tmp_path / "state" / name).touch()
    assert journals(environment) == [str(tmp_path / "state" / name) for name in ("a.journal", "b.journal")]


def test_a_state_directory_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(UserError) as caught:
        journals({"STATE_DIRECTORY": str(tmp_path / "state")})
    assert str(caught.value) == f"{tmp_path}/state: cannot be listed: Not a directory"
