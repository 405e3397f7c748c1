"""The private directory: where it is made, who may enter it, and that it goes."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from nbdshard.common.errors import UserError
from nbdshard.coordinator.private_directory import PrivateDirectory
from support import seccomp
from support.servers import private_folder


def only(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_it_is_ours_alone_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        before = os.umask(0)
        try:
            with PrivateDirectory() as directory:
                assert os.path.dirname(directory.path) == str(folder)
                assert os.stat(directory.path).st_mode & 0o777 == 0o700
        finally:
            os.umask(before)
        assert only(folder) == []


def test_sockets_and_files_in_it_go_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with PrivateDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
            listening.bind(directory.socket_path("control.sock"))
            Path(directory.path, "file").write_text("x")
        assert only(folder) == []


def test_it_goes_when_an_exception_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with pytest.raises(KeyboardInterrupt), PrivateDirectory():
            raise KeyboardInterrupt
        assert only(folder) == []


def test_removing_it_twice_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with PrivateDirectory() as directory:
            directory.remove()
    assert capfd.readouterr().err == ""


def test_what_is_not_ours_to_remove_is_told_and_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with PrivateDirectory() as directory:
            Path(directory.path, "folder").mkdir()
        assert os.path.isdir(directory.path)
    assert "cannot be removed" in capfd.readouterr().err


def test_it_is_not_where_it_goes_away_when_its_user_logs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_folder() as folder, private_folder() as runtime:
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        with PrivateDirectory() as directory:
            assert os.path.dirname(directory.path) == str(folder)
            assert only(runtime) == []


def test_what_cleans_up_old_temporary_files_is_told_to_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd-tmpfiles skips a directory that is locked: flock(1) tells whether it is."""
    with private_folder() as folder:
        monkeypatch.setenv("TMPDIR", str(folder))
        with PrivateDirectory() as directory:
            assert subprocess.run(["flock", "--nonblock", directory.path, "true"], check=False).returncode == 1
            Path(directory.path, "file").touch()
        assert only(folder) == []


def test_without_locks_it_is_made_all_the_same() -> None:
    program = """if True:
        from nbdshard.coordinator.private_directory import PrivateDirectory
        with PrivateDirectory() as directory:
            print("made")
    """
    assert seccomp.without(program, refused=["flock"]) == "made\n"


@pytest.mark.parametrize("temporary", ["/no/such/folder", "relative", "", "/" + "x" * 90])
def test_where_tmpdir_will_not_do_it_is_made_in_tmp(monkeypatch: pytest.MonkeyPatch, temporary: str) -> None:
    monkeypatch.setenv("TMPDIR", temporary)
    with PrivateDirectory() as directory, socket.socket(socket.AF_UNIX) as listening:
        assert os.path.dirname(directory.path) == "/tmp"
        listening.bind(directory.socket_path("y" * 20))


def test_a_name_too_long_is_a_mistake_of_ours() -> None:
    with PrivateDirectory() as directory, pytest.raises(ValueError, match="at most 20 bytes"):
        directory.socket_path("y" * 21)


def test_when_no_place_will_do_every_reason_is_told() -> None:
    with pytest.raises(UserError) as caught:
        PrivateDirectory(["/no/such/folder", "/" + "x" * 100])
    assert str(caught.value) == (
        "no place for a private directory (/no/such/folder: No such file or directory; "
        f"/{'x' * 100}: too long a name for a unix socket's path); set TMPDIR to one"
    )
