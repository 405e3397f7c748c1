"""A copy that ended before its time is gone on with: what was durable is not read again, and the result is the same."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nbdshard.cli import resuming
from nbdshard.coordinator.journal_facts import ResultOptions
from support import images
from support.blkhash import blkhash_of
from support.brakes import Brake
from support.command import Outcome, Run, copy, started
from support.journals import durable_bytes
from support.servers import at_socket, private_folder
from support.waiting import WAIT_SECONDS, wait_for

SIZE = 64 * images.MIB
OPTIONS = ("--range-size", "4M", "--checkpoint", "0.2", "-C", "1", "-T", "1")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.random_image(tmp_path_factory.mktemp("image") / "source", SIZE)


class Scene:
    """A source with a brake, a destination, and a journal; `kill` ends a copy in the middle as a crash would."""

    def __init__(self, folder: Path, sockets: Path, image: Path) -> None:
        self.brake = Brake(sockets, SIZE // 4)
        self.image = image
        self.copied = images.empty_image(folder / "copy", SIZE)
        self.journal = folder / "journal"
        self.source = f"nbd+unix:///?socket={sockets / 's'}"
        self.destination = f"nbd+unix:///?socket={sockets / 'd'}"
        self.slow_destination = f"nbd+unix:///?socket={sockets / 'e'}"

    def words(self, *more: str) -> list[str]:
        return ["copy", *OPTIONS, "--journal", str(self.journal), *more, self.source, self.destination]

    def kill(self, number: signal.Signals = signal.SIGKILL, words: Sequence[str] = ()) -> Outcome:
        """Begin, or go on, and end the copy when some more of it is durable."""
        before = durable_bytes(self.journal)
        with started(*self.words(*words)) as run:
            self.wait_for_durable(run, before)
            os.kill(run.pid, number)
            run.process.wait(WAIT_SECONDS)
            wait_for("the workers to end", lambda: not run.workers())
            return Outcome(run.process.returncode, run.out(), run.err(), run.command)

    def wait_for_durable(self, run: Run, before: int = 0) -> None:
        """Return when the journal of `run`, which is still under way, has something, and more than `before` bytes."""
        run.until("something to be durable", lambda: durable_bytes(self.journal) > before)

    def copy(self, *more: str, **how: object) -> Outcome:
        """Begin, and let the copy come to its end."""
        self.brake.release()
        return copy(*self.words(*more)[1:], **how)  # type: ignore[arg-type]

    def resume(self, *more: str, **how: object) -> Outcome:
        return self.copy("--resume", *more, **how)


@pytest.fixture
def scene(tmp_path: Path, image: Path) -> Iterator[Scene]:
    with private_folder() as sockets:
        one = Scene(tmp_path, sockets, image)
        slow = (
            "nbdkit",
            "-f",
            "-r",
            "-U",
            str(sockets / "s"),
            "--filter=rate",
            "--threads=1",
            "file",
            str(image),
            *one.brake.options,
        )
        plain = ("nbdkit", "-f", "-U", str(sockets / "d"), "file", str(one.copied))
        slowly = (
            "nbdkit",
            "-f",
            "-U",
            str(sockets / "e"),
            "--filter=rate",
            "file",
            str(one.copied),
            *one.brake.options,
        )
        with at_socket(sockets / "s", *slow), at_socket(sockets / "d", *plain), at_socket(sockets / "e", *slowly):
            yield one


def test_a_copy_whose_coordinator_was_killed_is_resumed(scene: Scene) -> None:
    scene.kill()
    outcome = scene.resume().succeeded()
    assert "resumed" in outcome.last_line, str(outcome)
    images.assert_identical(scene.image, scene.copied)
    assert not scene.journal.exists()


def test_a_copy_that_was_stopped_tells_the_command_that_resumes_it(scene: Scene) -> None:
    stopped = scene.kill(signal.SIGINT)
    assert stopped.code == 130
    (line,) = [line for line in stopped.err.splitlines() if "to go on: " in line]
    command = line.partition("to go on: ")[2]
    assert shlex.split(command)[1:5] == ["copy", "--resume", "--journal", str(scene.journal)]
    scene.brake.release()
    subprocess.run(command, shell=True, check=True, timeout=WAIT_SECONDS)
    images.assert_identical(scene.image, scene.copied)


def test_a_finished_copy_leaves_a_journal_only_if_asked(scene: Scene) -> None:
    scene.copy().succeeded()
    assert not scene.journal.exists()
    scene.copy("--keep-journal").succeeded()
    assert scene.journal.exists()
    again = scene.resume().succeeded()
    assert "0 B copied" in again.last_line


def test_a_journal_that_is_there_is_not_begun_anew(scene: Scene) -> None:
    scene.kill()
    scene.copy().failed(1, saying=[str(scene.journal), "there is a file already", "--resume"])


def test_another_source_is_refused(scene: Scene) -> None:
    scene.kill()
    outcome = copy(*OPTIONS, "--journal", scene.journal, "--resume", scene.image, scene.destination)
    outcome.failed(1, saying=["the journal is about another source", "--force-resume"])


def test_a_resumed_copy_has_the_checksum_of_the_whole_image(scene: Scene) -> None:
    for again in ((), ("--resume",)):
        scene.kill(words=("--checksum", *again))
    outcome = scene.resume("--checksum").succeeded()
    assert "resumed" in outcome.last_line, str(outcome)
    assert outcome.out == f"{blkhash_of(scene.image)}  {scene.source}\n"
    images.assert_identical(scene.image, scene.copied)


def test_a_copy_that_is_complete_and_kept_has_its_checksum_in_the_journal(scene: Scene) -> None:
    for again in ((), ("--resume",)):
        outcome = scene.copy("--checksum", "--keep-journal", *again).succeeded()
        assert outcome.out == f"{blkhash_of(scene.image)}  {scene.source}\n"
    assert "0 B copied" in outcome.last_line


def test_a_journal_without_digests_is_refused_for_a_checksum_whatever_is_forced(scene: Scene) -> None:
    scene.kill()
    for resume in ((), ("--force-resume",)):
        outcome = scene.resume("--checksum", *resume)
        outcome.failed(1, saying=["the copy began without --checksum: the journal has no digests", str(scene.journal)])
    scene.resume().succeeded()


def test_a_journal_with_digests_is_not_gone_on_with_without(scene: Scene) -> None:
    scene.kill(words=("--checksum",))
    scene.resume("--force-resume").failed(1, saying=["the copy began with --checksum; go on with it, too"])


def test_other_options_are_refused(scene: Scene) -> None:
    scene.kill()
    scene.resume("--allocated").failed(1, saying=["began without --allocated, and is to go on with --allocated"])
    scene.resume("--sparse=0").failed(1, saying=["began without --sparse, and is to go on with --sparse=0; --force"])
    scene.resume("--no-extents").failed(1, saying=["began without --no-extents, and is to go on with --no-extents"])


def test_every_option_that_matters_has_a_word() -> None:
    assert set(resuming.OPTIONS) == set(ResultOptions.__struct_fields__)


def test_what_is_durable_and_differs_is_refused(scene: Scene) -> None:
    scene.kill()
    with scene.copied.open("r+b") as file:
        file.write(bytes(SIZE))
    scene.resume().failed(1, saying=["source and destination differ", "without --resume"])


def test_an_export_too_short_for_what_is_durable_is_refused(scene: Scene) -> None:
    scene.kill()
    os.truncate(scene.copied, 4096)
    scene.resume().failed(1, saying=["its size is 4096 bytes, but the bytes up to", "said to be copied already"])


def test_what_differs_and_is_forced_is_no_success(scene: Scene) -> None:
    scene.kill()
    with scene.copied.open("r+b") as file:
        file.write(bytes(SIZE))
    outcome = scene.resume("--force-resume")
    outcome.failed(1, saying=[": source and destination differ in [", "durable; resumed all the same"])
    assert "different: source and destination differ in [" in outcome.last_line, str(outcome)
    assert "nbdshard verify" in outcome.last_line


def test_what_differs_and_is_forced_is_found_by_verifying(scene: Scene) -> None:
    scene.kill()
    with scene.copied.open("r+b") as file:
        file.write(bytes(SIZE))
    outcome = scene.resume("--force-resume", "--verify", "--keep-journal").failed(1, saying=["differ: offset "])
    assert "which the journal calls durable" not in outcome.last_line
    scene.resume("--verify").succeeded()
    images.assert_identical(scene.image, scene.copied)


def test_what_is_durable_is_compared_also_where_something_else_is_forced(scene: Scene) -> None:
    scene.kill()
    scene.copied.write_bytes(bytes(SIZE))
    outcome = scene.resume("--allocated", "--force-resume")
    outcome.failed(1, saying=["is to go on with --allocated; resumed all the same"])
    outcome.failed(1, saying=["source and destination differ in [", "durable; resumed all the same"])


def test_other_options_that_are_forced_are_no_failure(scene: Scene) -> None:
    scene.kill()
    outcome = scene.resume("--allocated", "--force-resume").succeeded()
    assert "resumed" in outcome.last_line
    images.assert_identical(scene.image, scene.copied)


def test_a_destination_file_is_neither_made_nor_cut(scene: Scene, tmp_path: Path) -> None:
    scene.destination = str(tmp_path / "file")
    scene.kill()
    os.rename(scene.destination, tmp_path / "moved")
    scene.resume().failed(1, saying=["there is no such file"])
    assert not os.path.exists(scene.destination)
    os.rename(tmp_path / "moved", scene.destination)
    scene.resume().succeeded()
    images.assert_identical(scene.image, Path(scene.destination))


def test_a_file_behind_standard_output_is_not_cut_either(scene: Scene, tmp_path: Path) -> None:
    scene.destination = "-"
    path = tmp_path / "file"
    with path.open("wb") as stdout, started(*scene.words(), stdout=stdout.fileno()) as run:
        scene.wait_for_durable(run)
        run.process.kill()
        run.process.wait(WAIT_SECONDS)
        wait_for("the workers to end", lambda: not run.workers())
    with path.open("r+b") as stdout:
        scene.resume(stdout=stdout.fileno()).succeeded()
    images.assert_identical(scene.image, path)


def test_a_source_file_that_was_changed_is_refused(scene: Scene, tmp_path: Path) -> None:
    scene.source, scene.destination = str(images.random_image(tmp_path / "own", SIZE)), scene.slow_destination
    scene.kill()
    with open(scene.source, "r+b") as file:
        file.write(b"changed")
    scene.resume().failed(1, saying=["the source was changed since the copy began"])


def test_a_source_file_that_was_changed_before_the_first_checkpoint_is_refused(scene: Scene, tmp_path: Path) -> None:
    own = images.random_image(tmp_path / "own", SIZE)
    scene.source, scene.destination = str(own), scene.slow_destination
    with started(*scene.words("--checkpoint", "1")) as run:
        wait_for(
            "the copy to begin", lambda: images.allocated_bytes(scene.copied) > 0 or run.process.poll() is not None
        )
        with own.open("r+b") as file:
            file.write(b"changed")
        scene.wait_for_durable(run)
        run.process.kill()
        run.process.wait(WAIT_SECONDS)
        wait_for("the workers to end", lambda: not run.workers())
    scene.resume().failed(1, saying=["the source was changed since the copy began"])


def test_a_destination_file_may_be_renamed_in_the_middle(scene: Scene, tmp_path: Path) -> None:
    scene.destination = str(tmp_path / "file")
    with started(*scene.words("--checkpoint", "1")) as run:
        there = Path(scene.destination)
        wait_for("the copy to begin", lambda: there.exists() and images.allocated_bytes(there) > 0)
        there.rename(tmp_path / "moved")
        scene.brake.release()
        run.wait().succeeded()
    images.assert_identical(scene.image, tmp_path / "moved")


def test_resume_without_a_journal_is_a_usage_error() -> None:
    copy("--resume", "nbd://localhost/a", "nbd://localhost/b").failed(2, saying=["--resume needs --journal"])


def test_a_missing_journal_is_told(tmp_path: Path) -> None:
    there = tmp_path / "none"
    uris = ("nbd://localhost/a", "nbd://localhost/b")
    copy("--resume", "--journal", there, *uris).failed(1, saying=[str(there), "no such journal"])


def test_what_cannot_be_resumed_has_no_journal(tmp_path: Path, image: Path) -> None:
    for source, destination in (("-", tmp_path / "to"), (image, "null:")):
        for more in ([], ["--resume"]):
            outcome = copy(*more, "--journal", tmp_path / "j", source, destination, input=b"some bytes")
            assert outcome.code == 1, str(outcome)
    outcome.failed(1, saying=[str(tmp_path / "j"), "cannot be resumed: it has no journal"])


def test_a_copy_to_null_that_is_stopped_does_not_tell_how_to_go_on(scene: Scene) -> None:
    words = ["copy", *OPTIONS, scene.source, "null:"]
    with started(*words, "--progress=json") as run:
        wait_for("the first bytes", lambda: '"bytes_total"' in run.err() or run.process.poll() is not None)
        run.signal_group()
        outcome = run.wait().failed(130, saying=["stopped at"])
    assert "to go on" not in outcome.err


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("", 2, ["--journal is to name a file"]),
        ("new/", 2, ["--journal is to name a file"]),
        (".", 1, ["there is a file already"]),
        ("file/journal", 1, ["is not a folder"]),
    ],
)
def test_a_journal_that_cannot_be_made_is_told_before_anything_is_copied(
    tmp_path: Path, image: Path, name: str, code: int, words: list[str]
) -> None:
    (tmp_path / "file").touch()
    copied = tmp_path / "copied"
    outcome = copy("--journal", name, image, copied, cwd=tmp_path)
    outcome.failed(code, saying=words)
    assert not copied.exists()


def test_without_a_state_directory_a_copy_goes_on(scene: Scene) -> None:
    words = ["copy", *OPTIONS, scene.source, scene.destination]
    with started(*words, env={"XDG_STATE_HOME": "/dev/null"}) as run:
        run.until("the first checkpoint", lambda: "cannot be resumed" in run.err())
        scene.brake.release()
        outcome = run.wait().succeeded()
    assert "the copy goes on, but cannot be resumed" in outcome.err.splitlines()[0], str(outcome)
    images.assert_identical(scene.image, scene.copied)


def test_a_short_copy_makes_no_journal(tmp_path: Path, image: Path) -> None:
    states = tmp_path / "states"
    copy(image, tmp_path / "copied", env={"XDG_STATE_HOME": str(states)}).succeeded()
    assert list(states.rglob("*.journal")) == []
