"""A copy that ends before anything of it is durable is gone on with, too, by the command that it tells."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from support.command import EXECUTABLE, Outcome, Run, copy, nbdshard, started
from support.doubles import CMD_WRITE, Double, Request, Talk, double
from support.servers import Server, at_socket, nbdkit, private_folder
from support.waiting import wait_for

SIZE = 64 * images.MIB
SECONDS = 60.0
NEVER = ("--checkpoint", "1h")  # within the test


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


class Scene:
    """A slow source that may be lost, a file to copy it to, and nothing durable in between."""

    def __init__(self, folder: Path, sockets: Path, image: Path) -> None:
        self.image, self.copied, self.journal = image, folder / "copy", folder / "journal"
        self.states = folder / "states"
        self.socket = sockets / "s"
        self.source = f"nbd+unix:///?socket={self.socket}"

    def words(self, *more: str) -> list[str]:
        return ["copy", *NEVER, *more, self.source, str(self.copied)]

    def slow_source(self) -> contextlib.AbstractContextManager[Server]:
        words = (
            "nbdkit",
            "-f",
            "-r",
            "--threads=1",
            "-U",
            str(self.socket),
            "--filter=rate",
            "file",
            str(self.image),
            "rate=64M",
        )
        return at_socket(self.socket, *words)

    def has_begun(self, run: Run) -> None:
        run.until("the copy to begin", lambda: self.copied.exists() and images.allocated_bytes(self.copied))

    def resume(self, outcome: Outcome) -> Outcome:
        """Give the command that `outcome` tells."""
        (line,) = [line for line in outcome.err.splitlines() if "to go on: " in line]
        words = shlex.split(line.partition("to go on: ")[2])
        assert words[:3] == [EXECUTABLE, "copy", "--resume"]
        assert Path(words[4]).exists()
        with self.slow_source():
            return copy(*words[2:], timeout=SECONDS, env={"XDG_STATE_HOME": str(self.states)})


@pytest.fixture
def scene(tmp_path: Path, image: Path) -> Iterator[Scene]:
    with private_folder() as sockets:
        yield Scene(tmp_path, sockets, image)


@pytest.mark.parametrize("names_it", [True, False])
def test_a_server_that_is_lost_for_good_before_the_first_checkpoint(scene: Scene, names_it: bool) -> None:
    options = ["--loss-timeout", "0.5", *(["--journal", str(scene.journal)] if names_it else [])]
    with scene.slow_source() as source:
        words = scene.words(*options)
        with started(*words, env={"XDG_STATE_HOME": str(scene.states)}) as run:
            scene.has_begun(run)
            source.kill()
            paused = run.wait(SECONDS).failed(75, saying=["it was waited for"])
    assert scene.journal.exists() is names_it
    if not names_it:
        listed = nbdshard("jobs", "--json", env={"XDG_STATE_HOME": str(scene.states)}).succeeded()
        (job,) = json.loads(listed.out)
        assert (job["state"], job["bytes_durable"]) == ("paused", 0)
    scene.resume(paused).succeeded()
    images.assert_identical(scene.image, scene.copied)
    assert not scene.journal.exists()


def test_ctrl_c_before_the_first_checkpoint_leaves_the_journal_that_was_named(scene: Scene) -> None:
    with scene.slow_source(), started(*scene.words("--journal", str(scene.journal))) as run:
        scene.has_begun(run)
        run.signal_group()
        stopped = run.wait(SECONDS).failed(130)
    scene.resume(stopped).succeeded()
    images.assert_identical(scene.image, scene.copied)


def test_ctrl_c_before_the_first_checkpoint_leaves_no_journal_that_was_not(scene: Scene) -> None:
    with (
        scene.slow_source(),
        started(*scene.words(), env={"XDG_STATE_HOME": str(scene.states)}) as run,
    ):
        scene.has_begun(run)
        run.signal_group()
        stopped = run.wait(SECONDS).failed(130)
    assert "to go on" not in stopped.err
    assert list(scene.states.rglob("*.journal")) == []


def test_a_coordinator_that_is_killed_before_the_first_checkpoint(scene: Scene) -> None:
    with scene.slow_source():
        words = scene.words("--journal", str(scene.journal))
        with started(*words) as run:
            wait_for("the journal", scene.journal.exists)
            wait_for("something in it", lambda: scene.journal.stat().st_size > 0)
            run.process.send_signal(signal.SIGKILL)
            run.process.wait(SECONDS)
            wait_for("the workers to end", lambda: not run.workers())
        copy("--resume", *words[1:], timeout=SECONDS).succeeded()
    images.assert_identical(scene.image, scene.copied)


class Refusing(Double):
    """Takes the first writes, and no more until it is to."""

    refuses = True

    def write(self, talk: Talk, request: Request, data: bytes) -> None:
        if self.refuses and self.count(CMD_WRITE) > 4:
            talk.done(request, errno.ENOSPC)
        else:
            super().write(talk, request, data)


def test_a_copy_that_fails_before_the_first_checkpoint(scene: Scene) -> None:
    target = Refusing(bytearray(SIZE))
    with scene.slow_source(), double(target) as uri:
        words = ["copy", *NEVER, "--retries", "0", "--journal", str(scene.journal), scene.source, uri]
        failed = nbdshard(*words, timeout=SECONDS)
        assert failed.code == 1, str(failed)
        assert "--resume" in failed.err
        assert target.count(CMD_WRITE) > 4
        target.refuses = False
        nbdshard("copy", "--resume", *words[1:], timeout=SECONDS).succeeded()
    assert target.content == scene.image.read_bytes()


def test_a_copy_that_is_refused_before_it_begins_leaves_no_journal(scene: Scene, tmp_path: Path) -> None:
    small = images.empty_image(tmp_path / "small", images.MIB)
    with scene.slow_source(), nbdkit("file", str(small)) as target:
        copy("--journal", scene.journal, scene.source, target.uri).failed(1)
    assert not scene.journal.exists()


def test_a_short_copy_makes_none_though_it_is_named(tmp_path: Path) -> None:
    """Nor opens one: that would show in the time of its folder."""
    small, folder = images.random_image(tmp_path / "small", images.MIB), tmp_path / "journals"
    folder.mkdir()
    before = folder.stat().st_mtime_ns
    copy("--journal", folder / "journal", small, tmp_path / "copied").succeeded()
    assert folder.stat().st_mtime_ns == before
